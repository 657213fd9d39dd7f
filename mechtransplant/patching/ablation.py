"""Ablations: what a model does without a module, whose activations become zero, their mean, or another prompt's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from mechtransplant.activations import ActivationCache, Positions, cache_activations
from mechtransplant.errors import UnknownNameError, UsageError, check_seed
from mechtransplant.grafting import addresses_of
from mechtransplant.patching.applied import AppliedPatch
from mechtransplant.patching.lockstep import Lockstep
from mechtransplant.patching.passes import Pass, Where, check_where
from mechtransplant.patching.sites import Module, Site, modules_of
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.pair import LanguageModel, Pair

Method = Literal["zero", "mean", "resample"]


def reference_activations(
    model: LanguageModel,
    task: Task,
    modules: Iterable[str],
    positions: Positions = "all",
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> ActivationCache:
    """The activations that "mean" and "resample" ablations of these modules take, from a task's prompts."""
    hooks = dict.fromkeys(m.site.hook for m in modules_of(model.layout, modules))
    return cache_activations(model, task, hooks, positions, batch_size=batch_size, progress=progress)


@dataclass(frozen=True)
class Ablation:
    """Modules of one model without what they say.

    Args:
        modules: heads, neurons, MLPs, attention blocks or the residual stream.
        method: "zero"; "mean" (the reference's mean over a prompt's positions, then over prompts); "resample" (what the
            module says at a random position of the reference, one draw for all modules of a position).
        reference: for "mean" and "resample": :func:`reference_activations` of the same model.
        positions: see :class:`Patch`.
        seed: of "resample"; a draw depends on the token and its position, not on the batch.

    A head is ablated at ``hook_z``, so the bias of the output projection stays; a neuron at ``hook_post``.
    """

    modules: tuple[str, ...]
    method: Method = "zero"
    reference: ActivationCache | None = None
    positions: Where = "all"
    seed: int = 0

    def __init__(
        self,
        modules: Iterable[str],
        method: Method = "zero",
        reference: ActivationCache | None = None,
        positions: Where = "all",
        seed: int = 0,
    ) -> None:
        check_where(positions)
        check_seed(seed)
        if method not in get_args(Method):
            raise UnknownNameError("ablation", method, get_args(Method))
        if (method == "zero") != (reference is None):
            what = "takes no" if method == "zero" else "needs a"
            raise UsageError(f"a {method} ablation {what} reference: reference_activations(model, task, modules)")
        names = addresses_of(modules)
        object.__setattr__(self, "modules", tuple(dict.fromkeys(names)))
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "reference", reference)
        object.__setattr__(self, "positions", positions if isinstance(positions, str) else tuple(positions))
        object.__setattr__(self, "seed", seed)

    def __len__(self) -> int:
        return len(self.modules)

    def applied(self, model: LanguageModel | Pair) -> AppliedPatch:
        """A model (a pair's target) with the modules ablated, for the length of a ``with`` block.

        Raises UsageError where the reference lacks a module, or is of other weights.
        """
        target: Any = getattr(model, "target", model)
        modules = modules_of(target.layout, self.modules)
        if self.reference is not None:
            for module in modules:
                if module.site.hook not in self.reference:
                    raise UsageError(
                        f"the reference has no {module.site.hook}, which {module.address} needs: make it with "
                        "reference_activations(model, task, modules)"
                    )
            if self.reference.weights != target.fingerprint:
                raise UsageError(
                    f"the reference is of other weights ({self.reference.model}) than {target.name} has now: make it "
                    "again with reference_activations, inside of the graft's block where there is one"
                )
        return AppliedPatch(_Ablating(self, modules), target)


class _Ablating:
    """An ablation on one model."""

    def __init__(self, patch: Ablation, modules: list[Module]) -> None:
        self.patch, self.positions = patch, patch.positions
        self.parts: dict[Site, list[int]] = {}
        self.whole: list[Site] = []
        for module in modules:
            if module.part is None:
                self.whole.append(module.site)
            else:
                self.parts.setdefault(module.site, []).append(module.part)
        self.heads_changed = frozenset((m.site.layer, m.head) for m in modules if m.head is not None)
        self.heads_exchanged: frozenset[tuple[int, int]] = frozenset()
        self.known: dict[Site, Tensor] = {}

    def sites(self, model: LanguageModel) -> list[Site]:
        return [*self.parts, *self.whole]

    def new(self, site: Site, tensor: Tensor, now: Pass, source: Lockstep | None) -> Tensor:
        import torch

        if self.patch.method == "zero":
            value = torch.zeros_like(tensor)
        elif self.patch.method == "mean":
            value = self._mean(site).to(tensor).expand_as(tensor)
        else:
            value = self._rows(site)[self._draw(now)].to(tensor)
        if site not in self.parts:
            return value
        new, parts = tensor.clone(), site.parts(self.parts[site])
        new[parts] = value[parts]
        return new

    @cached_property
    def _reference(self) -> ActivationCache:
        assert self.patch.reference is not None
        return self.patch.reference

    def _mean(self, site: Site) -> Tensor:
        import torch

        if site not in self.known:
            prompts = range(len(self._reference))
            self.known[site] = torch.stack(
                [self._reference.prompt(i, site.hook).float().mean(0) for i in prompts]
            ).mean(0)
        return self.known[site]

    def _rows(self, site: Site) -> Tensor:
        """Every position of the reference, (positions, …)."""
        import torch

        if site not in self.known:
            prompts = range(len(self._reference))
            self.known[site] = torch.cat([self._reference.prompt(i, site.hook) for i in prompts])
        return self.known[site]

    def _draw(self, now: Pass) -> Tensor:
        """Which row of the reference a position gets: random, but the same in every batch and with every cache."""
        count = int(self._reference.lengths.sum())
        # a hash of seed, token and position: multiply and shift, by odd constants of splitmix64
        mixed = now.ids * 0x1E3779B97F4A7C15 + (now.index.clamp_min(0) + 1) * 0x3F58476D1CE4E5B9 + self.patch.seed
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
            mixed = (mixed ^ (mixed >> shift)) * factor
        return ((mixed ^ (mixed >> 31)) % count).cpu()
