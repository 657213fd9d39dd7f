"""Conditional grafts of a run: the gate that its target decides by, and the questions that it is closed for.

The gate is fitted on ``discover``, against neutral texts of another seed than those that harm is measured on and, where
the config names some, questions of other tasks that side effects do not ask. A cell whose questions are all let through
is the plain graft's: it has the same value and the same key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.experiment.config import GateSpec
from mechtransplant.grafting import Gate, fit_gate
from mechtransplant.side_effects import neutral_texts
from mechtransplant.tasks import Splits, Task, list_tasks, load_task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair


def shut_out(spec: GateSpec, own: Task, explore: Task | None = None) -> tuple[Task, ...]:
    """Questions of other tasks that a gate is fitted to be closed for.

    Raises UsageError for the run's own task, and for one that has no other questions.
    """
    known = {*own.keys, *(() if explore is None else explore.keys)}
    found = []
    for name in spec.tasks:
        if name not in list_tasks():
            raise UnknownNameError("task", name, list_tasks())
        task = load_task(name)
        first_of = {key: i for i, key in reversed(list(enumerate(task.keys))) if key not in known}
        if name == own.name or len(first_of) < 2:
            raise UsageError(
                f"gate.tasks: {name!r} is the run's own task, or has no other questions, and a gate is closed for "
                "others: name another one"
            )
        # half of what there is stays for side effects
        wanted = min(spec.texts, len(first_of) // 2)
        found.append(task.subset(sorted(first_of.values())[: max(2, wanted)]))
    return tuple(found)


@dataclass
class Gating:
    """The gate of a pair's target, made when it is first asked."""

    spec: GateSpec
    pair: Pair
    splits: Splits
    others: tuple[Task, ...]
    seed: int
    batch_size: int
    shut: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, layer = self.pair.layout.layers, self.spec.layer
        if layer is not None and layer >= layers:
            raise UsageError(
                f"gate.layer: no layer {layer} in {self.pair.target.name}: give one from 0 to {layers - 1}"
            )

    @cached_property
    def gate(self) -> Gate:
        """Fitted on ``discover``."""
        target, spec = self.pair.target, self.spec
        # a run's own texts have its seed, a screen's the next
        texts = neutral_texts(target, spec.texts, spec.tokens, self.seed + 2, batch_size=self.batch_size)
        return fit_gate(target, self.splits.discover, [texts, *self.others], spec.layer, self.batch_size)

    @property
    def open(self) -> int:
        """How many `test` questions it lets through."""
        return sum(map(self.gate, self.splits.test.examples))

    def closed(self, split: Task) -> tuple[str, ...]:
        """Keys of the questions that the gate is closed for."""
        if split.fingerprint not in self.shut:
            self.gate.read(split.examples)
            self.shut[split.fingerprint] = tuple(e.key for e in split.examples if not self.gate(e))
        return self.shut[split.fingerprint]
