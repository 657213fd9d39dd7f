"""The cells of the study heads against MLPs: grafts and ablations of sets, each beside its random sets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from mechtransplant.evaluation import Evaluation, evaluate
from mechtransplant.evaluation.forked import resuming
from mechtransplant.evaluation.outcome import check_comparable, check_unseen
from mechtransplant.evaluation.remembered import Memory, remembering
from mechtransplant.experiment.cells import CellStore
from mechtransplant.experiment.evaluator import packed, unpacked
from mechtransplant.experiment.heads_mlps_sets import ModuleSet, random_sets
from mechtransplant.grafting import Graft
from mechtransplant.modules import parse_address
from mechtransplant.pair import Pair
from mechtransplant.patching import Ablation, reference_activations
from mechtransplant.patching.ablation import Method
from mechtransplant.progress import track
from mechtransplant.significance import (
    SAME_NATS,
    adjust,
    bootstrap_indices,
    paired_difference_interval,
    percentile_interval,
    rank_among,
)
from mechtransplant.tasks import Splits

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.activations import ActivationCache
    from mechtransplant.experiment.heads_mlps import HeadsMlpsConfig


class Study:
    """The evaluations of one study, each a cell, and the rows that they make."""

    def __init__(self, config: HeadsMlpsConfig, pair: Pair, splits: Splits, store: CellStore) -> None:
        self.config, self.pair, self.splits, self.store = config, pair, splits, store
        self.weights = {"source": pair.source.fingerprint, "target": pair.target.fingerprint}
        self.linear = Graft(pair.modules("linear")).parameter_count(pair)
        self.questions = {split.role: split.fingerprint for split in (splits.discover, splits.test)}
        self.known: dict[tuple[str, tuple[str, ...], bool], Evaluation] = {}
        self.resampled = bootstrap_indices(len(splits.test), seed=config.seed)

    @cached_property
    def _target(self) -> tuple[Evaluation, Memory]:
        """The target on ``test``, and its passes: a graft of the last third leaves two thirds of the layers alone."""
        with remembering(self.pair.target) as memory:
            return evaluate(self.pair.target, self.splits.test, batch_size=self.config.batch_size), memory

    def base(self, role: str) -> Evaluation:
        """The source, or the target, as it is."""
        return self._cell(role, (), True)

    def table(self, sets: Sequence[ModuleSet], progress: bool) -> pd.DataFrame:
        """One row a set and intervention, with p-values adjusted over all different ones (Benjamini–Hochberg)."""
        import pandas as pd

        kinds = [("graft", "replace"), *(("ablation", method) for method in self.config.methods)]
        jobs = [(*kind, chosen) for kind in kinds for chosen in sets]
        table = pd.DataFrame([self._row(*job) for job in track(jobs, "sets", progress)])
        # an arm may be the same set at equal number and at equal parameters: that is one test
        test = ["intervention", "method", "depth", "members"]
        table["members"] = [" ".join(sorted(names.split())) for names in table.names]
        for p in ("p", "p_log_probability"):
            once = table.drop_duplicates(test).dropna(subset=[p])
            adjusted = pd.Series(
                adjust(once[p].to_numpy(), "bh") if len(once) else [], index=pd.MultiIndex.from_frame(once[test])
            )
            table[f"{p}_adjusted"] = [
                adjusted.get(key, np.nan) for key in table[test].itertuples(index=False, name=None)
            ]
        return table.drop(columns="members")

    def _row(self, intervention: str, method: str, chosen: ModuleSet) -> dict[str, Any]:
        what = "graft" if intervention == "graft" else method
        base = self.base("target" if intervention == "graft" else "source")
        after = self._cell(what, chosen.modules, True)
        seed = self.config.seed + len(chosen.modules)
        drawn = random_sets(self.pair, chosen, self.config.sets, seed, self.config.kv)
        others = [self._cell(what, modules, False) for modules in drawn.sets]
        check_comparable([base, after, *others])
        check_unseen(after)
        low, high = paired_difference_interval(base.correct, after.correct)
        row: dict[str, Any] = {
            "intervention": intervention,
            "method": method,
            "depth": chosen.depth,
            "arm": chosen.arm,
            "match": chosen.match,
            "count": chosen.count,
            "modules": len(chosen.modules),
            "parameters": chosen.parameters,
            "share": chosen.parameters / self.linear,
            "near": chosen.near,
            "names": " ".join(chosen.modules),
            "n": len(after),
            "accuracy": after.accuracy,
            "accuracy_change": after.accuracy - base.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            **self._log_probability_change(base, after),
            "random_sets": len(others),
            "random_depth": drawn.depth if others else "",
        }
        # a graft beats a random set by gaining more, an ablation by losing more
        sign = 1 if intervention == "graft" else -1
        accuracies = [(e.accuracy, e.accuracy - base.accuracy) for e in (after, *others)]
        row |= _among(sign, accuracies, "random_", "beaten", "p")
        # of a random set the mean alone is kept
        means = [e.log_probability.mean() for e in (after, *others) if e.log_probability is not None]
        if base.log_probability is None or len(means) < 1 + len(others) or not np.isfinite(means).all():
            means = []
        levels = [(float(m), float(m - base.log_probability.mean())) for m in means]  # type: ignore[union-attr]
        row |= _among(sign, levels, "random_log_probability_", "log_probability_beaten", "p_log_probability", SAME_NATS)
        return row

    def _log_probability_change(self, base: Evaluation, after: Evaluation) -> dict[str, float | None]:
        ends = [f"log_probability_{end}" for end in ("change", "low", "high")]
        if base.log_probability is None or after.log_probability is None:
            return dict.fromkeys(ends)
        gain = after.log_probability - base.log_probability
        interval = percentile_interval(gain[self.resampled].mean(1))
        return dict(zip(ends, (float(gain.mean()), *interval), strict=True))

    @cached_property
    def _reference(self) -> ActivationCache:
        modules = [*self.pair.modules("head"), *self.pair.modules("mlp")]
        return reference_activations(self.pair.source, self.splits.discover, modules, batch_size=self.config.batch_size)

    def _cell(self, what: str, modules: Sequence[str], whole: bool) -> Evaluation:
        """One evaluation on ``test``: of the "source", the "target", a "graft", or the source with an ablation.

        ``whole``: keep every question's log-probability; of a random set, whose mean is enough, the verdicts alone.
        """
        pair, test = self.pair, self.splits.test
        # sets of several arms and depths share cells
        key = (what, tuple(sorted(modules)), whole)
        if key in self.known:
            return self.known[key]
        content = {
            **self.weights,
            "test": self.questions["test"],
            "what": what,
            "modules": list(key[1]),
            "kv": self.config.kv if what == "graft" else None,
            "reference": self.questions["discover"] if what == "mean" else None,
            "batch_size": self.config.batch_size,
            "whole": whole,
        }

        def compute() -> dict[str, Any]:
            size = self.config.batch_size
            if what == "graft":
                # before the graft is in place
                memory, lowest = self._target[1], min(parse_address(m).layer for m in modules)
                with Graft(modules, kv=self.config.kv).applied(pair), resuming(pair.target, memory, lowest):
                    found = evaluate(pair.target, test, batch_size=size)
            elif what in get_args(Method):
                method: Any = what
                given = self._reference if what == "mean" else None
                with Ablation(modules, method, given).applied(pair.source):
                    found = evaluate(pair.source, test, batch_size=size)
            else:
                found = evaluate(pair.source, test, batch_size=size) if what == "source" else self._target[0]
            return {"what": what, "modules": list(map(str, modules)), "budget": found.budget, **packed(found, whole)}

        stored = self.store.get(content, compute)
        self.known[key] = unpacked(test, stored["budget"], stored)
        return self.known[key]


def _among(
    sign: int, values: Sequence[tuple[float, float]], ends: str, beaten: str, p: str, tolerance: float = 0.0
) -> dict[str, Any]:
    """Where the first of some (level, change) stands among the others; None everywhere without others."""
    names = (*(f"{ends}{end}" for end in ("median", "low", "high")), beaten, p)
    if len(values) < 2:
        return dict.fromkeys(names)
    changes = [change for _, change in values[1:]]
    # levels, not changes, are compared: rounding of the difference must not break a tie
    rank = rank_among(sign * values[0][0], [sign * level for level, _ in values[1:]], tolerance)
    found = (float(np.median(changes)), min(changes), max(changes), rank.beaten, rank.p_value)
    return dict(zip(names, found, strict=True))
