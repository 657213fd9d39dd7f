"""First-order effects: inner products of the gold answer's gradient with what a graft, or a patch, would change.

With L the mean over questions of the gold answer's log-probability under the target (nats):

* of weights: ⟨∂L/∂W_m, W_source − W_target⟩, the first-order effect of grafting module m;
* of activations: Σ over positions of ⟨∂L/∂a_m, a_source − a_target⟩, the first-order effect of patching m
  (attribution patching, Nanda 2023; Syed, Rager and Conmy 2023).

Gradients of weights are multiplied with the change and dropped parameter by parameter, as the backward pass makes
them, so they are never all held; a rule that grafts while it scores holds the changes themselves (``keep``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import gold_passes
from mechtransplant.evaluation.interventions import interventions_on
from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import Region
from mechtransplant.patching.patch import HeadPoint
from mechtransplant.progress import track
from mechtransplant.shifts.recorder import Slot, SlotKind, slots_of
from mechtransplant.shifts.stored import StoredOutputs
from mechtransplant.tasks import Task
from mechtransplant.weights import awaken, runs_on, takes_turns

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.evaluation.gold import GoldPass
    from mechtransplant.pair import LanguageModel, Pair

Floats = NDArray[np.float64]


@dataclass
class Parts:
    """Whose parts of one parameter are whose: regions, and by axis the rows or columns of one module alone (neurons),
    which are thousands and go together."""

    regions: list[tuple[int, Region]] = field(default_factory=list)
    lines: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)

    def add(self, index: int, region: Region) -> None:
        """A region of the module with this index."""
        if region.axis is not None and region.stop - region.start == 1:
            indices, places = self.lines.setdefault(region.axis, ([], []))
            indices.append(index)
            places.append(region.start)
        else:
            self.regions.append((index, region))

    def sums(self, product: Tensor, into: Floats) -> None:
        """Add to every module the sum of its part of a tensor."""
        for index, region in self.regions:
            into[index] += float(region.of(product).sum())
        for axis, (indices, places) in self.lines.items():
            others = [other for other in range(product.dim()) if other != axis]
            by_line = product.sum(others) if others else product
            np.add.at(into, indices, by_line.double().cpu().numpy()[places])


class WeightChanges:
    """What grafting each module of a list would change: W_source − W_target, as the weights are now."""

    def __init__(self, pair: Pair, modules: Sequence[str], kv: KV = "never") -> None:
        self.pair, self.modules = pair, list(modules)
        # products are made where the gradients are
        awaken(pair.target.hf)
        self.inside: dict[str, Parts] = {}
        for index, module in enumerate(modules):
            for region in Graft([module], kv=kv).regions(pair):
                self.inside.setdefault(region.parameter, Parts()).add(index, region)
        self.kept: dict[str, Tensor] = {}

    def keep(self) -> WeightChanges:
        """Hold the changes as they are now, so that grafts put in place later do not alter them."""
        self.kept = {name: self.of(name) for name in self.inside}
        return self

    def of(self, parameter: str) -> Tensor:
        """W_source − W_target of a whole parameter, in float32."""
        if parameter in self.kept:
            return self.kept[parameter]
        theirs, ours = self.pair.source_parameters[parameter], self.pair.target_parameters[parameter]
        return theirs.detach().to(ours.device).float() - ours.detach().float()

    def products(self, parameter: str, gradient: Tensor, into: Floats) -> None:
        """Add ⟨gradient, change⟩ of every module that has a part of this parameter."""
        self.inside[parameter].sums(gradient.float() * self.of(parameter), into)


@contextmanager
def _gradients_of(model: LanguageModel, parameters: Iterable[str], consume: Callable[[str, Tensor], None]) -> Any:
    """Within the block, a backward pass hands every parameter's gradient over and keeps none."""
    wanted = {name: model.hf.get_parameter(name) for name in parameters}
    before = [(p, p.requires_grad, p.grad) for p in model.hf.parameters()]

    def restore() -> None:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient

    with ExitStack() as stack:
        # first of all: an interrupt between any two lines leaves nothing changed
        stack.callback(restore)
        for name, parameter in model.hf.named_parameters():
            # somebody's gradient would be added to
            parameter.grad = None
            parameter.requires_grad_(name in wanted)

        def take(name: str) -> Callable[[Tensor], None]:
            def taken(parameter: Tensor) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                consume(name, gradient)

            return taken

        for name, parameter in wanted.items():
            stack.callback(parameter.register_post_accumulate_grad_hook(take(name)).remove)
        yield


def check_differentiable(model: LanguageModel) -> None:
    """Raise UsageError where something acts on the model whose effect has no gradient here."""
    if interventions_on(model.hf):
        raise UsageError("a patch or conditional graft is in place: leave its block before gradients are taken")


def weight_effects(
    changes: WeightChanges, task: Task, batch_size: int = 16, progress: bool = False
) -> tuple[Floats, float]:
    """(first-order effect of every module in nats, the mean log-probability itself), at the weights as they are now.

    One forward and one backward pass over the questions.
    """
    import torch

    model, n = changes.pair.target, len(task)
    check_differentiable(model)
    found, total = np.zeros(len(changes.modules)), 0.0
    with (
        torch.enable_grad(),
        _gradients_of(model, changes.inside, lambda name, g: changes.products(name, g, found)),
    ):
        batches = -(-n // batch_size)
        for done in track(gold_passes(model, task, batch_size), "gradients", progress, total=batches):
            total_here = done.log_probability.sum()
            (total_here / n).backward()
            total += float(total_here.detach())
    return found, total / n


def activation_effects(
    pair: Pair,
    task: Task,
    kinds: Sequence[SlotKind],
    heads: HeadPoint = "result",
    batch_size: int = 16,
    progress: bool = False,
) -> Floats:
    """First-order effect of patching every module at all positions, in nats; two forwards and one backward.

    A head is patched by its ``z``, which the target's W_O then reads, or by its ``result`` z @ W_O (see ``Patch``); a
    neuron by its activation, which the target's weights then read.
    """
    import torch

    for model in (pair.source, pair.target):
        check_differentiable(model)
    slots = slots_of(pair, kinds)
    found: dict[Slot, Floats] = {slot: np.zeros(len(slot.modules(pair))) for slot in slots}
    # the write of a head has the gradient of the sum that it is part of
    summed = {s: Slot("attn", s.layer, s.linear) for s in slots if s.kind == "head" and heads == "result"}
    graded = {slot: summed.get(slot, slot) for slot in slots}
    read = list(dict.fromkeys([*slots, *graded.values()]))
    theirs: dict[Slot, Tensor] = {}
    ours: dict[Slot, Tensor] = {}
    source, target = (gold_passes(m, task, batch_size, share_prefix=False) for m in (pair.source, pair.target))
    stored = _stored(pair.source, slots, source) if takes_turns(pair.source.hf) else None
    with _recorded(pair.source, slots, theirs), _recorded(pair.target, read, ours), _graph_starts(pair.target):
        for batch in track(range(-(-len(task) // batch_size)), "attribution patching", progress):
            if stored is None:
                with torch.no_grad():
                    next(source)
            else:
                theirs.update({slot: cast("Tensor", stored.get(batch, slot)) for slot in slots})
            with torch.enable_grad():
                done = next(target)
                gradients = torch.autograd.grad(
                    done.log_probability.sum() / len(task), [ours[graded[slot]] for slot in slots]
                )
            with torch.no_grad():
                for slot, gradient in zip(slots, gradients, strict=True):
                    found[slot] += _products(pair, slot, gradient, theirs[slot], ours[slot].detach(), heads)
            theirs.clear()
            ours.clear()
    return np.concatenate([found[slot] for slot in slots])


def _stored(model: LanguageModel, slots: Sequence[Slot], passes: Iterator[GoldPass]) -> StoredOutputs:
    """What a model has in passes of its own."""
    import torch

    stored = StoredOutputs(model.hf.dtype, runs_on(model.hf))
    seen: dict[Slot, Tensor] = {}
    with torch.no_grad(), _recorded(model, slots, seen):
        for batch, _ in enumerate(passes):
            for slot in slots:
                stored.put(batch, slot, seen.pop(slot))
    return stored


@contextmanager
def _graph_starts(model: LanguageModel) -> Iterator[None]:
    """Activations have gradients although no parameter does: the graph starts at the embeddings' output."""

    def start(module: Any, inputs: Any, output: Tensor) -> None:
        import torch

        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    handle = model.hf.get_input_embeddings().register_forward_hook(start)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recorded(model: LanguageModel, slots: Sequence[Slot], into: dict[Slot, Tensor]) -> Iterator[None]:
    """Every slot's tensor of the last forward: a layer's output, or for heads and neurons the input of the last one."""

    def listen(slot: Slot) -> Any:
        linear = model.hf.get_submodule(model.layout.linears[slot.linear])
        if slot.kind in ("head", "neuron"):
            return linear.register_forward_pre_hook(lambda module, inputs: into.__setitem__(slot, inputs[0]))
        return linear.register_forward_hook(lambda module, inputs, output: into.__setitem__(slot, output))

    handles = [listen(slot) for slot in slots]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _products(pair: Pair, slot: Slot, gradient: Tensor, theirs: Tensor, ours: Tensor, heads: HeadPoint) -> Floats:
    """⟨gradient, source − target⟩ of a slot's modules, summed over rows and positions."""
    import torch

    gradient, theirs, ours = gradient.float(), theirs.float(), ours.float()
    if slot.kind == "neuron":
        return (gradient * (theirs - ours)).flatten(0, -2).sum(0).cpu().double().numpy()
    if slot.kind != "head":
        return np.array([float((gradient * (theirs - ours)).sum())])
    shape = (pair.layout.heads, -1)
    z_source, z_target = (z.unflatten(-1, shape).flatten(0, -3) for z in (theirs, ours))
    if heads == "z":
        by_head = (gradient.unflatten(-1, shape).flatten(0, -3) * (z_source - z_target)).sum((0, 2))
    else:
        flat = gradient.flatten(0, -2)
        w_source, w_target = (m.output_weights(slot.layer).to(flat) for m in (pair.source, pair.target))
        # z_S W_S − z_T W_T = (z_S − z_T) W_S + z_T (W_S − W_T): exactly 0 where both agree
        by_head = torch.einsum("chd,hdm,cm->h", z_source - z_target, w_source, flat)
        by_head += torch.einsum("chd,hdm,cm->h", z_target, w_source - w_target, flat)
    return by_head.cpu().double().numpy()
