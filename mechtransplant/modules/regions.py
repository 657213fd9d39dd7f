"""Parts of parameters, and where the projections lie inside a layer that holds several of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: model type → (name of the layer that holds Q, K and V, whether it holds them head by head)
FUSED_ATTENTION = {
    "phi3": ("qkv_proj", False),
    "gpt2": ("c_attn", False),
    "gpt_neox": ("query_key_value", True),
}
#: name of the layer that holds an MLP's gate in its first half and its up projection in the second
FUSED_MLP = "gate_up_proj"
Span = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """Part of a parameter: all of it (``axis`` None), or ``start:stop`` along one axis."""

    parameter: str
    axis: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, tensor: Any) -> Any:
        """The view of that part."""
        return tensor if self.axis is None else tensor.narrow(self.axis, self.start, self.stop - self.start)

    def __str__(self) -> str:
        if self.axis is None:
            return self.parameter
        return f"{self.parameter}[{':, ' * self.axis}{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Projection:
    """The outputs of one projection inside a linear layer: ``chunks`` of its output axis, in the projection's order."""

    linear: str
    chunks: tuple[Span, ...]

    def within(self, start: int, stop: int) -> Iterator[Span]:
        """Where the projection's own outputs ``start:stop`` lie in the layer."""
        passed = 0
        for first, last in self.chunks:
            low, high = max(start - passed, 0), min(stop - passed, last - first)
            if low < high:
                yield first + low, first + high
            passed += last - first


def split_attention(linear: str, by_head: bool, heads: int, kv_heads: int, d_head: int) -> dict[str, Projection]:
    """Q, K and V of a fused layer: one after the other, or head by head (GPT-NeoX: q, k, v of head 0, of head 1, …)."""
    if by_head:
        starts = range(0, 3 * d_head * heads, 3 * d_head)
        return {
            name: Projection(linear, tuple((s + i * d_head, s + (i + 1) * d_head) for s in starts))
            for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
        }
    q, kv = heads * d_head, kv_heads * d_head
    bounds = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    return {name: Projection(linear, (span,)) for name, span in bounds.items()}
