"""What acts on a model while it is evaluated, and what batches must then respect.

A patch or a conditional graft can act on the prompt alone, while decoding alone, or for some questions alone. An
evaluation that knows keeps the prompt and the answer in forward passes of their own (as generation does anyway), gives
every question to passes of its kind, and shares no prefix, whose pass would be taken for the prompt.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from mechtransplant.errors import UsageError
from mechtransplant.tasks import Example

Predicate = Callable[[Example], bool]


@dataclass(eq=False)
class Intervention:
    """One thing that acts on a model; ``accepted`` is set while questions that ``accepts`` was asked about run.

    ``phased``: whether it tells the prompt from the answer. ``follows``: a model that runs beside this one, and on
    which something may act too. ``heads``: (layer, head) of the heads that it changes, and ``exchanges`` of those whose
    writes it exchanges where the block's output comes out, so that nothing inside may change them.
    """

    phased: bool = False
    accepts: Predicate | None = None
    accepted: bool | None = None
    follows: Any = None
    heads: frozenset[tuple[int, int]] = frozenset()
    exchanges: frozenset[tuple[int, int]] = frozenset()

    def wanted(self) -> bool:
        """Whether it should act now; raises UsageError for a forward pass whose question is not known."""
        if self.accepts is None:
            return True
        if self.accepted is None:
            raise UsageError(
                "this graft asks a predicate about every question, and a direct forward pass has none: use evaluate or "
                "generate with a task, or leave out accepts="
            )
        return self.accepted


_ON: weakref.WeakKeyDictionary[Any, list[Intervention]] = weakref.WeakKeyDictionary()


def interventions_on(hf: Any) -> list[Intervention]:
    """What acts on a Hugging Face model now, oldest first."""
    return _ON.setdefault(hf, [])


def _all_on(hf: Any) -> list[Intervention]:
    """What acts on a model or on those that run beside it."""
    found, models = [], [hf]
    for model in models:
        for intervention in interventions_on(model):
            found.append(intervention)
            if intervention.follows is not None and all(intervention.follows is not m for m in models):
                models.append(intervention.follows)
    return found


def is_phased(hf: Any) -> bool:
    """Whether anything that acts on the model tells the prompt from the answer."""
    return any(i.phased for i in _all_on(hf))


def check_phases(keywords: dict[str, Any]) -> None:
    """Raise UsageError for a pass without a key-value cache: every step of a text would be taken for the prompt."""
    if keywords.get("use_cache") is False:
        raise UsageError(
            "use_cache=False: without a key-value cache the prompt cannot be told from what is written after it; leave "
            "it out, or patch positions='all'"
        )


def by_acceptance(hf: Any, examples: Sequence[Example]) -> list[tuple[list[int], list[bool]]]:
    """Questions in groups for which every intervention gives one verdict: (row numbers, a verdict an intervention)."""
    asked = [i for i in _all_on(hf) if i.accepts is not None]
    for intervention in asked:
        # a predicate that reads with a model reads a batch at a time
        read = getattr(intervention.accepts, "read", None)
        if read is not None:
            read(examples)
    groups: dict[tuple[bool, ...], list[int]] = {}
    for row, example in enumerate(examples):
        groups.setdefault(tuple(bool(i.accepts(example)) for i in asked if i.accepts), []).append(row)
    return [(rows, list(verdicts)) for verdicts, rows in groups.items()]


@contextmanager
def accepting(hf: Any, verdicts: Sequence[bool]) -> Iterator[None]:
    """Forward passes in this block belong to questions with these verdicts."""
    asked = [i for i in _all_on(hf) if i.accepts is not None]
    for intervention, verdict in zip(asked, verdicts, strict=True):
        intervention.accepted = verdict
    try:
        yield
    finally:
        for intervention in asked:
            intervention.accepted = None


def all_closed(hf: Any) -> AbstractContextManager[None]:
    """A block whose forward passes belong to questions that nothing accepts: what asks about questions does not act."""
    return accepting(hf, [False] * sum(i.accepts is not None for i in _all_on(hf)))


def check_recordable(hf: Any) -> None:
    """Raise UsageError where activations cannot be read: a pass over prompt and answer at once has no phases."""
    if any(i.phased or i.accepts is not None for i in _all_on(hf)):
        raise UsageError(
            "activations are read in one pass over prompt and answer, which a graft or patch for some positions or "
            "questions alone does not allow: leave that block first"
        )
