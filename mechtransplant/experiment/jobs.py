"""What a run asks to be evaluated: a cell, and what its row is called besides."""

from __future__ import annotations

from dataclasses import dataclass

from mechtransplant.experiment.evaluator import Body, Cell
from mechtransplant.tasks import Task


@dataclass(frozen=True)
class Job:
    """One evaluation of a graft.

    ``strengths`` are the modules' own, which ``strength`` multiplies (() for 1); ``set`` numbers random sets and
    orders, and ``depth`` says how their depth was matched.
    """

    role: str
    rule: str
    modules: tuple[str, ...]
    strength: float
    strengths: tuple[float, ...] = ()
    body: Body = "graft"
    set: str = ""
    depth: str = ""

    def cell(self, split: Task) -> Cell:
        """The cell on a split; of a random set the verdicts are enough."""
        whole = self.role != "random"
        return Cell(str(split.role), self.role, self.modules, self.strength, self.body, whole, self.strengths)
