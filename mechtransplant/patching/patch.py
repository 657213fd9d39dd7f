"""The source's activations in the target: what a module says is moved, not how it computes it.

While a patch is in place the source reads every text that the target reads, token by token, with a key-value cache of
its own, so a patch acts alike while prompts are scored and while text is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mechtransplant.errors import CompatibilityError, UsageError, finite_number
from mechtransplant.grafting import addresses_of
from mechtransplant.patching.applied import AppliedPatch
from mechtransplant.patching.lockstep import Lockstep
from mechtransplant.patching.passes import Pass, Where, check_where
from mechtransplant.patching.sites import Module, Site, modules_of
from mechtransplant.weights import parts_of, runs_on

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.pair import LanguageModel, Pair

HeadPoint = Literal["z", "result"]


@dataclass(frozen=True)
class Patch:
    """Activations of the source into the target, at some modules and positions.

    Args:
        modules: heads (``L5H3``), neurons (``L5N12``: ``hook_post``, which the target's own weights then read), MLPs,
            attention blocks, or the residual stream (``L5.resid_pre``, ``L5.resid_post``; ``L5`` is the latter).
        positions: "all", "prompt", "decoding", "last" (the prompt's last token), "answer" (that and "decoding"), or
            token numbers of the prompt, from 0, or from −1 at its end.
        heads: what of a head is moved: "z" (``hook_z``, which the target's own W_O then reads) or "result"
            (``hook_result``: z @ W_O, what the source's head writes to the residual stream).
        strength: λ in target + λ · (source − target); at 1 the source's activations as they are.

    Raises:
        UsageError: no such positions or head point.
    """

    modules: tuple[str, ...]
    positions: Where = "all"
    heads: HeadPoint = "z"
    strength: float = 1.0

    def __init__(
        self, modules: Iterable[str], positions: Where = "all", *, heads: HeadPoint = "z", strength: float = 1.0
    ) -> None:
        check_where(positions)
        if heads not in ("z", "result"):
            raise UsageError(f"unknown heads {heads!r}: expected z or result")
        names = addresses_of(modules)
        object.__setattr__(self, "modules", tuple(dict.fromkeys(names)))
        object.__setattr__(self, "positions", positions if isinstance(positions, str) else tuple(positions))
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "strength", finite_number("a patch's strength", strength))

    def __len__(self) -> int:
        return len(self.modules)

    def applied(self, pair: Pair) -> AppliedPatch:
        """The target with the patch in place, for a ``with`` block: ``target.hf`` and ``target.bridge`` alike.

        Raises UsageError for an address that has no activations, and CompatibilityError for models on two devices.
        """
        if not hasattr(pair, "source"):
            raise UsageError(f"a patch goes between two models: pass the pair, got {type(pair).__name__}")
        devices = [parts_of(model.hf) or runs_on(model.hf) for model in (pair.source, pair.target)]
        if devices[0] != devices[1]:
            raise CompatibilityError(f"the source is on {devices[0]} and the target on {devices[1]}: load both alike")
        modules = modules_of(pair.layout, self.modules)
        editing = Copying(self, pair, modules)
        return AppliedPatch(editing, pair.target, pair.source, list(dict.fromkeys(m.site for m in modules)))


class Copying:
    """A patch on one pair: which sites change, and to what."""

    def __init__(self, patch: Patch, pair: Pair, modules: list[Module]) -> None:
        self.patch, self.pair, self.positions = patch, pair, patch.positions
        self.heads: dict[int, list[int]] = {}
        self.neurons: dict[Site, list[int]] = {}
        self.whole: list[Site] = []
        for module in modules:
            if module.neuron is not None:
                self.neurons.setdefault(module.site, []).append(module.neuron)
            elif module.head is None:
                self.whole.append(module.site)
            else:
                self.heads.setdefault(module.site.layer, []).append(module.head)
        pairs = frozenset((layer, head) for layer, heads in self.heads.items() for head in heads)
        self.heads_changed = pairs
        self.heads_exchanged = pairs if patch.heads == "result" else frozenset()
        self.layer = min((module.site.layer for module in modules), default=0)
        #: the target's z of this pass, for writes that are exchanged where the heads' sum comes out
        self.z: dict[int, Tensor] = {}

    def sites(self, model: LanguageModel | None = None) -> list[Site]:
        """z of every patched head's layer, the block's output where writes are exchanged, neurons' and whole sites."""
        found = [Site("z", layer) for layer in self.heads]
        if self.patch.heads == "result":
            found += [Site("attn", layer) for layer in self.heads]
        return list(dict.fromkeys([*found, *self.neurons, *self.whole]))

    def new(self, site: Site, tensor: Tensor, now: Pass, source: Lockstep | None) -> Tensor:
        """The new activations of a site."""
        assert source is not None
        return self.changed(site, tensor, source.seen)

    def changed(self, site: Site, tensor: Tensor, seen: Mapping[Site, Tensor]) -> Tensor:
        """The new activations of a site, where the source's are ``seen``."""
        if site.place == "z":
            return self._z(site, tensor, seen)
        if site.place == "post":
            return self._some(site, self.neurons[site], tensor, seen)
        changed = tensor
        if site.place == "attn" and site.layer in self.z:
            changed = tensor + self._exchanged(site, seen)
        # a block's whole output says more than its heads'
        return self._moved(tensor, seen[site]) if site in self.whole else changed

    def _z(self, site: Site, tensor: Tensor, seen: Mapping[Site, Tensor]) -> Tensor:
        if self.patch.heads == "result":
            self.z[site.layer] = tensor
            return tensor
        return self._some(site, self.heads[site.layer], tensor, seen)

    def _some(self, site: Site, indices: list[int], tensor: Tensor, seen: Mapping[Site, Tensor]) -> Tensor:
        """Some of a site's heads or neurons moved."""
        new, parts = tensor.clone(), site.parts(indices)
        new[parts] = self._moved(tensor[parts], seen[site].reshape(tensor.shape)[parts])
        return new

    def _exchanged(self, site: Site, seen: Mapping[Site, Tensor]) -> Tensor:
        """λ · Σ (z_source @ W_O,source − z_target @ W_O,target) over the layer's patched heads: 0 where both agree."""
        import torch

        heads, ours = self.heads[site.layer], self.z.pop(site.layer)
        theirs = seen[Site("z", site.layer)].reshape(ours.shape)[..., heads, :]
        ours = ours[..., heads, :]
        models = self.pair.source, self.pair.target
        # looked up every time: held, they would keep the memory of a model that has to make room
        w_source, w_target = (m.output_weights(site.layer)[heads].to(ours) for m in models)
        change = torch.einsum("bphd,hdm->bpm", theirs - ours, w_source)
        change += torch.einsum("bphd,hdm->bpm", ours, w_source - w_target)
        return self.patch.strength * change

    def _moved(self, ours: Tensor, theirs: Tensor) -> Tensor:
        theirs = theirs.reshape(ours.shape).to(ours)
        return theirs if self.patch.strength == 1 else ours + self.patch.strength * (theirs - ours)
