"""What a finished run measured, looked up by rule, K and strength, or by the very modules of a set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.experiment.config import read_config
from mechtransplant.experiment.drawing import kind_of
from mechtransplant.significance import wilson_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measured:
    """A set's accuracy on one split: a share, its 95 % interval, and Recovery in per cent (None: source ≤ target)."""

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
        self.config = read_config(self.folder / "config.yaml")
        self.results = pd.read_parquet(self.folder / "results.parquet")
        self.budgets = sorted(map(int, self.results.budget.unique()))
        self.rules = list(self.config.rules)
        plane = self.folder / "plane.csv"
        self.plane = pd.read_csv(plane) if plane.exists() else None

    def ranking(self, rule: str, k: int | None = None) -> pd.DataFrame:
        """All modules by a rule, best first; by a rule that is learned for one K, as it is for that K."""
        import pandas as pd

        first = rule == self.rules[0]
        whole = self.folder / ("ranking.csv" if first else f"rankings/{rule}.csv")
        own = self.folder / "rankings" / f"{rule}-{k}.csv"
        return pd.read_csv(own if own.exists() else whole)

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

    def of_set(self, modules: frozenset[str], strength: float, split: str, budget: int) -> Measured | None:
        """A set's accuracy, whatever it was measured for; None where this run did not measure it."""
        correct = self._sets.get((split, modules, float(strength), budget))
        if correct is None:
            return None
        right, n = correct.count("1"), len(correct)
        low, high = wilson_interval(right, n)
        return Measured(right / n, low, high, self._recovery(right / n, split, budget))

    def random(self, rule: str, k: int, strength: float, budget: int) -> pd.Series:
        """Accuracies on ``test`` of the random sets beside a rule's graft."""
        rows = self.results
        rows = rows[(rows.role == "random") & (rows.rule == rule) & (rows.k == k) & (rows.split == "test")]
        return rows[(rows.strength == strength) & (rows.budget == budget)].accuracy

    def harm(self, rule: str, k: int, strength: float) -> dict[str, Any] | None:
        """What a rule's graft costs elsewhere, a row of ``plane.csv``; None where it was not measured."""
        if self.plane is None:
            return None
        rows = self.plane[(self.plane.role == "graft") & (self.plane.rule == rule) & (self.plane.k == k)]
        rows = rows[rows.strength == strength]
        return {str(key): value for key, value in rows.iloc[0].items()} if len(rows) else None

    def _recovery(self, accuracy: float, split: str, budget: int) -> float | None:
        target, source = (self.accuracy(role, split, budget) for role in ("target", "source"))
        if target is None or source is None or source <= target:
            return None
        return 100 * (accuracy - target) / (source - target)

    @cached_property
    def _sets(self) -> dict[tuple[str, frozenset[str], float, int], str]:
        """(split, modules, strength, budget) → one character a question."""
        known = {}
        for line in (self.folder / "cells.jsonl").read_text(encoding="utf-8").splitlines():
            cell = json.loads(line)
            # of the target under a graft of the source
            if "budgets" not in cell or cell.get("role") in ("source", "reverse", "self"):
                continue
            for budget, found in cell["budgets"].items():
                key = (cell["split"], frozenset(cell["modules"]), float(cell["strength"]), int(budget))
                known[key] = found["correct"]
        return known
