"""The planted benchmark: does a rule find the modules that a skill was trained into?

Every named pair with a ``planted`` list is one problem. Candidates are all heads and MLPs, ranked together. A rule is
scored on how it ranks the planted ones (AUROC, average precision, precision at their number) and on what a graft of as
many of its highest modules recovers on questions that ranked nothing. Add a rule of your own with ``register_rule``,
and name it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UnknownNameError, UsageError, check_count
from mechtransplant.evaluation import Evaluation, compare, evaluate
from mechtransplant.grafting import Graft
from mechtransplant.modules import Kind
from mechtransplant.pair import Pair, load_pair
from mechtransplant.progress import track
from mechtransplant.ranking import RULES, get_rule, rank_modules
from mechtransplant.significance import auroc, average_precision, precision_at
from mechtransplant.tasks import Splits, load_task
from mechtransplant.weights import get_pair, list_pairs

if TYPE_CHECKING:
    import pandas as pd

KINDS: tuple[Kind, ...] = ("head", "mlp")
#: rules that are made of another one answer no question of their own
DERIVED = ("bottom", "random_matched", "screened_swap", "screened_patch")


def planted_pairs() -> list[str]:
    """The named pairs whose planted modules are known."""
    return [name for name in list_pairs() if get_pair(name).planted]


def is_drifted(pair: str) -> bool:
    """Whether every module differs, and not the planted ones alone (as the pair's description says)."""
    return "drifted" in get_pair(pair).description.split(":")[0]


def default_rules() -> list[str]:
    """Every registered rule that is not made of another."""
    return [name for name in RULES if name not in DERIVED]


def check_names(pairs: Iterable[str], rules: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UsageError for a pair that is not planted, an unknown rule, or options of a rule that is not asked for."""
    for pair in pairs:
        if not get_pair(pair).planted:
            raise UnknownNameError("planted pair", pair, planted_pairs())
    known = list(rules)
    for rule in known:
        get_rule(rule).check(KINDS, dict(options.get(rule, {})))
    for rule in options:
        if rule not in known:
            raise UnknownNameError("rule with options", rule, known)


def splits_of(pair: Pair, discover: int, choose: int, test: int, seed: int) -> Splits:
    """Disjoint questions of the pair's own task; another seed splits them anew."""
    if pair.default_task is None:
        raise UsageError(f"pair {pair.name!r} has no task of its own")
    return load_task(pair.default_task, max(1024, discover + choose + test)).split(discover, choose, test, seed)


class Problem:
    """One pair at one seed: its splits, and the two models without any graft."""

    def __init__(self, pair: Pair, splits: Splits, batch_size: int = 64) -> None:
        self.pair, self.splits, self.batch_size = pair, splits, batch_size
        self.baselines: dict[str, Evaluation] = {}

    def baseline(self, role: str) -> Evaluation:
        """Source or target on ``test``, once."""
        if role not in self.baselines:
            model = self.pair.source if role == "source" else self.pair.target
            self.baselines[role] = evaluate(model, self.splits.test, batch_size=self.batch_size)
        return self.baselines[role]

    def measure(self, rule: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """One row: how the rule ranks the planted modules, and what its graft recovers."""
        entry, planted = get_rule(rule), set(self.pair.planted)
        split = self.splits.choose if entry.splits[0] == "choose" else self.splits.discover
        # a rule that is learned for one K is told the one that it is judged at
        more = {"k": len(planted)} if entry.takes("k") else {}
        started = time.perf_counter()
        ranking = rank_modules(self.pair, split, rule, KINDS, seed=seed, **{**more, **options})
        seconds = time.perf_counter() - started
        names = [str(m) for m in ranking.module]
        is_planted = np.array([m in planted for m in names])
        top = list(ranking.module[: len(planted)])
        # of a rule that fits strengths, with those
        strengths = list(ranking.strength[: len(planted)]) if "strength" in ranking else 1.0
        with Graft(top, strengths).applied(self.pair):
            after = evaluate(self.pair.target, self.splits.test, batch_size=self.batch_size)
        outcome = compare(self.baseline("target"), self.baseline("source"), after, resamples=1000)
        low, high = outcome.recovery_interval or (None, None)
        change = outcome.log_probability
        return {
            "rule": rule,
            "seed": seed,
            "modules": len(names),
            "planted": len(planted),
            "auroc": auroc(ranking.score, is_planted),
            "average_precision": average_precision(ranking.score, is_planted),
            "precision": precision_at(ranking.score, is_planted),
            "recovery": outcome.recovery,
            "recovery_low": None if low is None else float(low),
            "recovery_high": None if high is None else float(high),
            "target_accuracy": outcome.target_accuracy,
            "source_accuracy": outcome.source_accuracy,
            "after_accuracy": outcome.after_accuracy,
            "log_probability_change": None if change is None else change.change,
            "n": outcome.n,
            "seconds": round(seconds, 2),
            "top": [str(m) for m in top],
        }


def bench_planted(
    pairs: Sequence[str] | None = None,
    rules: Sequence[str] | None = None,
    *,
    seeds: int = 3,
    discover: int = 64,
    choose: int = 64,
    test: int = 128,
    batch_size: int = 64,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Every rule on every planted pair and seed.

    Args:
        pairs: names of planted pairs (all). rules: names (all that are registered, yours included).
        seeds: how many splits of the questions; a rule's own randomness has the same seed.
        options: rule → its options.

    Returns:
        one row a pair, rule and seed: pair, drifted, rule, seed, modules, planted (counts), auroc, average_precision,
        precision (at the number planted), recovery with its interval (per cent; None where withheld), accuracies,
        log_probability_change (nats), n, seconds, top (the highest-ranked modules, as many as are planted).
    """
    import pandas as pd

    check_count("seeds", seeds)
    names = planted_pairs() if pairs is None else list(pairs)
    wanted = default_rules() if rules is None else list(rules)
    given = options or {}
    check_names(names, wanted, given)
    rows = []
    for name in names:
        pair = load_pair(name)
        for seed in range(seeds):
            problem = Problem(pair, splits_of(pair, discover, choose, test, seed), batch_size)
            for rule in track(wanted, f"{name}, seed {seed}", progress):
                found = problem.measure(rule, seed, given.get(rule, {}))
                rows.append({"pair": name, "drifted": is_drifted(name), **found})
    return pd.DataFrame(rows)


def summary_of(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a rule, best first by mean AUROC on drifted pairs: means over pairs of means over seeds.

    ``stability``: mean over pairs of the mean Jaccard index of two seeds' top sets (None with one seed); ``worst`` is
    the lowest pair's AUROC. A Recovery that is withheld counts in no mean; ``withheld`` says how many are.
    """
    import pandas as pd

    found = []
    for rule, mine in rows.groupby("rule", sort=False):
        row: dict[str, Any] = {"rule": rule, "needs": get_rule(str(rule)).needs if rule in RULES else ""}
        for kind, drifted in (("drifted", True), ("clean", False)):
            part = mine[mine.drifted == drifted]
            by_pair = part.groupby("pair")
            row[f"{kind}_pairs"] = len(by_pair)
            if not len(part):
                continue
            row[f"{kind}_auroc"] = by_pair.auroc.mean().mean()
            row[f"{kind}_worst"] = by_pair.auroc.mean().min()
            for name in ("average_precision", "precision", "recovery"):
                row[f"{kind}_{name}"] = by_pair[name].mean().mean()
            row[f"{kind}_withheld"] = int(part.recovery.isna().sum())
        overlaps = [_overlap(list(part.top)) for _, part in mine.groupby("pair") if len(part) > 1]
        row["stability"] = float(np.mean(overlaps)) if overlaps else None
        row["seeds"] = int(mine.groupby("pair").seed.nunique().min())
        row["seconds"] = mine.seconds.median()
        found.append(row)
    order = "drifted_auroc" if any("drifted_auroc" in r for r in found) else "clean_auroc"
    return pd.DataFrame(found).sort_values(order, ascending=False, kind="stable").reset_index(drop=True)


def _overlap(sets: list[Sequence[str]]) -> float:
    """Mean Jaccard index of all pairs of sets."""
    values = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in combinations(sets, 2)]
    return float(np.mean(values))
