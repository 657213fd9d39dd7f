"""What the source had, in a temporary file, for the target's pass: of models that are in memory one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mechtransplant.shifts.heads import Written
from mechtransplant.weights import Place, TensorFile

if TYPE_CHECKING:
    import torch

    from mechtransplant.shifts.recorder import Recorded, Slot


class StoredOutputs:
    """Recorded tensors by batch and slot; ``dtype`` is the model's own, which holds its outputs exactly."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.file = TensorFile("activations")
        self.places: dict[tuple[int, Slot], list[Place]] = {}

    def put(self, batch: int, slot: Slot, recorded: Recorded) -> None:
        """Write what a slot has in a batch."""
        outputs, *numbers = _tensors(recorded)
        self.places[batch, slot] = [self.file.add(outputs.to(self.dtype)), *map(self.file.add, numbers)]

    def get(self, batch: int, slot: Slot) -> Recorded:
        """Read it, in float32."""
        found = [self.file.read(place).to(self.device).float() for place in self.places[batch, slot]]
        return Written(*found) if len(found) > 1 else found[0]


def _tensors(recorded: Any) -> list[torch.Tensor]:
    """A tensor, or the heads' z, sums and norms."""
    return [recorded.z, recorded.sums, recorded.norms] if isinstance(recorded, Written) else [recorded]
