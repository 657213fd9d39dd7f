"""Norms and inner products of head writes from d_head numbers, without building d_model vectors.

A head writes z @ W_O to the residual stream. Stack W_O of the source and ΔW = W_O,source − W_O,target into M, of shape
(2 · d_head, d_model). Its Gram matrix M Mᵀ holds every inner product that shifts need; with a factor R, R Rᵀ = M Mᵀ,
the write's coordinates z @ R have the write's own norms and inner products, in min(2 · d_head, d_model) numbers. The
factor is used rather than the Gram matrix itself, because the norm of a small difference loses half of its digits when
it is computed as a sum of large squares; and a difference of equal writes is exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mechtransplant.pair import Pair


@dataclass(frozen=True)
class HeadWrites:
    """The head writes of one layer of a pair; ``z`` has shape (counted, head, d_head).

    ``source`` and ``change`` are the factor's halves, each (head, d_head, width); ``weights_source`` and
    ``weights_target`` are W_O, each (head, d_head, d_model), views of the models' own where magnitudes are wanted.
    """

    source: torch.Tensor
    change: torch.Tensor
    weights_source: torch.Tensor | None = None
    weights_target: torch.Tensor | None = None

    @classmethod
    def of(cls, pair: Pair, layer: int, magnitudes: bool = True) -> HeadWrites:
        """The factor of a layer's two W_O, computed in float64 and kept in float32."""
        import torch

        theirs, ours = (m.output_weights(layer).float() for m in (pair.source, pair.target))
        change = theirs - ours
        # on the CPU: not every device has float64
        stacked = torch.cat([theirs, change], 1).cpu().double()
        if stacked.shape[1] < stacked.shape[2]:
            # M = R Qᵀ with orthonormal Q: only R matters for norms and inner products
            stacked = torch.linalg.qr(stacked.mT, mode="r").R.mT
        d_head = theirs.shape[1]
        # a head whose W_O is the same in both has no rounding error in ΔW either
        moved = change.abs().amax((1, 2), keepdim=True) > 0
        stacked = stacked.float().to(theirs.device)
        weights = [m.output_weights(layer) if magnitudes else None for m in (pair.source, pair.target)]
        return cls(stacked[:, :d_head], stacked[:, d_head:] * moved, *weights)

    def coordinates(self, z: torch.Tensor) -> torch.Tensor:
        """A write with the source's W_O: (counted, head, d_head) → (counted, head, width)."""
        return _times(z, self.source)

    def target_coordinates(self, z: torch.Tensor) -> torch.Tensor:
        """A write with the target's W_O."""
        return _times(z, self.source - self.change)

    def difference(self, z_source: torch.Tensor, z_target: torch.Tensor) -> torch.Tensor:
        """z_source @ W_O,source − z_target @ W_O,target: exactly 0 where z and W_O are equal."""
        return _times(z_source - z_target, self.source) + _times(z_target, self.change)

    def magnitudes(self, z: torch.Tensor, source: bool) -> torch.Tensor:
        """‖z @ W_O‖₁ / d_model of every head, (counted, head): the sum of absolute values has no Gram matrix.

        One head at a time, so that the d_model vectors of a batch are never all held.
        """
        import torch

        weights = self.weights_source if source else self.weights_target
        assert weights is not None
        return torch.stack([(z[:, h] @ weights[h].float()).abs().mean(-1) for h in range(z.shape[1])], 1)


def _times(z: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.einsum("chd,hdw->chw", z, factor)
