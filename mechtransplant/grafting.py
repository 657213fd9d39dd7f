"""Weight grafts: copy modules of the source into the target, in place, and undo it without a trace.

At strength s a region becomes target + s · (source − target): 1 copies the source's numbers as they are, 0 changes
nothing, above 1 extrapolates, below 0 subtracts. Biases travel with their weights. Norms, embeddings and the output
head never move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import CompatibilityError, UsageError
from mechtransplant.interrupts import guard
from mechtransplant.modules import Region

if TYPE_CHECKING:
    from mechtransplant.pair import Pair


@dataclass(frozen=True)
class Graft:
    """A set of modules with a strength.

    Args:
        modules: addresses, in any mix of kinds; an address given twice counts once.
        strength: one number for all, or one number a module.

    Raises:
        UsageError: strengths that do not fit the modules, or are not finite.
    """

    modules: tuple[str, ...]
    strengths: tuple[float, ...]

    def __init__(self, modules: Iterable[str], strength: float | Sequence[float] = 1.0) -> None:
        names = [str(m) for m in modules]
        each = strength if isinstance(strength, Iterable) else [strength] * len(names)
        values = [float(s) for s in each]
        if len(values) != len(names):
            raise UsageError(f"{len(values)} strengths for {len(names)} modules: give one number, or one a module")
        if not all(math.isfinite(v) for v in values):
            raise UsageError(f"a graft's strength must be a finite number, got {strength}")
        unique: dict[str, float] = {}
        for name, value in zip(names, values, strict=True):
            if unique.setdefault(name, value) != value:
                raise UsageError(f"module {name} is given twice with strengths {unique[name]} and {value}: keep one")
        object.__setattr__(self, "modules", tuple(unique))
        object.__setattr__(self, "strengths", tuple(unique.values()))

    def __len__(self) -> int:
        return len(self.modules)

    def regions(self, pair: Pair) -> dict[Region, float]:
        """What the graft writes: region → strength, no number of a parameter twice.

        A region that lies inside another one of equal strength is dropped. Raises UsageError where two modules
        overlap with different strengths, and for an address that the pair does not have.
        """
        parameters = pair.target_parameters
        whole: dict[str, float] = {}
        parts: dict[Region, float] = {}
        for module, strength in zip(self.modules, self.strengths, strict=True):
            for region in pair.layout.regions(module, parameters):
                known = whole.get(region.parameter) if region.axis is None else parts.get(region)
                if known is not None and known != strength:
                    raise UsageError(
                        f"{module} overlaps another module of the graft at a different strength: keep one of them"
                    )
                if region.axis is None:
                    whole[region.parameter] = strength
                else:
                    parts[region] = strength
        result = {Region(name): strength for name, strength in whole.items()}
        for region, strength in parts.items():
            if region.parameter not in whole:
                result[region] = strength
            elif whole[region.parameter] != strength:
                raise UsageError(
                    f"a head and its whole layer {region.parameter} have different strengths: keep one of them"
                )
        return result

    def parameter_count(self, pair: Pair) -> int:
        """How many numbers the graft writes."""
        parameters = pair.target_parameters
        return sum(region.of(parameters[region.parameter]).numel() for region in self.regions(pair))

    def applied(self, pair: Pair) -> Applied:
        """The target with the graft in place, for the length of a ``with`` block.

        Every byte is restored on any exit, an exception and Ctrl-C included. Blocks may be nested.
        """
        regions = self.regions(pair)
        _check_finite(pair, regions)
        return Applied(self, pair, regions)


class Applied:
    """A graft in place: the context manager that :meth:`Graft.applied` gives. Enter it once."""

    def __init__(self, graft: Graft, pair: Pair, regions: dict[Region, float]) -> None:
        self.graft, self.pair, self.regions = graft, pair, regions
        #: what was overwritten, newest last
        self.saved: list[tuple[Any, Any]] = []
        self.left = False

    @guard.protect
    def __enter__(self) -> Graft:
        guard.hold()
        self.pair.applied.append(self)
        try:
            for region, strength in self.regions.items():
                if strength != 0:
                    _write(self.pair, region, strength, self.saved)
                if guard.pending:
                    raise KeyboardInterrupt
        except BaseException:
            self._leave()
            raise
        return self.graft

    @guard.protect
    def __exit__(self, *error: object) -> None:
        in_order = self.pair.applied[-1] is self
        self._leave()
        if not in_order:
            raise UsageError(
                "this graft was left before one that was applied after it: its weights are restored when that one is "
                "left; nest `with` blocks"
            )

    def _leave(self) -> None:
        self.left = True
        try:
            # a graft that was left too early waits for those above it, or it would restore over their weights
            while self.pair.applied and self.pair.applied[-1].left:
                self.pair.applied[-1].restore()
                self.pair.applied.pop()
        finally:
            guard.release()

    def restore(self) -> None:
        """Write back what was overwritten, newest first."""
        import torch

        with torch.no_grad():
            while self.saved:
                view, old = self.saved[-1]
                view.copy_(old)
                self.saved.pop()


def _write(pair: Pair, region: Region, strength: float, saved: list[tuple[Any, Any]]) -> None:
    """Move one region of the target towards the source's."""
    import torch

    with torch.no_grad():
        target = region.of(pair.target_parameters[region.parameter])
        source = region.of(pair.source_parameters[region.parameter]).to(target.device)
        # saved before it is touched, so that a failure at any point can be undone
        saved.append((target, target.clone()))
        if strength == 1:
            target.copy_(source)
        else:
            # in float32 whatever the dtype: a bf16 difference would round twice
            old = target.float()
            target.copy_(old + strength * (source.float() - old))


def _check_finite(pair: Pair, regions: Iterable[Region]) -> None:
    """Refuse a source with NaN or Inf; each parameter is looked at once per pair."""
    for name in {region.parameter for region in regions} - pair.known_finite:
        if not pair.source_parameters[name].isfinite().all():
            raise CompatibilityError(f"the source's {name} holds NaN or Inf: nothing was grafted; use intact weights")
        pair.known_finite.add(name)
