"""The rows of ``results.parquet``: one an evaluation and token budget."""

from __future__ import annotations

from typing import Any

from mechtransplant.evaluation import Evaluation
from mechtransplant.experiment.evaluator import bits
from mechtransplant.tasks import Task


class Rows:
    """Rows in the order in which they were noted."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def note(
        self,
        split: Task,
        role: str,
        found: dict[int, Evaluation],
        k: int = 0,
        strength: float = 0.0,
        *,
        rule: str = "",
        set: str = "",
        depth_matched: str = "",
        digest: dict[int, str] | None = None,
        beside: dict[int, str] | None = None,
    ) -> None:
        """Add an evaluation's rows: ``set`` numbers random sets and orders; ``beside`` is the digest of what a
        self-graft must equal."""
        for budget, e in found.items():
            low, high = e.interval
            self.rows.append(
                {
                    "split": split.role,
                    "role": role,
                    "rule": rule,
                    "set": set,
                    "k": k,
                    "strength": strength,
                    "budget": budget,
                    "accuracy": e.accuracy,
                    "low": low,
                    "high": high,
                    "log_probability": None if e.log_probability is None else float(e.log_probability.mean()),
                    "logit_difference": None if e.logit_difference is None else float(e.logit_difference.mean()),
                    "n": len(e),
                    "depth_matched": depth_matched,
                    "method": e.method,
                    "answered": None if e.answered is None else float(e.answered.mean()),
                    "ended": None if e.ended is None else float(e.ended.mean()),
                    "correct": bits(e.correct),
                    "digest": (digest or {}).get(budget, ""),
                    "beside": (beside or {}).get(budget, ""),
                }
            )

    def where(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows with these values."""
        return [r for r in self.rows if all(r[key] == value for key, value in wanted.items())]
