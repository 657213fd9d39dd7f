"""Recorded tensors become values per module and prompt; the values are kept, or summed up as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from mechtransplant.activations import Batch
from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.modules import module_frame
from mechtransplant.shifts.frames import shift_frame
from mechtransplant.shifts.heads import HeadWrites, Written
from mechtransplant.shifts.recorder import SLOT_KINDS, Slot, SlotKind, slots_of
from mechtransplant.shifts.vectors import ShiftVectors

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mechtransplant.pair import Pair


def names_of(given: str | Iterable[str], what: str, known: tuple[str, ...]) -> list[str]:
    """Different names in their order; raises UsageError and UnknownNameError for anything else."""
    if given is None or not isinstance(given, Iterable):
        raise UsageError(f"expected a {what} or several, got {given!r}: some of {', '.join(known)}")
    names = list(dict.fromkeys([given] if isinstance(given, str) else given))
    for name in names:
        if name not in known:
            raise UnknownNameError(what, name, known)
    if not names:
        raise UsageError(f"no {what} was named: expected some of {', '.join(known)}")
    return names


class Collector:
    """Turns recorded tensors into values per module and prompt, and shift vectors where they are wanted.

    ``into`` takes the values; ``prompts`` is how many there are.
    """

    by_magnitude: ClassVar = {"magnitude", "lae", "lae_relative"}

    def __init__(
        self,
        pair: Pair,
        prompts: int,
        kinds: str | Iterable[str],
        measures: tuple[str, ...],
        into: PromptValues | Moments,
        with_vectors: bool = False,
    ) -> None:
        self.pair, self.prompts, self.measures = pair, prompts, measures
        self.slots = slots_of(pair, cast("list[SlotKind]", names_of(kinds, "kind of module", SLOT_KINDS)))
        self.modules = [m for slot in self.slots for m in slot.modules(pair)]
        self.rows = {m: i for i, m in enumerate(self.modules)}
        #: of the residual stream, which heads write to
        self.width = int(pair.target.hf.config.get_text_config().hidden_size)
        self.needs_moved = bool({"own", "inherited"} & set(measures))
        of = {"head": HeadWrites.of, "neuron": HeadWrites.of_neurons}
        self.writes = {s: of[s.kind](pair, s.layer) for s in self.slots if s.kind in of}
        self.into = into
        into.begin(self.modules, measures, str(pair.target.hf.dtype))
        self.vectors = ShiftVectors.empty(self._widths(), prompts) if with_vectors else None

    def _widths(self) -> dict[str, int]:
        widths = {}
        for slot in self.slots:
            if slot in self.writes:
                width = self.writes[slot].change.shape[-1]
            else:
                linear: Any = self.pair.target.hf.get_submodule(self.pair.layout.linears[slot.linear])
                width = linear.nf if type(linear).__name__ == "Conv1D" else linear.out_features
            widths.update(dict.fromkeys(slot.modules(self.pair), int(width)))
        return widths

    def consumer(self, batch: Batch) -> Any:
        """A function that takes in a slot's tensors of one batch."""

        def consume(slot: Slot, source: Any, target: Any, moved: Any) -> None:
            first = self.rows[slot.modules(self.pair)[0]]
            terms = {"head": partial(self._head_terms, slot), "neuron": partial(self._neuron_terms, slot)}.get(
                slot.kind, self._plain_terms
            )
            values, shift = terms(source, target, moved)
            for name, value in values.items():
                # (counted, modules) → (prompts, modules); sums over positions in float64, which not every device has
                mean = batch.mean(value.cpu().double())
                self.into.put(name, first, batch.prompts, mean.T.numpy())
            if self.vectors is not None and shift is not None:
                self.vectors.write(self.modules[first], batch.prompts, batch.mean(shift).flatten(1).cpu().numpy())

        return consume

    def _plain_terms(
        self, source: torch.Tensor, target: torch.Tensor, moved: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Measures of one module from its outputs, each (counted, width): values (counted, 1), and the shift."""
        import torch

        def norm(vectors: torch.Tensor) -> torch.Tensor:
            return torch.linalg.vector_norm(vectors, dim=-1)[:, None]

        shift = source - target
        norms = {"‖source‖": norm(source), "‖target‖": norm(target), "distance": norm(shift)}
        if self.by_magnitude & set(self.measures):
            norms |= {"‖source‖₁": source.abs().sum(-1)[:, None], "‖target‖₁": target.abs().sum(-1)[:, None]}
        if moved is not None:
            norms |= {"own": norm(moved - target), "inherited": norm(source - moved)}
        return self._values(norms, source.shape[-1]), shift[:, None]

    def _head_terms(
        self, slot: Slot, source: Written, target: Written, moved: Written | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Measures of a layer's heads: values (counted, heads)."""

        writes, heads = self.writes[slot], self.pair.layout.heads
        zs = [None if w is None else w.z.float().reshape(len(w.z), heads, -1) for w in (source, target, moved)]
        norms = {"‖source‖": source.norms, "‖target‖": target.norms, "‖source‖₁": source.sums, "‖target‖₁": target.sums}
        if {"distance", "own", "inherited"} & set(self.measures):
            norms |= writes.norms(*cast("list[torch.Tensor]", zs))
        shift = None
        if self.vectors is not None:
            shift = writes.difference(*cast("list[torch.Tensor]", zs[:2]))
        return self._values(norms, self.width), shift

    def _neuron_terms(
        self, slot: Slot, source: torch.Tensor, target: torch.Tensor, moved: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Measures of a layer's neurons from their activations, each (counted, neurons): values of that shape."""
        import torch

        writes = self.writes[slot]
        norms: dict[str, torch.Tensor] = {}
        for model, name, activation in ((self.pair.source, "source", source), (self.pair.target, "target", target)):
            columns = model.neuron_weights(slot.layer).to(activation)
            norms[f"‖{name}‖₁"] = activation.abs() * columns.abs().sum(1)
            # of all of them: a neuron that is silent at a position has no size there to divide by
            norms[f"‖{name}‖"] = torch.linalg.vector_norm(activation @ columns, dim=-1)[:, None]
        zs = [None if a is None else a[..., None] for a in (source, target, moved)]
        if {"distance", "own", "inherited"} & set(self.measures):
            norms |= writes.norms(*cast("list[torch.Tensor]", zs))
        shift = None if self.vectors is None else writes.difference(*cast("list[torch.Tensor]", zs[:2]))
        return self._values(norms, self.width), shift

    def _values(self, norms: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
        """The measures, each (counted, modules), from norms of outputs of ``width`` numbers, and of differences."""
        found: dict[str, torch.Tensor] = {}
        if self.by_magnitude & set(self.measures):
            source, target = norms["‖source‖₁"] / width, norms["‖target‖₁"] / width
            gap, size = source - target, (source + target) / 2
            found |= {"magnitude": gap, "lae": gap.abs(), "lae_relative": (gap.abs() / size).masked_fill(size == 0, 0)}
        # one mean norm for all three, so that distance ≤ own + inherited; 0 where both outputs are
        scale = (norms["‖source‖"] + norms["‖target‖"]) / 2
        for name in ("distance", "own", "inherited"):
            if name in norms:
                found[name] = (norms[name] / scale).masked_fill(scale == 0, 0)
        return {name: value for name, value in found.items() if name in self.measures}


class PromptValues:
    """Every prompt's value: measure → (modules, prompts)."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self.modules: list[str] = []
        self.dtype = ""
        self.values: dict[str, NDArray[np.float64]] = {}

    def begin(self, modules: list[str], measures: Sequence[str], dtype: str) -> None:
        """Make room."""
        self.modules, self.dtype = modules, dtype
        self.values = {m: np.zeros((len(modules), self.prompts)) for m in measures}

    def put(self, measure: str, first: int, prompts: Sequence[int], values: NDArray[np.float64]) -> None:
        """Values (modules, prompts) of the modules from ``first`` on."""
        self.values[measure][first : first + len(values), prompts] = values

    def frame(self, measure: str) -> pd.DataFrame:
        """One measure as a tidy frame; raises UsageError for values that are NaN or infinite."""
        values = self.values[measure]
        check_finite(self.modules, np.isfinite(values.sum(1)), self.dtype)
        return shift_frame(self.modules, measure, values)


class Moments:
    """What is known of every module's values without keeping them: count, mean, squares around it, and extremes."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.dtype = ""
        #: measure → (count, mean, sum of squared deviations, smallest, largest), each (modules,)
        self.held: dict[str, NDArray[np.float64]] = {}

    def begin(self, modules: list[str], measures: Sequence[str], dtype: str) -> None:
        """Nothing is known."""
        self.modules, self.dtype = modules, dtype
        empty = np.zeros((5, len(modules)))
        empty[3:] = np.array([[np.inf], [-np.inf]])
        self.held = {m: empty.copy() for m in measures}

    def put(self, measure: str, first: int, prompts: Sequence[int], values: NDArray[np.float64]) -> None:
        """Values (modules, prompts) of the modules from ``first`` on."""
        count, mean, squares, low, high = self.held[measure][:, first : first + len(values)]
        new, theirs = values.shape[1], values.mean(1)
        gap, total = theirs - mean, count + new
        squares += ((values - theirs[:, None]) ** 2).sum(1) + gap**2 * count * new / total
        mean += gap * new / total
        count += new
        np.minimum(low, values.min(1), out=low)
        np.maximum(high, values.max(1), out=high)

    def frame(self, measure: str) -> pd.DataFrame:
        """One row a module; raises UsageError for values that are NaN or infinite."""
        from scipy import stats

        count, mean, squares, low, high = self.held[measure]
        check_finite(self.modules, np.isfinite(mean + squares), self.dtype)
        with np.errstate(divide="ignore", invalid="ignore"):
            sd = np.sqrt(squares / (count - 1))
            se = sd / np.sqrt(count)
            half = stats.t.ppf(0.975, count - 1) * se
        found = {"n": count.astype(int), "mean": mean, "sd": sd, "se": se, "low": mean - half, "high": mean + half}
        return module_frame(self.modules).assign(measure=measure, **found, smallest=low, largest=high)


def check_finite(modules: Sequence[str], finite: NDArray[np.bool_], dtype: str) -> None:
    """Raise UsageError for the first module whose values are not finite."""
    if not finite.all():
        raise UsageError(
            f"{modules[int(np.argmin(finite))]} has activations that are NaN or infinite: its weights are "
            f"broken, or {dtype} overflows (use dtype float32)"
        )
