"""Where activations are read and changed: one *site* a module, in the Hugging Face model and in the bridge.

| site | TransformerLens hook | Hugging Face model | shape |
|---|---|---|---|
| ``z`` | ``attn.hook_z`` | input of the output projection | batch pos head d_head |
| ``post`` | ``mlp.hook_post`` | input of the MLP's last layer | batch pos neuron |
| ``attn`` | ``attn.hook_out`` | output of the output projection | batch pos d_model |
| ``mlp`` | ``mlp.hook_out`` | output of the MLP's last layer | batch pos d_model |
| ``resid_pre`` | ``hook_resid_pre`` | input of the block | batch pos d_model |
| ``resid_post`` | ``hook_resid_post`` | output of the block | batch pos d_model |

A norm after the attention block or the MLP (Gemma 2 and 3, OLMo 2) comes after these sites.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mechtransplant.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.modules import Layout
    from mechtransplant.pair import LanguageModel

Place = Literal["z", "post", "attn", "mlp", "resid_pre", "resid_post"]
HOOKS: dict[Place, str] = {
    "z": "attn.hook_z",
    "post": "mlp.hook_post",
    "attn": "attn.hook_out",
    "mlp": "mlp.hook_out",
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
}
_RESIDUAL = re.compile(r"^L(\d+)\.(resid_pre|resid_post)$")


@dataclass(frozen=True)
class Site:
    """A place in a layer."""

    place: Place
    layer: int

    @property
    def hook(self) -> str:
        """The TransformerLens name."""
        return f"blocks.{self.layer}.{HOOKS[self.place]}"

    def parts(self, indices: Sequence[int]) -> tuple[Any, ...]:
        """What picks some heads, or neurons, of the site's tensor."""
        return (..., list(indices), slice(None)) if self.place == "z" else (..., list(indices))


@dataclass(frozen=True)
class Module:
    """A module whose activations can be moved: its address, its site, and which head or neuron it is there."""

    address: str
    site: Site
    head: int | None = None
    neuron: int | None = None

    @property
    def part(self) -> int | None:
        """Which part of the site's tensor it is; None for all of it."""
        return self.neuron if self.head is None else self.head


def modules_of(layout: Layout, addresses: Iterable[str]) -> list[Module]:
    """Heads, neurons, MLPs, attention blocks, the residual stream (``L5.resid_pre``; ``L5.resid_post`` or ``L5``).

    Raises UsageError for an unknown address, and for linear layers, norms and embeddings.
    """
    found: dict[str, Module] = {}
    for text in [addresses] if isinstance(addresses, str) else addresses:
        match = _RESIDUAL.match(str(text))
        if match and int(match[1]) < layout.layers:
            place: Place = "resid_pre" if match[2] == "resid_pre" else "resid_post"
            found[str(text)] = Module(str(text), Site(place, int(match[1])))
            continue
        address = layout.check(str(text))
        if address.kind == "head":
            found[str(address)] = Module(str(address), Site("z", address.layer), address.head)
        elif address.kind == "neuron":
            found[str(address)] = Module(str(address), Site("post", address.layer), neuron=address.neuron)
        elif address.kind in ("mlp", "attn"):
            found[str(address)] = Module(str(address), Site("mlp" if address.kind == "mlp" else "attn", address.layer))
        elif address.kind == "block":
            found[f"{address}.resid_post"] = Module(f"{address}.resid_post", Site("resid_post", address.layer))
        else:
            raise UsageError(
                f"{address} is a {address.kind} layer, whose activations are not patched: expected a head (L5H3), a "
                "neuron (L5N12), an MLP (L5.mlp), an attention block (L5.attn) or the residual stream (L5.resid_pre, "
                "L5.resid_post)"
            )
    return list(found.values())


#: gets a site's tensor in the shape of the table above; gives the new one, or None to leave it
Editor = Callable[["Tensor"], "Tensor | None"]


class Body:
    """One of the two forms of a model that run: the plain Hugging Face model, or the bridge over its parameters."""

    def __init__(self, model: LanguageModel, bridge: Any | None = None) -> None:
        self.model, self.bridge = model, bridge
        #: the torch module whose forward pass is the model's
        self.root: Any = model.hf if bridge is None else bridge.original_model

    def listen(self, site: Site, edit: Editor) -> Callable[[], None]:
        """Call ``edit`` with a site's tensor on every pass; returns a function that ends it."""
        return self._in_hf(site, edit) if self.bridge is None else self._in_bridge(site, edit)

    def _in_bridge(self, site: Site, edit: Editor) -> Callable[[], None]:
        point = self.bridge.hook_dict.get(site.hook)  # type: ignore[union-attr]
        if point is None:
            raise UsageError(f"TransformerLens has no {site.hook} for {type(self.model.hf).__name__}")
        # permanent, so that the bridge's reset_hooks leaves it: this block's end takes it away
        point.add_hook(lambda tensor, hook: edit(tensor), is_permanent=True)
        handle = point.fwd_hooks[-1]

        def end() -> None:
            handle.hook.remove()
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)

        return end

    def _in_hf(self, site: Site, edit: Editor) -> Callable[[], None]:
        layout = self.model.layout
        if site.place in ("resid_pre", "resid_post"):
            block = self.model.hf.get_submodule(layout.block(site.layer))
            if site.place == "resid_pre":
                return block.register_forward_pre_hook(_before(edit), with_kwargs=True).remove
            return block.register_forward_hook(_after(edit)).remove
        last = layout.mlp_output if site.place in ("mlp", "post") else layout.attention_output
        linear = self.model.hf.get_submodule(layout.linears[last(site.layer)])
        if site.place == "post":
            return linear.register_forward_pre_hook(_first(edit)).remove
        if site.place != "z":
            return linear.register_forward_hook(_after(edit)).remove
        heads = layout.heads

        def by_head(module: Any, inputs: tuple[Any, ...]) -> Any:
            z = inputs[0]
            edited = edit(z.unflatten(-1, (heads, -1)))
            return None if edited is None else (edited.flatten(-2), *inputs[1:])

        return linear.register_forward_pre_hook(by_head).remove


def _after(edit: Editor) -> Any:
    """A forward hook for a module whose output is a tensor, or a tuple that begins with one."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        inside = isinstance(output, tuple)
        edited = edit(output[0] if inside else output)
        return None if edited is None else ((edited, *output[1:]) if inside else edited)

    return hook


def _first(edit: Editor) -> Any:
    """A pre-hook for a layer of one argument."""

    def hook(module: Any, inputs: tuple[Any, ...]) -> Any:
        edited = edit(inputs[0])
        return None if edited is None else (edited, *inputs[1:])

    return hook


def _before(edit: Editor) -> Any:
    """A pre-hook for a block, whose hidden states are its first argument, by place or by name."""

    def hook(module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if inputs:
            edited = edit(inputs[0])
            return None if edited is None else ((edited, *inputs[1:]), keywords)
        edited = edit(keywords["hidden_states"])
        return None if edited is None else (inputs, {**keywords, "hidden_states": edited})

    return hook
