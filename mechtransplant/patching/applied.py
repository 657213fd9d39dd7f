"""A patch in place: hooks on the Hugging Face model and on the bridge for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from mechtransplant.errors import UsageError
from mechtransplant.evaluation.interventions import Intervention, check_phases, interventions_on
from mechtransplant.interrupts import guard
from mechtransplant.patching.lockstep import Lockstep
from mechtransplant.patching.passes import Pass, Where, read_pass
from mechtransplant.patching.sites import Body, Site
from mechtransplant.selection import put_on, selected_by, take_off
from mechtransplant.weights import takes_turns

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.pair import LanguageModel


class Editing(Protocol):
    """What a patch must give: the sites that it changes, and their new activations."""

    positions: Where
    #: (layer, head) of the heads that it changes, and of those whose writes it exchanges at the block's output
    heads_changed: frozenset[tuple[int, int]]
    heads_exchanged: frozenset[tuple[int, int]]

    def sites(self, model: LanguageModel) -> list[Site]:
        """The sites that it changes."""
        ...

    def new(self, site: Site, tensor: Tensor, now: Pass, source: Lockstep | None) -> Tensor:
        """The activations that a site gets at the chosen positions; ``tensor`` is what it has."""
        ...


class Installed:
    """The hooks of a patch on one body of a model."""

    def __init__(self, patch: Editing, target: Body, source: Body | None, watched: list[Site], remember: bool) -> None:
        self.patch = patch
        self.now: Pass | None = None
        self.lockstep = Lockstep(source, watched, remember) if source is not None else None
        if self.lockstep is not None:
            self.lockstep.own = source is None or source.model is not target.model
        self.ends: list[Callable[[], None]] = []
        try:
            self.ends.append(target.root.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            self.ends.append(target.root.register_forward_hook(self._end).remove)
            for site in patch.sites(target.model):
                self.ends.append(target.listen(site, self._editor(site)))
        except BaseException:
            self.remove()
            raise

    def _begin(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.lockstep is not None and self.lockstep.running:
            return
        if self.patch.positions != "all":
            check_phases(keywords)
        self.now = read_pass(inputs, keywords)
        if self.lockstep is not None:
            self.lockstep.follow(self.now)

    def _end(self, module: Any, inputs: Any, output: Any) -> None:
        if self.lockstep is None:
            self.now = None
        elif not self.lockstep.running:
            self.now = None
            self.lockstep.claim(output)

    def _editor(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        def edit(tensor: Tensor) -> Tensor | None:
            import torch

            if self.now is None or (self.lockstep is not None and self.lockstep.running):
                return None
            chosen = self.now.chosen(self.patch.positions)
            if not chosen.any():
                return None
            # some layers see batch and positions as one axis
            inner = tensor.shape[-2:] if site.place == "z" else tensor.shape[-1:]
            shaped = tensor.reshape(*chosen.shape, *inner)
            new = self.patch.new(site, shaped, self.now, self.lockstep).to(tensor.dtype)
            at = chosen.reshape(*chosen.shape, *[1] * (shaped.dim() - 2)).to(tensor.device)
            return torch.where(at, new, shaped).reshape(tensor.shape)

        return edit

    def remove(self) -> None:
        """Take the hooks away."""
        if self.lockstep is not None:
            self.ends.append(self.lockstep.close)
        with ExitStack() as stack:
            # every one is taken away, also where one fails
            while self.ends:
                stack.callback(self.ends.pop(0))


class AppliedPatch:
    """A patch in place: the context manager that ``applied`` gives; it may be entered several times."""

    def __init__(
        self,
        patch: Editing,
        target: LanguageModel,
        source: LanguageModel | None = None,
        watched: Sequence[Site] = (),
        remember: bool = False,
    ) -> None:
        self.remember = remember
        self.patch, self.target, self.source, self.watched = patch, target, source, list(watched)
        what = getattr(patch, "patch", None)
        modules = tuple(getattr(what, "modules", ()))
        self.chosen = (selected_by(target.hf, modules), (type(what).__name__, modules))
        self.entries: list[tuple[list[Installed], Intervention, Callable[[Any], None]]] = []

    def __repr__(self) -> str:
        state = "in place" if self.entries else "not in place: use it in a `with` block"
        return f"<patch of {self.target.name}, {state}>"

    def _check_heads(self, mine: Intervention) -> None:
        for other in interventions_on(self.target.hf):
            both = sorted((mine.heads & other.exchanges) | (mine.exchanges & other.exchanges))
            if both:
                name = f"L{both[0][0]}H{both[0][1]}"
                raise UsageError(
                    f"{name} is patched by its result in an outer block, which would be added to what this block says: "
                    "name all heads in one patch, or patch heads='z' outside"
                )

    @guard.protect
    def __enter__(self) -> Any:
        installed: list[Installed] = []

        def on_bridge(bridge: Any) -> None:
            theirs = self.source
            # in a pair of one model with itself this runs while the bridge is being made
            source = None if theirs is None else Body(theirs, bridge if theirs is self.target else theirs.bridge)
            installed.append(Installed(self.patch, Body(self.target, bridge), source, self.watched, self.remember))

        follows = None if self.source is None else self.source.hf
        intervention = Intervention(
            phased=self.patch.positions != "all",
            follows=follows,
            heads=self.patch.heads_changed,
            exchanges=self.patch.heads_exchanged,
        )
        self._check_heads(intervention)
        if self.source is not None and self.source.hf is not self.target.hf and takes_turns(self.source.hf):
            raise UsageError(
                "a patch runs the source beside the target, and this pair's models are in memory one at a time: load "
                "it without one_at_a_time, or use patch_effects or patch_versus_graft at the default positions"
            )
        guard.hold()
        self.entries.append((installed, intervention, on_bridge))
        interventions_on(self.target.hf).append(intervention)
        self.target.when_bridged.append(on_bridge)
        put_on(self.target.hf, *self.chosen)
        try:
            source = None if self.source is None else Body(self.source)
            installed.append(Installed(self.patch, Body(self.target), source, self.watched, self.remember))
            if "bridge" in self.target.__dict__:
                on_bridge(self.target.bridge)
            if guard.pending:
                raise KeyboardInterrupt
        except BaseException:
            self._leave()
            raise
        return self.patch

    @guard.protect
    def __exit__(self, *error: object) -> None:
        self._leave()

    def _leave(self) -> None:
        installed, intervention, on_bridge = self.entries.pop()
        with ExitStack() as stack:
            stack.callback(guard.release)
            stack.callback(interventions_on(self.target.hf).remove, intervention)
            stack.callback(self.target.when_bridged.remove, on_bridge)
            stack.callback(take_off, self.target.hf, *self.chosen)
            for each in installed:
                stack.callback(each.remove)
