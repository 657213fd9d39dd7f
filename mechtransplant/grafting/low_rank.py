"""Grafts along few directions: of every module's change only the largest singular ones, or as many at random."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from mechtransplant.errors import check_count, check_seed
from mechtransplant.grafting.operators import register, seed_of_part

if TYPE_CHECKING:
    from torch import Tensor

#: how many times as many directions random ones are drawn from
POOL = 4
#: bytes of directions that are remembered, those that were used last
REMEMBERED = 2 << 30
_DIRECTIONS: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = OrderedDict()


@register
@dataclass(frozen=True)
class LowRank:
    """Only the largest singular directions of the change: of every matrix the best approximation of that rank (Eckart
    and Young 1936), as in extracting a LoRA from two checkpoints; biases move whole.

    All numbers of a matrix of m × n change, along ``rank`` directions, which take rank · (m + n) numbers to write
    down (see ``Graft.carried_count``). With ``draw``, a seed, as many directions are drawn at random instead, from
    the four times as many largest, or as many as the change has; the draw depends on the seed and the part's name.
    Directions of a change come from its singular value decomposition, where the numbers lie: seconds for 135 M
    numbers, and much more for a large model on a CPU; those of the last changes are remembered.
    """

    rank: int = 8
    draw: int | None = None
    name: ClassVar[str] = "low_rank"
    #: a decomposition rounds otherwise on other processors and devices (see ``export.verify``)
    reproducible: ClassVar[bool] = False
    equation: ClassVar[str] = "t + λ Σ_{i ≤ rank} σᵢ uᵢ vᵢᵀ, of s − b = Σ σᵢ uᵢ vᵢᵀ"

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if self.draw is not None:
            check_seed(self.draw)

    def __call__(self, target: Tensor, source: Tensor, base: Tensor | None, strength: float, key: str) -> Tensor:
        change = source - (target if base is None else base)
        return self._kept(change, key).mul_(strength).add_(target)

    def carried(self, shape: Sequence[int]) -> int:
        """How many numbers the directions of a part of that shape take to write down: never more than it has."""
        return min(self.rank * sum(shape), prod(shape)) if len(shape) == 2 else prod(shape)

    def _moves_whole(self, change: Tensor) -> bool:
        """Whether a part is no matrix, has no more directions than are kept, or no change at all."""
        return change.dim() != 2 or min(change.shape) <= self.rank or not change.any()

    def _pool(self, sizes: Tensor) -> int:
        """How many directions random ones are drawn from: of a change of low rank the others are nothing."""
        return max(self.rank, int((sizes[: POOL * self.rank] > 1e-4 * sizes[0]).sum()))

    def pool_of(self, change: Tensor) -> int:
        """How many directions of a change random ones are drawn from; 0 of a part that moves whole."""
        if self._moves_whole(change):
            return 0
        return self._pool(directions(change, max(64, POOL * self.rank))[1])

    def _kept(self, change: Tensor, key: str) -> Tensor:
        import torch

        if self._moves_whole(change):
            return change
        # the same ones for every small rank
        u, sizes, v = directions(change, max(64, POOL * self.rank))
        chosen = torch.arange(self.rank)
        if self.draw is not None:
            pool = self._pool(sizes)
            generator = torch.Generator().manual_seed(seed_of_part(self.draw, key))
            chosen = torch.randperm(pool, generator=generator)[: self.rank].sort().values
        chosen = chosen.to(change.device)
        with _one_thread():
            return (u[:, chosen] * sizes[chosen]) @ v[chosen]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread: every process then rounds alike, however many it has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def directions(change: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(u, σ, vᵀ) of the ``count`` largest singular directions of a matrix; the same numbers have the same ones."""
    import torch

    data = change.detach().contiguous()
    # by content: a graft in place, a turned pair or another run's source are other changes, or the same
    digest = hashlib.blake2b(data.cpu().numpy().data, digest_size=16).digest()
    key = (digest, tuple(change.shape), str(change.dtype), count, str(change.device))
    if key in _DIRECTIONS:
        _DIRECTIONS.move_to_end(key)
        return _DIRECTIONS[key]
    with _one_thread():
        u, sizes, v = torch.linalg.svd(data, full_matrices=False)
    found = (u[:, :count].clone(), sizes[:count].clone(), v[:count].clone())
    _DIRECTIONS[key] = found
    while len(_DIRECTIONS) > 1 and sum(t.nbytes for held in _DIRECTIONS.values() for t in held) > REMEMBERED:
        _DIRECTIONS.popitem(last=False)
    return found
