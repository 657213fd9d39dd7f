"""What engines have in common: jobs, workers, and how a process makes a worker."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mechtransplant.errors import UsageError, one_line

#: whatever JSON holds
Job = dict[str, Any]
Worker = Callable[[Job], dict[str, Any]]
#: called in the engine's own process with a job's number and its result, as soon as it is there
Done = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How a process makes a worker: ``function`` ("package.module:name") of ``arguments``, which JSON holds.

    ``shipped`` is one argument more, of any kind and size, for engines whose workers may be on other machines.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    shipped: Any = None

    def make(self) -> Worker:
        """The worker, in this process."""
        module, _, name = self.function.partition(":")
        more = {} if self.shipped is None else {"shipped": self.shipped}
        made: Worker = getattr(importlib.import_module(module), name)(**self.arguments, **more)
        return made


class WorkerError(RuntimeError):
    """A job failed in a worker's process; the message has what was raised there, and where."""


#: how often a job is tried whose process dies, and one that raises an error which no user has made
TRIES, ATTEMPTS = 3, 2


@dataclass(frozen=True)
class Try:
    """A job's number, and how often its process has died, and it has failed, so far."""

    number: int
    deaths: int = 0
    failures: int = 0


def answer_to(question: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a worker's process says: what the question gives, or in words why there is no answer."""
    try:
        return question()
    except UsageError as error:
        return {"usage": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a worker's process; raises what was raised there."""
    if "usage" in answer:
        raise UsageError(answer["usage"])
    if "error" in answer:
        raise WorkerError(f"{answer['error']}\n{answer['traceback']}")
    return answer


def again(error: WorkerError) -> str:
    """That a job which has failed is tried again."""
    return f"a job failed ({one_line(error)}) and is tried again in another process"


def died(tries: int, how: object) -> WorkerError:
    """The error of a job that ends every process that takes it up."""
    return WorkerError(f"the worker's process died {tries} times on one job ({how})")


class Engine(Protocol):
    """Runs jobs; every job is done once, in an order that is the engine's own."""

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do the jobs. An error of a job ends them all, once ``done`` has had every result that was there."""
        ...

    def close(self) -> None:
        """Let go of what it holds; it may be used again."""
        ...
