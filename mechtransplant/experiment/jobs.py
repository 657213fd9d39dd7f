"""What a run asks to be evaluated: a cell, and what its row is called besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechtransplant.experiment.evaluator import Body, Cell
from mechtransplant.tasks import Task

#: the role of a graft of the same modules, of whose numbers as many change, drawn at random
WEIGHTS = "random_weights"


@dataclass(frozen=True)
class Job:
    """One evaluation of a graft.

    ``strengths`` are the modules' own, which ``strength`` multiplies (() for 1); ``set`` numbers random sets and
    orders, and ``depth`` says how their depth was matched; ``operator`` is another one than the config's.
    """

    role: str
    rule: str
    modules: tuple[str, ...]
    strength: float
    strengths: tuple[float, ...] = ()
    body: Body = "graft"
    set: str = ""
    depth: str = ""
    operator: dict[str, Any] | None = None

    def cell(self, split: Task) -> Cell:
        """The cell on a split; of a random set the verdicts are enough."""
        whole = self.role not in ("random", WEIGHTS)
        return Cell(
            str(split.role), self.role, self.modules, self.strength, self.body, whole, self.strengths, self.operator
        )
