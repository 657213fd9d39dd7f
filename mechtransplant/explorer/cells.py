"""What a finished run measured, looked up by rule, K and strength, or by the very modules of a set."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.experiment.config import read_config
from mechtransplant.experiment.drawing import kind_of
from mechtransplant.experiment.evaluator import bools
from mechtransplant.experiment.rankings import learned_rankings, read_ranking
from mechtransplant.significance import paired_difference_interval, wilson_interval

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.evaluation import Evaluation

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """A set's accuracy on one split: a share, its 95 % interval, and Recovery in per cent (None: withheld)."""

    accuracy: float
    low: float
    high: float
    recovery: float | None


class MeasuredRun:
    """A finished run's folder; raises UsageError for any other."""

    def __init__(self, folder: str | Path) -> None:
        import pandas as pd

        self.folder = Path(folder)
        if not self.folder.is_dir() or kind_of(self.folder) != "run":
            raise UsageError(f"{folder} holds no finished run: give a folder that mechtransplant run wrote")
        lacking = [name for name in ("results.parquet", "cells.jsonl") if not (self.folder / name).exists()]
        if lacking:
            raise UsageError(f"{folder} lacks {' and '.join(lacking)}: give the run's whole folder")
        self.config = read_config(self.folder / "config.yaml")
        self.results = pd.read_parquet(self.folder / "results.parquet")
        self.budgets = sorted(map(int, self.results.budget.unique()))
        self.rules = list(self.config.rules)
        plane = self.folder / "plane.csv"
        self.plane = pd.read_csv(plane) if plane.exists() else None

    def ranking(self, rule: str, k: int) -> pd.DataFrame:
        """All modules by a rule, best first; by a rule that is learned for one K, as it is for that K."""
        return read_ranking(self.folder, self.config, rule, k)

    def is_ranked(self, rule: str, k: int) -> bool:
        """Whether the run has a rule's ranking for that K: one that is learned for one K has it for the run's own."""
        learned = learned_rankings(self.folder, rule)
        return k in learned or not learned

    def counts(self, rule: str) -> list[int]:
        """Which K a rule was measured at."""
        grafts = self.results[(self.results.role == "graft") & (self.results.rule == rule)]
        return sorted(map(int, grafts.k.unique()))

    def strengths(self, rule: str, k: int) -> list[float]:
        """Which strengths a rule was measured at with K modules."""
        grafts = self.results[(self.results.role == "graft") & (self.results.rule == rule)]
        return sorted(map(float, grafts[grafts.k == k].strength.unique()))

    def accuracy(self, role: str, split: str, budget: int) -> float | None:
        """Of the source or the target as it is; None where it was not measured."""
        rows = self.results
        rows = rows[(rows.role == role) & (rows.split == split) & (rows.budget == budget)]
        return float(rows.accuracy.iloc[0]) if len(rows) else None

    def of_set(
        self, modules: frozenset[str], strength: float, split: str, budget: int, fitted: bool = False
    ) -> Measured | None:
        """A set's accuracy, whatever it was measured for; None where this run did not measure it.

        ``fitted``: with the strengths that a rule fitted to it, which ``strength`` multiplies.
        """
        correct = self._sets.get((split, modules, float(strength), budget, fitted))
        if correct is None:
            return None
        low, high = wilson_interval(int(correct.sum()), len(correct))
        return Measured(float(correct.mean()), low, high, self._recovery(correct, budget) if split == "test" else None)

    def random(self, rule: str, k: int, strength: float, budget: int) -> pd.Series:
        """Accuracies on ``test`` of the random sets that a rule's reported graft is compared with; mostly of one K."""
        rows = self.results
        rows = rows[(rows.role == "random") & (rows["rule"] == rule) & (rows.k == k) & (rows.split == "test")]
        rows = rows[rows["set"].str.startswith("set") & (rows.strength == strength) & (rows.budget == budget)]
        return rows.accuracy

    def harm(self, rule: str, k: int, strength: float) -> dict[str, Any] | None:
        """What a rule's graft costs elsewhere, a row of ``plane.csv``; None where it was not measured."""
        if self.plane is None:
            return None
        everything = k == len(self.ranking(rule, k))
        mine = (self.plane.role == "all") if everything else (self.plane.role == "graft") & (self.plane["rule"] == rule)
        rows = self.plane[mine & (self.plane.k == k) & (self.plane.strength == strength)]
        return {str(key): value for key, value in rows.iloc[0].items()} if len(rows) else None

    def measure(
        self,
        modules: Iterable[str],
        strength: float = 1.0,
        split: str = "choose",
        strengths: Iterable[float] = (),
    ) -> dict[int, Evaluation]:
        """Measure a set as the run would, and keep nothing: token budget → evaluation. Loads both models.

        ``strengths``: the modules' own, which ``strength`` multiplies.
        """
        from mechtransplant.experiment.evaluator import Cell, Evaluator, unpacked_budgets
        from mechtransplant.experiment.setup import Setup

        setup = Setup(self.config)
        noted = json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))["weights"]
        if noted["source"] != setup.fingerprints["source"] and noted["source"] == setup.fingerprints["target"]:
            # the run found that the named target was the better one
            setup.turn()
        if any(noted[role] != setup.fingerprints[role] for role in ("source", "target")):
            raise UsageError("the models' weights are not those of the run any more: its numbers and new ones differ")
        if setup.gating is not None and (self.folder / "gate.json").exists():
            setup.gating.settle(self.folder)
        evaluator = Evaluator(setup)
        if split not in evaluator.splits:
            raise UnknownNameError("split", split, evaluator.splits)
        cell = Cell(split, "graft", tuple(modules), strength, strengths=tuple(strengths))
        return unpacked_budgets(evaluator.splits[split], evaluator.compute(cell))

    def _recovery(self, correct: Bools, budget: int) -> float | None:
        """Of a set on ``test``, as ``compare`` has it: None where the interval of the gap covers 0."""
        target, source = self._alone.get(("target", budget)), self._alone.get(("source", budget))
        if target is None or source is None:
            return None
        low, high = paired_difference_interval(target, source)
        if low <= 0 <= high:
            return None
        return float(100 * (correct.mean() - target.mean()) / (source.mean() - target.mean()))

    @cached_property
    def _alone(self) -> dict[tuple[str, int], Bools]:
        """(source or target, budget) → verdicts on ``test``."""
        rows = self.results[self.results.split.eq("test") & self.results.role.isin(["source", "target"])]
        return {(str(r["role"]), int(r["budget"])): bools(r["correct"]) for r in rows.to_dict("records")}

    @cached_property
    def _sets(self) -> dict[tuple[str, frozenset[str], float, int, bool], Bools]:
        """(split, modules, strength, budget, with strengths of their own) → verdicts."""
        known = {}
        for line in (self.folder / "cells.jsonl").read_text(encoding="utf-8").splitlines():
            cell = json.loads(line)
            # of the target under a graft of the source
            if "budgets" not in cell or cell.get("role") in ("source", "reverse", "self"):
                continue
            # of the same modules, but numbers at random
            if "operator" in cell:
                continue
            fitted = "strengths" in cell
            # strengths that were dealt, or those of another task
            if fitted and cell["role"] != "graft":
                continue
            for budget, found in cell["budgets"].items():
                key = (cell["split"], frozenset(cell["modules"]), float(cell["strength"]), int(budget), fitted)
                known[key] = bools(found["correct"])
        return known
