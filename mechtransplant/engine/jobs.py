"""What engines have in common: jobs, workers, and how a process makes a worker."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: whatever JSON holds
Job = dict[str, Any]
Worker = Callable[[Job], dict[str, Any]]
#: called in the engine's own process with a job's number and its result, as soon as it is there
Done = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How a process makes a worker: ``function`` ("package.module:name") of ``arguments``, which JSON holds."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Worker:
        """The worker, in this process."""
        module, _, name = self.function.partition(":")
        made: Worker = getattr(importlib.import_module(module), name)(**self.arguments)
        return made


class Engine(Protocol):
    """Runs jobs; every job is done once, in an order that is the engine's own."""

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do the jobs. An error of a job ends them all, once ``done`` has had every result that was there."""
        ...

    def close(self) -> None:
        """Let go of what it holds; it may be used again."""
        ...
