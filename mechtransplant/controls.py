"""What chance would give: random sets of modules, and random orders of all modules, matched to the chosen ones.

A matched set has exactly as many modules of every size class (attention or feed-forward, number of parameters) as the
chosen set, and therefore the same kind counts and parameter count. Depth is matched by thirds of the layers; where that
leaves too few different sets (a model of four layers), by halves, else not at all. The level that was used is part of
the result. A matched order has such a set at every K. With ``match="projection"`` linear layers are exchanged for the
same projection of other layers only: a rule that prefers V to K, of the same size, then gains nothing by that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from mechtransplant.errors import UsageError, check_count, check_seed
from mechtransplant.evaluation import Evaluation, Outcome, compare, evaluate
from mechtransplant.evaluation.outcome import check_questions
from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import parse_address
from mechtransplant.pair import make_pair
from mechtransplant.progress import track
from mechtransplant.ranking import plain_modules
from mechtransplant.ranking.matched import Class, Match, classes, exchanged, kinds_among, matched_order, shares_kv
from mechtransplant.selection import remembering, selections_of
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import LanguageModel, Pair

#: how many different sets a depth level must allow for it to be a control
ENOUGH_SETS = 1000
#: parts of the depth within which a set keeps its counts, strictest first
DEPTH_LEVELS = {3: "thirds", 2: "halves", 1: "not matched"}


@dataclass(frozen=True)
class RandomSets:
    """Random control sets; ``depth`` says how depth was matched: "thirds", "halves" or "not matched"."""

    sets: list[tuple[str, ...]]
    depth: str


@dataclass(frozen=True)
class RandomOrders:
    """Random orders of all candidates, each with a matched set among its first K for every K; ``depth`` as above."""

    orders: list[tuple[str, ...]]
    depth: str


def random_matched(
    pair: Pair, modules: Sequence[str], n: int, seed: int = 0, kv: KV = "never", match: Match = "size"
) -> RandomSets:
    """``n`` different random sets of modules, each matched to ``modules``; fewer when fewer exist.

    The chosen set itself is never among them. A set of all candidates has no control: the list is then empty. ``kv``:
    the grafts' policy; where K and V move with heads, a set has as many heads in as many K/V groups. ``match``:
    "projection" gives a set as many of each projection (q, k, v, o, gate, …) too, where modules are linear layers.
    """
    check_count("n", n, least=0)
    check_seed(seed)
    chosen = list(dict.fromkeys(map(str, modules)))
    if not chosen:
        raise UsageError("no modules were named: give the set that random sets are matched to")
    candidates = pair.modules(kinds_among(pair, chosen))
    by_group = shares_kv(pair, chosen, kv)
    parts, group = _strictest(pair, candidates, chosen, by_group, match)
    if by_group:
        return RandomSets(drawn_by_group(pair, group, chosen, n, seed), DEPTH_LEVELS[parts])
    pools = _members(group)
    wanted = Counter(group[m] for m in chosen)
    possible = possible_sets(group, chosen)
    rng = np.random.default_rng(seed)
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for _ in range(50 * n):
        if len(found) >= min(n, possible - 1):
            break
        drawn = [str(m) for g, c in sorted(wanted.items(), key=str) for m in rng.choice(pools[g], c, replace=False)]
        if frozenset(drawn) != frozenset(chosen):
            found.setdefault(frozenset(drawn), tuple(drawn))
    return RandomSets(list(found.values()), DEPTH_LEVELS[parts])


def deal(
    pair: Pair,
    modules: Sequence[str],
    strengths: Sequence[float],
    sets: Sequence[Sequence[str]],
    match: Match = "size",
) -> list[tuple[float, ...]]:
    """Strengths for sets that are matched to ``modules``: theirs, each to a module of the same class, in order.

    Raises UsageError for a set that is not matched, in the way that ``match`` says.
    """
    group = _strictest(pair, pair.modules(kinds_among(pair, modules)), list(map(str, modules)), match=match)[1]
    hands: dict[Class, list[float]] = {}
    for module, strength in zip(modules, strengths, strict=True):
        hands.setdefault(group[str(module)], []).append(strength)
    wanted, found = Counter({its: len(hand) for its, hand in hands.items()}), []
    for drawn in sets:
        if Counter(group[str(m)] for m in drawn) != wanted:
            raise UsageError("strengths are dealt to a set that is matched to theirs: draw it by random_matched")
        decks = {its: iter(hand) for its, hand in hands.items()}
        found.append(tuple(next(decks[group[str(m)]]) for m in drawn))
    return found


def random_orders(
    pair: Pair, order: Sequence[str], n: int, k: int, seed: int = 0, kv: KV = "never", match: Match = "size"
) -> RandomOrders:
    """``n`` random orders matched to a ranking of all candidates; depth as strictly as random sets of ``k`` would be.

    Drawn independently: at a small K two of them may begin alike, and one may begin as the ranking does, which a
    permutation p-value allows for. ``kv`` and ``match``: as in :func:`random_matched`.
    """
    check_count("n", n, least=0)
    check_seed(seed)
    names = list(map(str, order))
    candidates = pair.modules(kinds_among(pair, names))
    if sorted(names) != sorted(candidates):
        raise UsageError(f"an order of all {len(candidates)} candidates was expected, got {len(names)} modules")
    check_count("k", k, most=len(names))
    by_group = shares_kv(pair, names, kv)
    parts, group = _strictest(pair, candidates, names[:k], by_group, match)
    rng = np.random.default_rng(seed)
    if by_group:
        exchanges = [exchanged(pair, group, rng) for _ in range(n)]
        return RandomOrders([tuple(each[m] for m in names) for each in exchanges], DEPTH_LEVELS[parts])
    return RandomOrders([tuple(matched_order(group, names, rng)) for _ in range(n)], DEPTH_LEVELS[parts])


#: a control's role in words: "reverse" is the name of a task too
_SAID = {
    "bottom": "lowest-ranked",
    "all": "all candidates",
    "reverse": "source with the target's modules (reverse)",
    "self": "target with its own (self)",
    "unrelated": "ranked on another task (unrelated)",
}


@dataclass(frozen=True)
class ControlledOutcome:
    """A graft's outcome among its controls; ``table`` has one row a control.

    Columns: role (target, source, graft, random, bottom, all, reverse, unrelated, self), set (of random ones), k,
    accuracy with its 95 % interval low and high, log_probability (mean, nats). ``identical`` says whether the
    self-graft answered exactly as the target, to the bit.
    """

    outcome: Outcome
    table: pd.DataFrame
    identical: bool

    def __str__(self) -> str:
        rows = self.table[self.table.role.isin(list(_SAID))]
        said = ", ".join(
            f"{_SAID[role]} {accuracy:.1%}" for role, accuracy in zip(rows.role, rows.accuracy, strict=True)
        )
        return f"{self.outcome}\ncontrols: {said}; self-graft {'' if self.identical else 'NOT '}identical"


def graft_with_controls(
    pair: Pair,
    ranking: pd.DataFrame,
    k: int,
    task: Task,
    *,
    unrelated: pd.DataFrame | None = None,
    random_sets: int = 100,
    strength: float = 1.0,
    kv: KV = "never",
    match: Match = "size",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> ControlledOutcome:
    """Graft the K highest-ranked modules, and measure what every control does on the same questions.

    Random sets matched in kind, depth and parameters; the K lowest-ranked; every candidate; the target's K modules in
    the source (reverse); the target's own (self). ``mechtransplant run`` does the same for a whole curve.

    Args:
        ranking: as :func:`rank_modules` returns it. task: the ``test`` split.
        unrelated: a ranking by the same rule on another task, for that control.
        match: of random sets, as in :func:`random_matched`.

    Raises:
        UsageError: a K above the candidates, or questions that selected the modules.
    """
    import pandas as pd

    if "module" not in getattr(ranking, "columns", []):
        raise UsageError(f"expected a ranking, as rank_modules returns it, got {type(ranking).__name__}")
    check_count("k", k, most=len(ranking))
    check_count("random_sets", random_sets, least=0)
    plain_modules(ranking, "of this ranking", "graft_with_controls")
    order = list(ranking.module)
    # before a hundred evaluations, not after
    check_questions(task.name, task.role, task.keys, selections_of(order))
    own = make_pair(pair.target, pair.target, "self")
    bodies: list[tuple[str, str, Pair, list[str]]] = [
        ("graft", "", pair, order[:k]),
        ("bottom", "", pair, order[::-1][:k]),
        ("all", "", pair, order),
        ("reverse", "", pair.reversed(), order[:k]),
        ("self", "", own, order[:k]),
    ]
    if unrelated is not None:
        bodies.append(("unrelated", "", pair, list(unrelated.module[:k])))
    drawn = random_matched(pair, order[:k], random_sets, seed, kv, match)
    bodies += [("random", str(number), pair, list(modules)) for number, modules in enumerate(drawn.sets)]

    def measured(model: LanguageModel) -> Evaluation:
        return evaluate(model, task, batch_size=batch_size)

    found = [("target", "", 0, measured(pair.target)), ("source", "", 0, measured(pair.source))]
    for role, number, body, modules in track(bodies, "controls", progress):
        # controls are not picked from, so their names remember no ranking that would count them as tried
        named = modules if role == "graft" else list(remembering(modules, ()))
        with Graft(named, strength, kv=kv).applied(body):
            found.append((role, number, len(modules), measured(body.target)))
    by_role = {role: evaluation for role, _, _, evaluation in found if role != "random"}
    outcome = compare(
        by_role["target"],
        by_role["source"],
        by_role["graft"],
        seed=seed,
        controls=[e for role, _, _, e in found if role == "random"],
        graft=Graft(order[:k], strength, kv=kv),
        pair=pair,
    )
    rows = []
    for role, number, size, e in found:
        low, high = e.interval
        mean = None if e.log_probability is None else float(e.log_probability.mean())
        row = {"role": role, "set": number, "k": size, "accuracy": e.accuracy, "low": low, "high": high}
        rows.append({**row, "log_probability": mean})
    before, same = by_role["target"], by_role["self"]
    identical = bool((before.correct == same.correct).all())
    if before.log_probability is not None and same.log_probability is not None:
        identical &= bool((before.log_probability == same.log_probability).all())
    return ControlledOutcome(outcome, pd.DataFrame(rows), identical)


def _strictest(
    pair: Pair, candidates: Sequence[str], chosen: Sequence[str], by_group: bool = False, match: Match = "size"
) -> tuple[int, dict[str, Class]]:
    """The strictest depth level that leaves enough different sets, and every candidate's class at it."""
    for parts in DEPTH_LEVELS:
        group = classes(pair, candidates, parts, match)
        if parts == 1 or possible_sets(group, chosen, pair if by_group else None) >= ENOUGH_SETS:
            break
    return parts, group


def drawn_by_group(
    pair: Pair, group: dict[str, Class], chosen: Sequence[str], n: int, seed: int
) -> list[tuple[str, ...]]:
    """Sets with as many heads in as many K/V groups as the chosen one; fewer than ``n`` where fewer exist."""
    rng, possible = np.random.default_rng(seed), possible_sets(group, chosen, pair)
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for _ in range(50 * n):
        if len(found) >= min(n, possible - 1):
            break
        other = exchanged(pair, group, rng)
        drawn = tuple(other[m] for m in chosen)
        if frozenset(drawn) != frozenset(chosen):
            found.setdefault(frozenset(drawn), drawn)
    return list(found.values())


def _members(group: dict[str, Class]) -> dict[Class, list[str]]:
    pools: dict[Class, list[str]] = {}
    for module, its in group.items():
        pools.setdefault(its, []).append(module)
    return pools


def possible_sets(group: dict[str, Class], chosen: Sequence[str], pair: Pair | None = None) -> int:
    """How many sets have the make-up of the chosen one, itself included; of a pair, also its heads' K/V groups."""
    pools, ways = _members(group), 1
    for its, count in Counter(group[m] for m in chosen).items():
        heads = [parse_address(m) for m in chosen if group[m] == its]
        if pair is None or heads[0].head is None:
            ways *= comb(len(pools[its]), count)
            continue
        size = pair.layout.group_size
        touched = Counter((h.layer, pair.layout.group(h.head)) for h in heads if h.head is not None)
        left = len(pools[its]) // size
        for inside, groups in Counter(touched.values()).items():
            ways *= comb(left, groups) * comb(size, inside) ** groups
            left -= groups
    return ways
