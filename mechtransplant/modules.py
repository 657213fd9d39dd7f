"""Addresses of modules: parse, print, enumerate, and find the weights that each one is.

``L5H3`` is a head, ``L5.mlp`` an MLP, ``L5.attn`` an attention block, ``L5.q_proj`` a linear layer, ``L5`` a whole
transformer block. Linear layers are the leaf linear modules inside the transformer blocks: embeddings, norms and the
output head are excluded (the seed paper's candidates).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from mechtransplant.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["linear", "head", "mlp", "attn", "block"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_BLOCK = re.compile(r"^(?P<stack>(?:.*\.)?(?:layers|h|blocks))\.(?P<layer>\d+)\.(?P<rest>.+)$")
_ATTENTION = re.compile(r"attn|attention")
#: what the last layer of an attention block and of an MLP is called
_ATTENTION_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
_MLP_OUTPUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
_ADDRESS = re.compile(r"^L(?P<layer>\d+)(?:H(?P<head>\d+)|\.(?P<name>[A-Za-z_][\w.]*))?$")


@dataclass(frozen=True)
class Address:
    """A parsed address; ``name`` is the linear layer's short name, ``head`` the head's index."""

    kind: Kind
    layer: int
    head: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        if self.kind == "head":
            return f"L{self.layer}H{self.head}"
        if self.kind == "block":
            return f"L{self.layer}"
        return f"L{self.layer}.{self.name or self.kind}"


def parse_address(text: str) -> Address:
    """``"L5H3"`` → Address(kind="head", layer=5, head=3); raises UsageError for anything that is no address."""
    match = _ADDRESS.match(str(text).strip())
    if match is None:
        raise UsageError(f"{text!r} is not a module address: expected L5H3 (head), L5.mlp, L5.attn, L5.q_proj, or L5")
    layer, head, name = int(match["layer"]), match["head"], match["name"]
    if head is not None:
        return Address("head", layer, head=int(head))
    if name is None:
        return Address("block", layer)
    if name in ("mlp", "attn"):
        return Address(cast(Kind, name), layer)
    return Address("linear", layer, name=name)


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


@dataclass(frozen=True)
class Layout:
    """Where a model's modules are: the linear layers of every block, and the sizes of its heads.

    ``linears`` maps address → qualified module name, in the order of layers; ``heads`` and ``kv_heads`` are counts
    per layer, ``d_head`` is the width of one head.
    """

    linears: dict[str, str]
    layers: int
    heads: int
    kv_heads: int
    d_head: int

    def is_feed_forward(self, address: str) -> bool:
        """Whether a linear layer belongs to the feed-forward block (else it is attention's)."""
        return not _ATTENTION.search(self.linears[address])

    def of_kind(self, kind: str) -> list[str]:
        """Every address of a kind, by layer; raises UnknownNameError."""
        if kind == "linear":
            return list(self.linears)
        if kind == "head":
            return [f"L{layer}H{head}" for layer in range(self.layers) for head in range(self.heads)]
        if kind in ("mlp", "attn"):
            return [f"L{layer}.{kind}" for layer in range(self.layers)]
        if kind == "block":
            return [f"L{layer}" for layer in range(self.layers)]
        raise UnknownNameError("kind of module", kind, KINDS)

    def check(self, address: str) -> Address:
        """The parsed address, if this model has it; raises UsageError with the nearest ones."""
        parsed = parse_address(address)
        if str(parsed) not in self.of_kind(parsed.kind):
            raise UnknownNameError("module", address, self.of_kind(parsed.kind))
        return parsed

    def linears_of(self, address: str) -> list[str]:
        """The linear layers inside an address (an MLP's, an attention block's, a whole block's, or itself)."""
        parsed = self.check(address)
        if parsed.kind == "linear":
            return [str(parsed)]
        inside = [a for a in self.linears if parse_address(a).layer == parsed.layer]
        if parsed.kind == "block":
            return inside
        return [a for a in inside if self.is_feed_forward(a) == (parsed.kind == "mlp")]

    def attention_output(self, layer: int) -> str:
        """The address of the attention block's last linear layer, whose input is every head's z, side by side."""
        return self._last(layer, "attn", _ATTENTION_OUTPUT)

    def mlp_output(self, layer: int) -> str:
        """The address of the MLP's last linear layer, whose output is the MLP's."""
        return self._last(layer, "mlp", _MLP_OUTPUT)

    def _last(self, layer: int, kind: str, names: tuple[str, ...]) -> str:
        inside = self.linears_of(f"L{layer}.{kind}")
        found = [a for a in inside if self.linears[a].rsplit(".", 1)[-1] in names]
        if len(found) != 1:
            raise UsageError(
                f"cannot tell which layer of L{layer}.{kind} is its last one among {', '.join(inside)}: expected one "
                f"named {', '.join(names)}; measure kind 'linear' instead"
            )
        return found[0]

    def regions(self, address: str, parameters: dict[str, Any]) -> list[Region]:
        """The parts of parameters that an address stands for; a head is its Q rows and O columns.

        ``parameters`` maps names to tensors. Raises UsageError for a head where Q, K and V are one fused layer.
        """
        parsed = self.check(address)
        if parsed.kind == "head":
            return self._head_regions(parsed, parameters)
        found = []
        for linear in self.linears_of(address):
            for suffix in ("weight", "bias"):
                name = f"{self.linears[linear]}.{suffix}"
                if name in parameters:
                    found.append(Region(name))
        return found

    def _head_regions(self, address: Address, parameters: dict[str, Any]) -> list[Region]:
        names = {suffix: self.linears.get(f"L{address.layer}.{suffix}") for suffix in ("q_proj", "o_proj")}
        if None in names.values():
            raise UsageError(
                f"{address}: this architecture has no separate q_proj and o_proj, and single heads of fused layouts "
                "cannot be addressed yet; use its linear layers"
            )
        assert address.head is not None
        start, stop = address.head * self.d_head, (address.head + 1) * self.d_head
        found = [
            Region(f"{names['q_proj']}.weight", 0, start, stop),
            Region(f"{names['o_proj']}.weight", 1, start, stop),
        ]
        if f"{names['q_proj']}.bias" in parameters:
            found.append(Region(f"{names['q_proj']}.bias", 0, start, stop))
        return found


def is_linear(module: Any) -> bool:
    """Whether a torch module is a linear layer, GPT-2's transposed Conv1D included."""
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def layout_of(model: Any) -> Layout:
    """The layout of a Hugging Face causal model's text decoder.

    Raises UsageError when no transformer blocks are found, when two layers would have one address, or when a block has
    no feed-forward linear layer (a mixture of experts keeps them in one tensor): a part of a model would be missing.
    """
    found: list[tuple[int, str, str]] = []
    # a multimodal model has blocks for its images too
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    for name, module in model.named_modules():
        match = _BLOCK.match(name)
        if match and is_linear(module) and name.startswith(prefix):
            found.append((int(match["layer"]), match["rest"], name))
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no linear layers in blocks named layers, h or blocks: cannot address it"
        )
    shorts = _short_names([rest for layer, rest, _ in found if layer == found[0][0]])
    linears = {f"L{layer}.{shorts.get(rest, rest)}": name for layer, rest, name in sorted(found, key=lambda f: f[0])}
    if len(linears) < len(found):
        raise UsageError(
            f"{type(model).__name__} has {len(found)} linear layers and only {len(linears)} addresses for them"
        )
    for layer in sorted({layer for layer, _, _ in found}):
        if all(_ATTENTION.search(rest) for number, rest, _ in found if number == layer):
            raise UsageError(
                f"L{layer} of {type(model).__name__} has no feed-forward linear layer (a mixture of experts has it in "
                "one tensor): such models cannot be addressed yet"
            )
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    heads = int(config.num_attention_heads)
    return Layout(
        linears,
        layers=max(layer for layer, _, _ in found) + 1,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        d_head=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """The last part of each path where that is unique within a block, else the whole path (GPT-2's two c_proj)."""
    paths = list(paths)
    last = [p.rsplit(".", 1)[-1] for p in paths]
    return {p: (s if last.count(s) == 1 else p) for p, s in zip(paths, last, strict=True)}


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
