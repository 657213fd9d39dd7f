"""Conditional grafts of a run: the gate that its target decides by, and the questions that it is closed for.

The gate is fitted on ``discover``, against neutral texts of another seed than those that harm is measured on and, where
the config names some, questions of other tasks that side effects do not ask. A cell whose questions are all let through
is the plain graft's: it has the same value and the same key.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import FolderError, UnknownNameError, UsageError
from mechtransplant.experiment.cells import write_atomically
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
    #: fingerprint of a split → keys of its questions that it is closed for
    shut: dict[str, list[str]] = field(default_factory=dict)

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

    def open_for(self, task: Task) -> int:
        """How many questions of another task it lets through."""
        return len(task) - len(self.closed(task))

    def closed(self, split: Task) -> list[str]:
        """Keys of the questions that the gate is closed for."""
        if split.fingerprint not in self.shut:
            self.gate.read(split.examples)
            self.shut[split.fingerprint] = [e.key for e in split.examples if not self.gate(e)]
        return self.shut[split.fingerprint]

    @property
    def fingerprint(self) -> str:
        """Sixteen digits of what the gate compares with what."""
        content = json.dumps([self.gate.layer, self.gate.direction.tolist(), self.gate.centre.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    # --- one gate for every process and every start: another processor would fit it a little otherwise ---------------

    def saved(self) -> dict[str, Any]:
        """The gate, and what it said of the questions to choose and to report by."""
        for split in (self.splits.choose, self.splits.test):
            self.closed(split)
        gate = self.gate
        return {
            "layer": gate.layer,
            "direction": gate.direction.tolist(),
            "centre": gate.centre.tolist(),
            "closed": self.shut,
        }

    def use(self, saved: dict[str, Any]) -> None:
        """Take a gate that :meth:`saved` gave, with what it said."""
        direction, centre = (np.array(saved[key], dtype=float) for key in ("direction", "centre"))
        self.gate = Gate(self.pair.target, int(saved["layer"]), direction, centre, self.batch_size)
        self.shut = {split: list(keys) for split, keys in saved["closed"].items()}
        for split in (self.splits.choose, self.splits.test):
            shut = set(self.closed(split))
            self.gate.known |= {key: key not in shut for key in split.keys}

    def settle(self, folder: Path, known: str | None = None) -> None:
        """Take the gate of a run's folder, or ``known`` from another, or fit one; it is kept in the folder.

        Raises FolderError for what is no gate.
        """
        path = folder / "gate.json"
        if not path.exists():
            write_atomically(path, known or json.dumps(self.saved()) + "\n")
        try:
            self.use(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(f"{path} is broken ({error!r}): remove it, and the gate is fitted again") from error
