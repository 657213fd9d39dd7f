"""Workloads: generated skills, JSONL files, scorers and splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechtransplant.errors import TaskError, UnknownNameError
from mechtransplant.tasks.files import load_jsonl
from mechtransplant.tasks.generated import GENERATED
from mechtransplant.tasks.scorers import SCORERS, get_scorer
from mechtransplant.tasks.task import Example, PromptFormat, Role, Splits, Task

__all__ = [
    "SCORERS",
    "Example",
    "PromptFormat",
    "Role",
    "Splits",
    "Task",
    "get_scorer",
    "list_tasks",
    "load_jsonl",
    "load_task",
    "register_task",
]

_REGISTERED: dict[str, tuple[Callable[[str, int, int], Task], str]] = dict(GENERATED)

#: how many questions are generated where nobody says
QUESTIONS = 1024

Builder = Callable[[int, int], Task]


def register_task(name: str, description: str = "") -> Callable[[Builder], Builder]:
    """Decorator: make a function of (n, seed) that returns a Task available to :func:`load_task` under ``name``."""

    def add(build: Builder) -> Builder:
        if name in _REGISTERED:
            raise TaskError(f"a task named {name!r} exists already: choose another name")
        doc = (build.__doc__ or "").strip().splitlines() or [""]
        _REGISTERED[name] = (lambda _, n, seed: build(n, seed), description or doc[0])
        return build

    return add


def list_tasks() -> dict[str, str]:
    """Every named task with one line of description; a path to a JSONL file is a task as well."""
    return {name: description for name, (_, description) in _REGISTERED.items()}


def load_task(name: str | Path, n: int = QUESTIONS, seed: int = 0, **options: Any) -> Task:
    """A task by name, or from a JSONL file by path.

    Args:
        name: a name from :func:`list_tasks`, or the path of a ``.jsonl`` file.
        n: how many questions to generate (named tasks; a small skill may hold fewer distinct ones).
        seed: the generator's seed (named tasks).
        options: for files, see :func:`mechtransplant.tasks.files.load_jsonl`.

    Raises:
        UnknownNameError: no such task and no such file. TaskError: a file that cannot be used.
    """
    text = str(name)
    if text in _REGISTERED:
        if options:
            got = ", ".join(options)
            raise TaskError(f"task {text!r} takes n and seed only, got {got}: those options are for JSONL files")
        return _REGISTERED[text][0](text, n, seed)
    if isinstance(name, Path) or text.endswith((".jsonl", ".json")) or "/" in text or Path(text).is_file():
        if (n, seed) != (QUESTIONS, 0):
            raise TaskError(
                f"n and seed are of tasks that are generated, and {text} is a file: leave them out, and say in the "
                "split how many questions are used"
            )
        return load_jsonl(name, **options)
    raise UnknownNameError("task", text, _REGISTERED, "Or give the path of a JSONL file.")
