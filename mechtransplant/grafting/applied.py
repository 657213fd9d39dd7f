"""A graft in place: written when a ``with`` block is entered, undone to the byte on any exit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.grafting.operators import Operator, Replace
from mechtransplant.grafting.overlaps import joined
from mechtransplant.interrupts import guard
from mechtransplant.modules import Region
from mechtransplant.selection import put_on, selected_by, take_off
from mechtransplant.weights import pin, unpin

if TYPE_CHECKING:
    from mechtransplant.grafting.graft import Graft
    from mechtransplant.pair import Pair


@dataclass
class Entry:
    """One entry of a block: what was overwritten, newest last; whether the block was left, the target has to stay in
    memory (see ``weights.residence``), and the graft is in place under a condition only."""

    saved: list[tuple[Any, Any]] = field(default_factory=list)
    left: bool = False
    pinned: bool = False
    conditional: bool = False

    def restore(self) -> None:
        """Write back what was overwritten, newest first."""
        import torch

        with torch.no_grad():
            while self.saved:
                view, old = self.saved[-1]
                view.copy_(old)
                self.saved.pop()


class Applied:
    """A graft in place: the context manager that :meth:`Graft.applied` gives; it may be entered several times."""

    def __init__(self, graft: Graft, pair: Pair, regions: dict[Region, float]) -> None:
        self.graft, self.pair, self.regions = graft, pair, regions
        self.entries: list[Entry] = []
        self.chosen = (selected_by(pair.target.hf, graft.modules), graft.label)

    def __repr__(self) -> str:
        state = "in place" if self.entries else "not in place: use it in a `with` block"
        return f"<graft of {len(self.graft)} modules into {self.pair.target.name}, {state}>"

    @guard.protect
    def __enter__(self) -> Graft:
        self.pair.check_free(self.regions)
        entry = Entry()
        guard.hold()
        try:
            # a graft of nothing holds nothing
            if self.regions:
                pin(self.pair.target.hf)
                entry.pinned = True
        except BaseException:
            guard.release()
            raise
        self.entries.append(entry)
        self.pair.applied.append(entry)
        put_on(self.pair.target.hf, *self.chosen)
        try:
            for region, strength in self.regions.items():
                if strength != 0:
                    write(self.graft.operator, self.pair, region, strength, entry.saved)
                if guard.pending:
                    raise KeyboardInterrupt
            self.pair.target.weights_changed()
        except BaseException:
            self._leave()
            raise
        return self.graft

    @guard.protect
    def __exit__(self, *error: object) -> None:
        in_order = self.pair.applied[-1] is self.entries[-1]
        self._leave()
        if not in_order:
            raise UsageError(
                "this graft was left before one that was applied after it: its weights are restored when that one is "
                "left; nest `with` blocks"
            )

    def _leave(self) -> None:
        self.entries.pop().left = True
        take_off(self.pair.target.hf, *self.chosen)
        try:
            unwind(self.pair)
        finally:
            guard.release()


def unwind(pair: Pair) -> None:
    """Undo the entries that were left, newest first; one that was left too early waits for those above it, or it would
    restore over their weights."""
    while pair.applied and pair.applied[-1].left:
        pair.applied[-1].restore()
        if pair.applied.pop().pinned:
            unpin(pair.target.hf)
    pair.target.weights_changed()


def in_few_parts(operator: Operator, regions: dict[Region, float]) -> dict[Region, float]:
    """Regions to write: neighbours as one where the operator treats every number by itself."""
    return joined(regions) if getattr(operator, "elementwise", False) else regions


def write(operator: Operator, pair: Pair, region: Region, strength: float, saved: list[tuple[Any, Any]]) -> None:
    """Write one region of the target, with a copy of what was there in ``saved``."""
    import torch

    with torch.no_grad():
        target = region.of(pair.target_parameters[region.parameter])
        # saved before it is touched, so that a failure at any point can be undone
        saved.append((target, target.clone()))
        target.copy_(written(operator, pair, region, strength))


def differing(pair: Pair, operator: Operator, region: Region, strength: float) -> int:
    """How many of a region's numbers the graft would change, as the target stores them."""
    target = region.of(pair.target_parameters[region.parameter])
    return int((written(operator, pair, region, strength).to(target) != target).sum())


def squared_change(operator: Operator, pair: Pair, region: Region, strength: float) -> float:
    """The sum of squares of what the graft would add to a region's numbers, as the target stores them."""
    import torch

    target = region.of(pair.target_parameters[region.parameter])
    new = written(operator, pair, region, strength).to(target)
    return float(torch.linalg.vector_norm(new.float() - target.float())) ** 2


def written(operator: Operator, pair: Pair, region: Region, strength: float) -> Any:
    """A region's new numbers, as the target stores them; raises UsageError where one of them is NaN or Inf."""
    import torch

    source = region.of(pair.source_parameters[region.parameter])
    if strength == 1 and isinstance(operator, Replace):
        return source
    stored = region.of(pair.target_parameters[region.parameter])
    # at least in float32: a bf16 difference would round twice
    target = stored.to(torch.promote_types(stored.dtype, torch.float32))
    base = None if pair.base is None else region.of(pair.base_parameters[region.parameter]).to(target)
    new = operator(target, source.to(target), base, strength, str(region)).to(stored)
    # one pass without a mask as large as the numbers
    if not all(end.isfinite() for end in torch.aminmax(new)):
        kind = str(stored.dtype).removeprefix("torch.")
        raise UsageError(
            f"a graft of {region} at strength {strength:g} gives NaN or Inf in {kind}: the target stays as it was; "
            "give a smaller strength, or load intact weights, in float32"
        )
    return new
