"""Addresses of modules: parse and print.

``L5H3`` is a head, ``L5N12`` a neuron of an MLP, ``L5.mlp`` the MLP, ``L5.attn`` an attention block, ``L5.q_proj`` a
linear layer (or a part of one, where a layer holds several projections), ``L5`` a whole transformer block. Norms and
embeddings have addresses too (``L5.input_layernorm``, ``embed_tokens``), but are in no other module: they move only
when they are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast, get_args

from mechtransplant.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["linear", "head", "neuron", "mlp", "attn", "block", "part", "norm", "embedding"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_IN_BLOCK = re.compile(
    r"^L(?P<layer>\d+)(?:H(?P<head>\d+)|N(?P<neuron>\d+)|\.(?P<name>[A-Za-z_][\w.]*))?$",
)
_OUTSIDE = re.compile(r"^[a-z]{2,}[a-z0-9_]*$")
_NORM = re.compile(r"norm|(^|\.)ln_")


@dataclass(frozen=True)
class Address:
    """A parsed address; ``name`` is the layer's short name, ``head`` and ``neuron`` are indices, ``layer`` −1 outside
    blocks."""

    kind: Kind
    layer: int
    head: int | None = None
    name: str | None = None
    neuron: int | None = None

    def __str__(self) -> str:
        if self.layer < 0:
            return str(self.name)
        if self.kind == "head":
            return f"L{self.layer}H{self.head}"
        if self.kind == "neuron":
            return f"L{self.layer}N{self.neuron}"
        if self.kind == "block":
            return f"L{self.layer}"
        return f"L{self.layer}.{self.name or self.kind}"


def share_no_weights(kinds: Iterable[str]) -> bool:
    """Whether modules of these kinds have no number in common: of one kind, or heads beside MLPs or their neurons."""
    found = set(kinds)
    return len(found) == 1 or found in ({"head", "mlp"}, {"head", "neuron"})


def is_norm(name: str) -> bool:
    """Whether a layer of this name is a normalisation."""
    return _NORM.search(name) is not None


def parse_address(text: str) -> Address:
    """``"L5H3"`` → Address(kind="head", layer=5, head=3); raises UsageError for anything that is no address.

    Only a model's layout knows whether ``L5.q_proj`` is a layer of its own or part of one: here it is "linear".
    """
    return _parsed(str(text).strip())


# a layout asks for the same few hundred again and again, or for all neurons of a model
@lru_cache(maxsize=1 << 18)
def _parsed(text: str) -> Address:
    if _OUTSIDE.match(text):
        return Address("norm" if is_norm(text) else "embedding", -1, name=text)
    match = _IN_BLOCK.match(text)
    if match is None:
        raise UsageError(
            f"{text!r} is not a module address: expected L5H3 (head), L5N12 (neuron), L5.mlp, L5.attn, L5.q_proj, or L5"
        )
    layer, head, name = int(match["layer"]), match["head"], match["name"]
    if head is not None:
        return Address("head", layer, head=int(head))
    if match["neuron"] is not None:
        return Address("neuron", layer, neuron=int(match["neuron"]))
    if name is None:
        return Address("block", layer)
    if name in ("mlp", "attn"):
        return Address(cast(Kind, name), layer)
    return Address("norm" if is_norm(name) else "linear", layer, name=name)


def module_frame(addresses: Iterable[str]) -> pd.DataFrame:
    """A tidy frame of addresses: columns module, kind, layer, head (-1 where there is none)."""
    import pandas as pd

    parsed = [parse_address(a) for a in addresses]
    return pd.DataFrame(
        {
            "module": [str(a) for a in parsed],
            "kind": [a.kind for a in parsed],
            "layer": [a.layer for a in parsed],
            "head": [-1 if a.head is None else a.head for a in parsed],
        }
    )


def heads_in_words(numbers: list[int], noun: str = "head") -> str:
    """``[0, 1, 2, 5]`` → "heads 0–2, 5"; ``[5]`` → "head 5"; neurons alike."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    said = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)
    return f"{noun} {said}" if len(numbers) == 1 else f"{noun}s {said}"
