"""Weight grafts: copy modules of the source into the target, in place, and undo it without a trace.

At strength s a region becomes target + s · (source − target): 1 copies the source's numbers as they are, 0 changes
nothing, above 1 extrapolates, below 0 subtracts. Biases travel with their weights. Norms, embeddings and the output
head never move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import CompatibilityError, UsageError
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
        import math

        names = [str(m) for m in modules]
        values = [float(strength)] * len(names) if isinstance(strength, int | float) else [float(s) for s in strength]
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

    @contextmanager
    def applied(self, pair: Pair) -> Iterator[Graft]:
        """The target with the graft in place, for the length of a ``with`` block.

        Every byte is restored on any exit, an exception and Ctrl-C included. Blocks may be nested.
        """
        regions = self.regions(pair)
        _check_finite(pair, regions)
        undo = _Undo()
        try:
            for region, strength in regions.items():
                if strength != 0:
                    _write(pair, region, strength, undo)
            yield self
        finally:
            undo.restore()


class _Undo:
    """What was overwritten, newest last."""

    def __init__(self) -> None:
        self.saved: list[tuple[Any, Any]] = []

    def keep(self, view: Any) -> None:
        self.saved.append((view, view.clone()))

    def restore(self) -> None:
        """Write everything back, newest first; a Ctrl-C that arrives meanwhile is raised when all is restored."""
        import torch

        interrupted: KeyboardInterrupt | None = None
        while self.saved:
            try:
                with torch.no_grad():
                    view, old = self.saved[-1]
                    view.copy_(old)
                    self.saved.pop()
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


def _write(pair: Pair, region: Region, strength: float, undo: _Undo) -> None:
    """Move one region of the target towards the source's."""
    import torch

    with torch.no_grad():
        target = region.of(pair.target_parameters[region.parameter])
        source = region.of(pair.source_parameters[region.parameter]).to(target.device)
        # saved before it is touched, so that an interruption at any point can be undone
        undo.keep(target)
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
