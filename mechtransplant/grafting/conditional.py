"""Grafts that are in place only while the prompt is read, only while text is written, or for some questions only.

The weights are written and restored between forward passes, so a pass sees one model. Evaluations keep prompt and
answer in passes of their own while such a graft is in place, and every batch to questions of one kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.evaluation.interventions import (
    Intervention,
    Predicate,
    check_phases,
    interventions_on,
)
from mechtransplant.grafting.applied import Entry, in_few_parts, unwind, write
from mechtransplant.grafting.graft import Graft, checked
from mechtransplant.interrupts import guard
from mechtransplant.modules import Region
from mechtransplant.pair import holds_copies
from mechtransplant.selection import put_on, selected_by, take_off
from mechtransplant.weights import pin, unpin

if TYPE_CHECKING:
    from mechtransplant.pair import Pair

When = Literal["always", "prompt", "decoding"]


@dataclass(frozen=True)
class ConditionalGraft:
    """A graft with a condition.

    Args:
        graft: what is in place while the condition holds.
        when: "prompt" (while the prompt is read: its keys and values, and the first token that is written, are the
            grafted model's), "decoding" (from the first written token on), or "always".
        accepts: a function of a task's example; the graft is in place for questions for which it is true.

    Raises:
        UsageError: no such ``when``, or no condition at all.
    """

    graft: Graft
    when: When = "always"
    accepts: Predicate | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.graft, Graft):
            raise UsageError(f"a conditional graft is made of a Graft, got {type(self.graft).__name__}")
        if self.when not in get_args(When):
            raise UnknownNameError("condition", self.when, get_args(When))
        if self.accepts is not None and not callable(self.accepts):
            raise UsageError(f"accepts is a function of an example, true or false, got {self.accepts!r}")
        if self.when == "always" and self.accepts is None:
            raise UsageError("a conditional graft needs when= or accepts=: without a condition use the graft itself")

    def applied(self, pair: Pair) -> AppliedConditional:
        """The target under the conditional graft, for the length of a ``with`` block.

        Plain grafts of the same weights are applied outside of it: inside, they would be restored over.
        """
        regions = in_few_parts(self.graft.operator, checked(self.graft, pair))
        return AppliedConditional(self, pair, regions)


class AppliedConditional:
    """A conditional graft: hooks that write its weights before a pass and restore them before another."""

    def __init__(self, conditional: ConditionalGraft, pair: Pair, regions: dict[Region, float]) -> None:
        self.conditional, self.pair, self.regions = conditional, pair, regions
        self.entry = Entry(conditional=True)
        self.intervention = Intervention(conditional.when != "always", conditional.accepts)
        self.ends: list[Callable[[], None]] = []
        self.inside = False
        graft = conditional.graft
        self.chosen = (selected_by(pair.target.hf, graft.modules), (graft.label, conditional.when))

    @guard.protect
    def __enter__(self) -> ConditionalGraft:
        if self.inside:
            raise UsageError("this conditional graft is in place already: make another block of it")
        self.pair.check_free(self.regions)
        guard.hold()
        try:
            pin(self.pair.target.hf)
        except BaseException:
            guard.release()
            raise
        self.inside = True
        self.entry = Entry(conditional=True)
        # a plain graft that is left before this one would restore under what this one holds
        self.pair.applied.append(self.entry)
        self.pair.conditional.append(self.regions)
        interventions_on(self.pair.target.hf).append(self.intervention)
        self.pair.target.when_bridged.append(self._on_bridge)
        put_on(self.pair.target.hf, *self.chosen)
        try:
            self._listen(self.pair.target.hf)
            if "bridge" in self.pair.target.__dict__:
                self._on_bridge(self.pair.target.bridge)
            if guard.pending:
                raise KeyboardInterrupt
        except BaseException:
            self._leave()
            raise
        return self.conditional

    @guard.protect
    def __exit__(self, *error: object) -> None:
        self._leave()

    def _leave(self) -> None:
        try:
            while self.ends:
                self.ends.pop()()
            self.entry.restore()
            self.entry.left = True
            unwind(self.pair)
            self.pair.target.when_bridged.remove(self._on_bridge)
            take_off(self.pair.target.hf, *self.chosen)
            interventions_on(self.pair.target.hf).remove(self.intervention)
            self.pair.conditional[:] = [r for r in self.pair.conditional if r is not self.regions]
            self.inside = False
        finally:
            unpin(self.pair.target.hf)
            guard.release()

    def _on_bridge(self, bridge: Any) -> None:
        root = bridge.original_model
        if holds_copies(self.pair.target.hf, bridge):
            self.ends.append(root.register_forward_pre_hook(self._refuse).remove)
        else:
            self._listen(root)

    def _refuse(self, module: Any, inputs: tuple[Any, ...]) -> None:
        raise UsageError(
            f"the bridge of {type(self.pair.target.hf).__name__} holds copies of weights, which cannot be switched "
            "while it runs: use the Hugging Face model (evaluate, generate, pair.target.hf) under a conditional graft"
        )

    def _listen(self, root: Any) -> None:
        self.ends.append(root.register_forward_pre_hook(self._before, with_kwargs=True).remove)

    def _before(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        past = keywords.get("past_key_values")
        if self.intervention.phased:
            check_phases(keywords)
        phase = "prompt" if past is None or past.get_seq_length() == 0 else "decoding"
        wanted = self.conditional.when in ("always", phase)
        # asked in any case: a pass of an unknown question is refused whatever its phase
        self._switch(self.intervention.wanted() and wanted)

    @guard.protect
    def _switch(self, on: bool) -> None:
        if on and not self.entry.saved:
            try:
                for region, strength in self.regions.items():
                    if strength != 0:
                        write(self.conditional.graft.operator, self.pair, region, strength, self.entry.saved)
            except BaseException:
                # half of a graft would be taken for the whole by the next pass
                self.entry.restore()
                raise
        elif not on:
            self.entry.restore()
        if guard.pending:
            guard.pending = False
            raise KeyboardInterrupt
