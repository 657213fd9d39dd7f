"""One model: the clean Hugging Face model, its tokenizer, and a bridge with hook points over the same parameters.

The clean Hugging Face model is the truth. ``LanguageModel.bridge`` is a TransformerLens bridge, raw, on a twin that
shares the parameters: a write to either is seen by both, and ``hf`` keeps plain Hugging Face speed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mechtransplant.display import html_table
from mechtransplant.errors import UsageError
from mechtransplant.modules import Layout, layout_of
from mechtransplant.weights import awaken, count_positions, moves, parts_of, takes_turns


@dataclass
class LanguageModel:
    """A causal model with its tokenizer: ``hf`` (clean), ``bridge`` (hook points), ``name``, ``fingerprint``."""

    name: str
    hf: Any
    tokenizer: Any
    #: called with the bridge when it is made: what acts on the model by then acts on the bridge too
    when_bridged: list[Callable[[Any], None]] = field(default_factory=list, repr=False, compare=False)
    #: how often the weights had moved when the bridge was made, or looked at
    bridged_at: int = field(default=0, repr=False, compare=False)

    @cached_property
    def bridge(self) -> Any:
        """A raw TransformerBridge over the same parameters; made when first asked for (about 4 s of imports)."""
        if parts_of(self.hf) is not None:
            raise UsageError(
                f"{self.name} is on several devices, where it has no bridge: what needs none (shifts, grafts, patches, "
                "evaluations, rankings) works as it is; for a bridge load it on one device"
            )
        from transformer_lens.model_bridge import TransformerBridge

        self.awaken()
        self.bridged_at = moves(self.hf)
        # booting replaces submodules, so it gets a twin that shares every parameter
        twin = copy_without_hooks(self.hf, share_parameters=True)
        folder = getattr(self.hf.config, "_name_or_path", "") or self.name
        # a model that was built from a config does not say what it is, and the bridge asks
        twin.config.architectures = twin.config.architectures or [type(self.hf).__name__]
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=twin, tokenizer=self.tokenizer, device=str(self.hf.device)
        )
        if takes_turns(self.hf):
            bridge.original_model.register_forward_pre_hook(lambda *_: self.awaken())
        for act in self.when_bridged:
            act(bridge)
        return bridge

    def awaken(self) -> None:
        """Have the weights where the model runs; for a pair that is loaded one at a time (see ``weights.residence``).

        Everything in this package does so by itself, and so does a forward pass.
        """
        awaken(self.hf)
        if moves(self.hf) != self.bridged_at:
            # a bridge may hold views of where the weights were
            self.bridged_at = moves(self.hf)
            self.weights_changed()

    def weights_changed(self) -> None:
        """Forget a bridge that holds copies: the next use makes one of the weights as they are then."""
        if "bridge" in self.__dict__ and holds_copies(self.hf, self.bridge):
            del self.__dict__["bridge"]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of all parameters as they are now (a graft in place changes it)."""
        from mechtransplant.weights import fingerprint

        return fingerprint(self.hf)

    @cached_property
    def layout(self) -> Layout:
        """Where the model's modules are."""
        return layout_of(self.hf)

    def output_weights(self, layer: int) -> Any:
        """W_O of every head of a layer, shape (head, d_head, d_model): a head's write is z @ W_O[head]."""
        inward = self._inward(self.layout.attention_output(layer))
        heads, d_head = self.layout.heads, self.layout.d_head
        if len(inward) != heads * d_head:
            raise UsageError(f"the output projection of L{layer} does not read {heads} heads of {d_head} numbers each")
        return inward.reshape(heads, d_head, -1)

    def neuron_weights(self, layer: int) -> Any:
        """What every neuron of a layer writes for one unit of activation, shape (neuron, d_model)."""
        return self._inward(self.layout.mlp_output(layer))

    def _inward(self, address: str) -> Any:
        """A linear layer's weight as (in, out)."""
        weight = self.hf.get_submodule(self.layout.linears[address]).weight.detach()
        # GPT-2's Conv1D keeps its weight the other way round
        return weight if address in self.layout.transposed else weight.T

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.hf.parameters()) / 1e6
        return f"LanguageModel({self.name!r}, {type(self.hf).__name__}, {millions:.1f} M parameters)"

    def described(self) -> dict[str, str]:
        """What it is, in words, for a notebook's table."""
        layout, text = self.layout, self.hf.config.get_text_config()
        shared = "" if layout.heads == layout.kv_heads else f" ({layout.kv_heads} with keys and values)"
        return {
            "model": self.name,
            "class": type(self.hf).__name__,
            "parameters": f"{sum(p.numel() for p in self.hf.parameters()):,}",
            "layers": str(layout.layers),
            "heads a layer": f"{layout.heads}{shared}",
            "width": str(text.hidden_size),
            "vocabulary": f"{text.vocab_size:,}",
            "numbers": f"{str(self.hf.dtype).removeprefix('torch.')} on {self.hf.device}",
        }

    def _repr_html_(self) -> str:
        return html_table(self.described().items())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def copy_without_hooks(hf: Any, share_parameters: bool = False) -> Any:
    """A copy of a Hugging Face model without what acts on it now: a copied hook would act on nobody's behalf."""
    kept = [(module, name, getattr(module, name)) for module in hf.modules() for name in _HOOKS]
    try:
        for module, name, hooks in kept:
            setattr(module, name, type(hooks)())
        made = copy.deepcopy(hf, memo={id(p): p for p in hf.parameters()} if share_parameters else None)
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)
    if parts_of(made) is not None:
        # no effect on numbers: without it logits of chosen positions cannot be asked for
        count_positions(made)
    return made


def holds_copies(hf: Any, bridge: Any) -> bool:
    """Whether a bridge has weights of its own (GPT-NeoX's Q, K and V are copied), which do not follow a graft."""
    shared = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    return any(p.untyped_storage().data_ptr() not in shared for p in bridge.original_model.parameters())


class Parameters(Mapping[str, Any]):
    """A model's parameters by name, looked up when they are asked for: a model may be given new ones."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf

    def __getitem__(self, name: str) -> Any:
        try:
            return self.hf.get_parameter(name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.hf.named_parameters())

    def __len__(self) -> int:
        return sum(1 for _ in self)
