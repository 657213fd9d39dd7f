"""Head writes: what every head of a layer adds to the residual stream, z @ W_O of its own columns. A neuron's write is
the same with d_head = 1: its activation times its column of the MLP's last layer.

Differences of writes have norms and inner products that d_head numbers hold: stack W_O of the source and
ΔW = W_O,source − W_O,target into M, of shape (2 · d_head, d_model). Its Gram matrix M Mᵀ holds every inner product that
shifts need; with a triangular factor R, R Rᵀ = M Mᵀ, coordinates have the write's own norms and inner products: z @ S
in d_head numbers for the source's W_O, z @ C in 2 · d_head for ΔW. The factor is used rather than the Gram matrix
itself, because the norm of a small difference loses half of its digits when it is computed as a sum of large squares;
and a difference of equal writes is exactly 0. Sums of absolute values have no Gram matrix: for them the writes are
built, one head at a time; their sum is the output projection's own output, which need not be computed a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mechtransplant.weights import runs_on, takes_turns

if TYPE_CHECKING:
    import torch

    from mechtransplant.pair import Pair


@dataclass(frozen=True)
class HeadWrites:
    """The head writes of one layer of a pair; ``z`` has shape (counted, head, d_head).

    ``source`` (S) and ``change`` (C) have shapes (head, d_head, narrow) and (head, d_head, width): coordinates by S are
    the first of those by C.
    """

    source: torch.Tensor
    change: torch.Tensor

    @classmethod
    def of(cls, pair: Pair, layer: int) -> HeadWrites:
        """The factor of a layer's two W_O, computed in float64 and kept in float32."""
        return cls._of(pair, *(m.output_weights(layer) for m in (pair.source, pair.target)))

    @classmethod
    def of_neurons(cls, pair: Pair, layer: int) -> HeadWrites:
        """The same of a layer's neurons."""
        return cls._of(pair, *(m.neuron_weights(layer)[:, None] for m in (pair.source, pair.target)))

    @classmethod
    def _of(cls, pair: Pair, theirs: torch.Tensor, ours: torch.Tensor) -> HeadWrites:
        import torch

        device = runs_on(pair.target.hf) if takes_turns(pair.target.hf) else ours.device
        theirs, ours = theirs.to(device).float(), ours.to(device).float()
        change = theirs - ours
        stacked = torch.cat([theirs, change], 1)
        # Apple's devices have no float64; on a GPU the factors of a 9B pair take a second, on its CPU 15
        stacked = (stacked.cpu() if stacked.device.type == "mps" else stacked).double()
        d_head, narrow = theirs.shape[1], stacked.shape[2]
        if stacked.shape[1] < stacked.shape[2]:
            # M = R Qᵀ with orthonormal Q: only R matters for norms and inner products, and it is lower triangular
            stacked, narrow = torch.linalg.qr(stacked.mT, mode="r").R.mT, d_head
        # a head whose W_O is the same in both has no rounding error in ΔW either
        moved = change.abs().amax((1, 2), keepdim=True) > 0
        stacked = stacked.float().to(device)
        return cls(stacked[:, :d_head, :narrow].contiguous(), (stacked[:, d_head:] * moved).contiguous())

    def difference(self, z_source: torch.Tensor, z_target: torch.Tensor) -> torch.Tensor:
        """Coordinates of z_source @ W_O,source − z_target @ W_O,target, (counted, head, width).

        Exactly 0 where z and W_O are equal.
        """
        z_source, z_target = z_source.transpose(0, 1), z_target.transpose(0, 1)
        return _added(z_target @ self.change, (z_source - z_target) @ self.source).transpose(0, 1)

    def norms(
        self, z_source: torch.Tensor, z_target: torch.Tensor, z_moved: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Norms of differences of writes, each (counted, head): "distance", and with the moved z "own", "inherited"."""
        import torch

        # heads first: one small matrix product a head
        theirs, ours = z_source.transpose(0, 1), z_target.transpose(0, 1)
        changed = ours @ self.change
        found = {}
        if z_moved is not None:
            moved = z_moved.transpose(0, 1)
            found["own"] = _added(changed.clone(), (moved - ours) @ self.source)
            # with the source's weights on both sides
            found["inherited"] = (theirs - moved) @ self.source
        found["distance"] = _added(changed, (theirs - ours) @ self.source)
        return {name: torch.linalg.vector_norm(vectors, dim=-1).T for name, vectors in found.items()}


@dataclass(frozen=True)
class Written:
    """The heads' z, with what else is known of their writes: sums of absolute values, and norms, (rows, head).

    ``z`` has shape (batch, position, head · d_head), or (counted, head · d_head) once gathered.
    """

    z: torch.Tensor
    sums: torch.Tensor
    norms: torch.Tensor

    @classmethod
    def of(cls, z: torch.Tensor, weights: torch.Tensor) -> tuple[Written, torch.Tensor]:
        """(the writes of z with W_O (head, d_head, d_model), their sum over heads: z's shape but for the width)."""
        import torch

        heads, d_head, width = weights.shape
        flat = z.reshape(-1, heads, d_head)
        total, write = z.new_zeros(len(flat), width), z.new_empty(len(flat), width)
        sums, norms = [], []
        # in one place that stays in the cache; a vector norm of order 1 would take several times as long
        for head in range(heads):
            torch.mm(flat[:, head], weights[head], out=write)
            norms.append(torch.linalg.vector_norm(write, dim=-1))
            total.add_(write)
            sums.append(write.abs_().sum(-1))
        return cls(z, torch.stack(sums, 1), torch.stack(norms, 1)), total.reshape(*z.shape[:-1], width)

    def gathered(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> Written:
        """The same at the counted positions."""
        return Written(gather(self.z), gather(self.sums), gather(self.norms))


def _added(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """``wide`` with ``narrow`` added to its first coordinates, in place."""
    wide[..., : narrow.shape[-1]] += narrow
    return wide
