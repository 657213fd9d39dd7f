"""What an export is given: the right things, and of one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import Outcome
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair
from mechtransplant.tasks import Task


def check_given(pair: Any, graft: Any, folder: Any, outcome: Any, task: Any = None) -> None:
    """Raise UsageError for arguments of other types, an outcome of other questions, and a graft of nothing."""
    for name, value, kinds in (
        ("pair", pair, Pair),
        ("graft", graft, Graft),
        ("folder", folder, (str, Path)),
        ("outcome", outcome, (Outcome, type(None))),
        ("task", task, (Task, str, type(None))),
    ):
        if not isinstance(value, kinds):
            wanted = kinds[0] if isinstance(kinds, tuple) else kinds
            raise UsageError(f"{name} is a {wanted.__name__}, got {type(value).__name__}: pass the {name} itself")
    if not any(graft.strengths):
        raise UsageError("this graft moves nothing (no modules, or strength 0): there is nothing to export")
    if isinstance(task, Task) and outcome is not None and outcome.questions not in ("", task.fingerprint):
        raise UsageError(
            f"the outcome is of other questions ({outcome.task}, {outcome.role}) than the task given ({task.name}, "
            f"{task.role}): leave task out, or measure on it"
        )
