"""Where the modules of a model are: every address, and the parts of parameters that it stands for.

Linear layers are the leaf linear modules inside the transformer blocks: embeddings, norms and the output head are
excluded (the seed paper's candidates). A layer that holds several projections (GPT-2's c_attn, GPT-NeoX's
query_key_value, Phi-3's qkv_proj and gate_up_proj) has one address as a layer and one for each part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.modules.addresses import KINDS, Address, is_norm, parse_address
from mechtransplant.modules.regions import FUSED_ATTENTION, FUSED_MLP, Projection, Region, split_attention

_BLOCK = re.compile(r"^(?P<stack>(?:.*\.)?(?:layers|h|blocks))\.(?P<layer>\d+)\.(?P<rest>.+)$")
_ATTENTION = re.compile(r"attn|attention")
#: what the last layer of an attention block and of an MLP is called
_ATTENTION_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
_MLP_OUTPUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")


@dataclass(frozen=True)
class Layout:
    """Where a model's modules are: the linear layers of every block, and the sizes of its heads.

    ``linears`` maps address → qualified module name, in the order of layers; ``heads`` and ``kv_heads`` are counts
    per layer, ``d_head`` is the width of one head. ``parts`` are the projections of layers that hold several,
    ``others`` the norms and embeddings, and ``transposed`` the layers whose weight is (in, out) (GPT-2's Conv1D).
    ``neurons`` is how many the MLP of each layer has, 0 where its last layer cannot be told.
    """

    linears: dict[str, str]
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    parts: dict[str, Projection] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    neurons: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """How many query heads read one K/V head."""
        return self.heads // self.kv_heads

    def is_feed_forward(self, address: str) -> bool:
        """Whether a linear layer or its part belongs to the feed-forward block (else it is attention's)."""
        return not _ATTENTION.search(self.linears[self.parts[address].linear if address in self.parts else address])

    def of_kind(self, kind: str) -> list[str]:
        """Every address of a kind, by layer; raises UnknownNameError.

        "part" lists linear layers with those that hold several projections taken apart.
        """
        if kind == "linear":
            return list(self.linears)
        if kind == "part":
            inside: dict[str, list[str]] = {}
            for part, projection in self.parts.items():
                inside.setdefault(projection.linear, []).append(part)
            return [a for linear in self.linears for a in inside.get(linear, [linear])]
        if kind == "head":
            return [f"L{layer}H{head}" for layer in range(self.layers) for head in range(self.heads)]
        if kind == "neuron":
            # says which layer of an MLP cannot be told
            return [a for layer in range(self.layers) if self.mlp_output(layer) for a in self.neurons_of(layer)]
        if kind in ("mlp", "attn"):
            return [f"L{layer}.{kind}" for layer in range(self.layers)]
        if kind == "block":
            return [f"L{layer}" for layer in range(self.layers)]
        if kind in ("norm", "embedding"):
            return [a for a in self.others if is_norm(a) == (kind == "norm")]
        raise UnknownNameError("kind of module", kind, KINDS)

    def check(self, address: str) -> Address:
        """The parsed address, if this model has it; raises UsageError with the nearest ones."""
        parsed = parse_address(address)
        name = str(parsed)
        if name in self.parts:
            return Address("part", parsed.layer, name=parsed.name)
        if name in self.others:
            return Address("norm" if is_norm(name) else "embedding", parsed.layer, name=parsed.name)
        if name in self.linears:
            return Address("linear", parsed.layer, name=parsed.name)
        inside = 0 <= parsed.layer < self.layers
        indices = {"head": (parsed.head, self.heads), "neuron": (parsed.neuron, self.neurons_in(parsed.layer))}
        index, count = indices.get(parsed.kind, (0, int(parsed.kind in ("mlp", "attn", "block"))))
        if not inside or index is None or index >= count:
            near = [*self.linears, *self.parts, *self.others] if parsed.name else self._examples(parsed.kind)
            near += [f"L{parsed.layer}.mlp", f"L{parsed.layer}.attn"] if inside else []
            advice = f"Layers are 0 to {self.layers - 1}"
            advice += f", {parsed.kind}s 0 to {count - 1}." if parsed.kind in indices and count else "."
            if name == "lm_head":
                advice += " The output head is tied to the embedding, which is one address."
            raise UnknownNameError("module", address, near, advice)
        return parsed

    def neurons_in(self, layer: int) -> int:
        """How many neurons the MLP of a layer has."""
        return self.neurons[layer] if 0 <= layer < len(self.neurons) else 0

    def neurons_of(self, layer: int) -> list[str]:
        """The addresses of a layer's neurons."""
        return [f"L{layer}N{neuron}" for neuron in range(self.neurons_in(layer))]

    def _examples(self, kind: str) -> list[str]:
        """Addresses of a kind for an error to name: of neurons the last of every layer, else all."""
        if kind == "neuron":
            return [f"L{layer}N{count - 1}" for layer, count in enumerate(self.neurons) if count]
        return self.of_kind(kind)

    def linears_of(self, address: str) -> list[str]:
        """The linear layers inside an address (an MLP's, an attention block's, a whole block's, or itself)."""
        parsed = self.check(address)
        if parsed.kind == "linear":
            return [str(parsed)]
        inside = self._by_layer.get(parsed.layer, [])
        if parsed.kind == "block":
            return list(inside)
        return [a for a in inside if self.is_feed_forward(a) == (parsed.kind == "mlp")]

    @cached_property
    def _by_layer(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for address in self.linears:
            found.setdefault(parse_address(address).layer, []).append(address)
        return found

    def block(self, layer: int) -> str:
        """The qualified name of a transformer block."""
        match = _BLOCK.match(self.linears[self.linears_of(f"L{layer}")[0]])
        assert match is not None
        return f"{match['stack']}.{layer}"

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

    # --- parts of parameters ---------------------------------------------------------------------------------------

    def regions(self, address: str, parameters: Mapping[str, Any]) -> list[Region]:
        """The parts of parameters that an address stands for; a head is its Q rows and O columns, with Q's bias.

        A neuron is its rows of the MLP's first layers (gate, up), with their biases, and its column of the last one.
        ``parameters`` maps names to tensors. K and V belong to a head's group (:meth:`kv_regions`); the bias of the
        output projection, and norms of queries and keys, belong to no head.

        Raises UsageError for a head where the layout of Q, K and V is not known, and for a neuron of an MLP whose first
        layers cannot be told apart by neurons.
        """
        parsed = self.check(address)
        if parsed.kind == "head":
            assert parsed.head is not None
            span = parsed.head * self.d_head, (parsed.head + 1) * self.d_head
            output = self.attention_output(parsed.layer)
            axis = 0 if output in self.transposed else 1
            columns = Region(f"{self.linears[output]}.weight", axis, *span)
            return [*self._projected(parsed.layer, "q_proj", span, parameters), columns]
        if parsed.neuron is not None:
            lines = self._neuron_lines(parsed.layer, parameters)
            return [Region(name, axis, at + parsed.neuron, at + parsed.neuron + 1) for name, axis, at in lines]
        if parsed.kind == "part":
            projection = self.parts[str(parsed)]
            return self._outputs(projection, (0, sum(b - a for a, b in projection.chunks)), parameters)
        modules = [self.others[str(parsed)]] if str(parsed) in self.others else []
        modules = modules or [self.linears[a] for a in self.linears_of(address)]
        names = [f"{module}.{suffix}" for module in modules for suffix in ("weight", "bias")]
        found = [Region(name) for name in names if name in parameters]
        if not found:
            raise UsageError(f"{address} has no weights in this model: name another module")
        return found

    def kv_regions(self, layer: int, group: int, parameters: Mapping[str, Any]) -> list[Region]:
        """K and V of one group of heads: the rows of the K and V projections, with their biases."""
        span = group * self.d_head, (group + 1) * self.d_head
        return [r for name in ("k_proj", "v_proj") for r in self._projected(layer, name, span, parameters)]

    def group(self, head: int) -> int:
        """The K/V head that a query head reads."""
        return head // self.group_size

    def _neuron_lines(self, layer: int, parameters: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """Where the first neuron of a layer is: its row of all that the MLP begins with, its column of the last layer.

        (parameter, axis, place); the others follow it. Looked up once, since there are thousands.
        """
        if layer not in self._lines:
            found, output, count = [], self.mlp_output(layer), self.neurons_in(layer)
            fused = {projection.linear for projection in self.parts.values()}
            begins = [p for p in self.parts.values() if p.linear in self.linears_of(f"L{layer}.mlp")]
            for linear in self.linears_of(f"L{layer}.mlp"):
                if linear != output and linear not in fused:
                    weight = parameters[f"{self.linears[linear]}.weight"]
                    begins.append(Projection(linear, ((0, weight.shape[1 if linear in self.transposed else 0]),)))
            for projection in begins:
                width = sum(b - a for a, b in projection.chunks)
                if width != count:
                    raise UsageError(
                        f"{projection.linear} has {width} outputs for {count} neurons: they cannot be told apart; use "
                        "the MLP or its linear layers"
                    )
                for region in self._outputs(projection, (0, 1), parameters):
                    found.append((region.parameter, region.axis or 0, region.start))
            found.append((f"{self.linears[output]}.weight", 0 if output in self.transposed else 1, 0))
            self._lines[layer] = found
        return self._lines[layer]

    @cached_property
    def _lines(self) -> dict[int, list[tuple[str, int, int]]]:
        return {}

    def _projected(self, layer: int, name: str, span: tuple[int, int], parameters: Mapping[str, Any]) -> list[Region]:
        address = f"L{layer}.{name}"
        projection = self.parts.get(address)
        if projection is None:
            if address not in self.linears:
                fused = ", ".join(self.linears_of(f"L{layer}.attn"))
                raise UsageError(
                    f"L{layer} has no {name}, and where its heads lie inside {fused} is not known for this "
                    "architecture: use its linear layers"
                )
            heads = self.heads if name == "q_proj" else self.kv_heads
            weight = parameters[f"{self.linears[address]}.weight"]
            if weight.shape[0] != heads * self.d_head:
                raise UsageError(
                    f"{address} has {weight.shape[0]} outputs, not {heads} heads of {self.d_head}: its heads cannot be "
                    "told apart; use its linear layers"
                )
            projection = Projection(address, ((0, heads * self.d_head),))
        return self._outputs(projection, span, parameters)

    def _outputs(self, projection: Projection, span: tuple[int, int], parameters: Mapping[str, Any]) -> list[Region]:
        """Weights and biases of some outputs of a projection."""
        name, found = self.linears[projection.linear], []
        axis = 1 if projection.linear in self.transposed else 0
        for start, stop in projection.within(*span):
            found.append(Region(f"{name}.weight", axis, start, stop))
            if f"{name}.bias" in parameters:
                found.append(Region(f"{name}.bias", 0, start, stop))
        return found


def is_linear(module: Any) -> bool:
    """Whether a torch module is a linear layer, GPT-2's transposed Conv1D included."""
    import torch

    return isinstance(module, torch.nn.Linear) or is_transposed(module)


def is_transposed(module: Any) -> bool:
    """Whether a linear layer keeps its weight as (in, out)."""
    return type(module).__name__ == "Conv1D"


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
    others = _others(model, prefix, set(linears.values()))
    _check_complete(model, others)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    heads = int(config.num_attention_heads)
    sizes = {
        "heads": heads,
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "d_head": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    }
    layout = Layout(
        linears,
        max(layer for layer, _, _ in found) + 1,
        sizes["heads"],
        sizes["kv_heads"],
        sizes["d_head"],
        parts=_parts(model, linears, str(config.model_type), sizes),
        others=others,
        transposed=frozenset(a for a, name in linears.items() if is_transposed(model.get_submodule(name))),
    )
    return replace(layout, neurons=tuple(_neurons(model, layout, layer) for layer in range(layout.layers)))


def _neurons(model: Any, layout: Layout, layer: int) -> int:
    """How many numbers the last layer of an MLP reads; 0 where it is not known which layer that is."""
    try:
        output = layout.mlp_output(layer)
    except UsageError:
        return 0
    shape = model.get_submodule(layout.linears[output]).weight.shape
    return int(shape[0 if output in layout.transposed else 1])


def _parts(model: Any, linears: dict[str, str], model_type: str, sizes: dict[str, int]) -> dict[str, Projection]:
    """The projections inside layers that hold several, where it is known how they lie."""
    name, by_head = FUSED_ATTENTION.get(model_type, ("", False))
    found = {}
    for address, path in linears.items():
        block, short = address.split(".", 1)
        module = model.get_submodule(path)
        width = module.weight.shape[1 if is_transposed(module) else 0]
        if short == name and width == (sizes["heads"] + 2 * sizes["kv_heads"]) * sizes["d_head"]:
            for part, projection in split_attention(address, by_head, **sizes).items():
                found[f"{block}.{part}"] = projection
        elif short == FUSED_MLP and model_type in FUSED_ATTENTION:
            found[f"{block}.gate_proj"] = Projection(address, ((0, width // 2),))
            found[f"{block}.up_proj"] = Projection(address, ((width // 2, width),))
    return found


def _others(model: Any, prefix: str, linears: set[str]) -> dict[str, str]:
    """Norms and embeddings: address → module path. A tied output head has no parameter of its own, and no address."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters())
    inside: dict[int, list[tuple[str, str]]] = {}
    outside: list[str] = []
    for path in owners:
        # not the blocks and embeddings of a multimodal model's images
        of_text = path.startswith(prefix) or (head is not None and model.get_submodule(path) is head)
        if path in linears or not of_text:
            continue
        match = _BLOCK.match(path)
        if match:
            inside.setdefault(int(match["layer"]), []).append((match["rest"], path))
        else:
            outside.append(path)
    shorts = _short_names(outside)
    found = {shorts[path].replace(".", "_"): path for path in outside}
    for layer, members in sorted(inside.items()):
        names = _short_names([rest for rest, _ in members])
        found.update({f"L{layer}.{names[rest]}": path for rest, path in members})
    return found


def _check_complete(model: Any, others: dict[str, str]) -> None:
    """Raise UsageError for a block with matrices that are in no linear layer: experts in one tensor, convolutions."""
    for address, path in others.items():
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            if address.startswith("L") and parameter.dim() > 1:
                shape = " × ".join(map(str, parameter.shape))
                raise UsageError(
                    f"{path}.{name} of {type(model).__name__} ({shape}) is in no linear layer (experts in one tensor, "
                    "a convolution, a state-space layer): such models cannot be addressed yet"
                )


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """The last part of each path where that is unique within a block, else the whole path (GPT-2's two c_proj)."""
    paths = list(paths)
    last = [p.rsplit(".", 1)[-1] for p in paths]
    return {p: (s if last.count(s) == 1 else p) for p, s in zip(paths, last, strict=True)}
