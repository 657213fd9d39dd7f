"""The effect of every patch alone: the source reads a batch once, the target once, and each patch from its layer on.

Where passes cannot be resumed (see ``evaluation.remembered``), or where the patched positions are neither all of them
nor the answer's, every patch has passes of its own, with the source beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation.answers import AnswerReader
from mechtransplant.evaluation.batches import encode, length_sorted, usable_prefix
from mechtransplant.evaluation.gold import GoldCollector, GoldOutcomes, gold_outcomes, gold_variants
from mechtransplant.evaluation.interventions import interventions_on
from mechtransplant.evaluation.remembered import can_resume, ids_of
from mechtransplant.evaluation.sweeps import Change, sweep
from mechtransplant.pair import LanguageModel
from mechtransplant.patching.applied import AppliedPatch
from mechtransplant.patching.lockstep import Lockstep
from mechtransplant.patching.passes import Pass, Where
from mechtransplant.patching.patch import Copying, HeadPoint, Patch
from mechtransplant.patching.sites import Body, Site, modules_of
from mechtransplant.progress import track
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.pair import Pair

#: positions at which a patch leaves the keys and values of the rest of the prompt as they were
AT_THE_ANSWER = ("answer", "last", "decoding")


def patch_effects(
    pair: Pair,
    task: Task,
    modules: Sequence[str],
    positions: Where = "all",
    *,
    heads: HeadPoint = "result",
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[GoldOutcomes, GoldOutcomes]:
    """The gold answer's outcomes in the target as it is, and with each module's activations patched alone.

    Args:
        modules: heads, neurons, MLPs, attention blocks, residual streams. positions, heads: as :class:`Patch` has them.

    Returns:
        (outcomes of shape (questions,), outcomes of shape (modules, questions)).
    """
    patches = [Copying(Patch([m], positions, heads=heads), pair, modules_of(pair.layout, [m])) for m in modules]
    encoded = encode(task, pair.target.tokenizer)
    lengths = [len(p) + len(c) for p, c in zip(encoded.prompts, encoded.completions, strict=True)]
    base, found = GoldCollector(1, len(task)), GoldCollector(len(modules), len(task))
    quick = positions == "all" or positions in AT_THE_ANSWER
    # a block that forks is entered past its own hooks, where the residual stream is read
    quick &= all(site.place in ("z", "post", "attn", "mlp") for patch in patches for site in patch.sites())
    quick &= can_resume(pair.target) and not interventions_on(pair.source.hf)
    # and both must read in the same passes
    prefixes = [usable_prefix(m.hf, encoded, max(lengths)) for m in (pair.source, pair.target)]
    quick &= prefixes[0] == prefixes[1]
    measure = _resumed if quick else _lockstepped
    # batch by batch: the source's activations of a batch are held while every patch is tried
    for rows in track(list(length_sorted(lengths, batch_size)), "patches", progress):
        before, after = measure(pair, task.subset(rows), patches)
        base.put([0], rows, before)
        found.put(range(len(modules)), rows, after)
    return GoldOutcomes(*(values[0] for values in base.outcomes)), found.outcomes


def _resumed(pair: Pair, task: Task, patches: Sequence[Copying]) -> tuple[GoldOutcomes, GoldOutcomes]:
    answer_only = patches[0].positions != "all"
    # both read the very same tokens
    source = LanguageModel(pair.source.name, pair.source.hf, pair.target.tokenizer)
    read: Callable[[int], GoldOutcomes] = partial(gold_variants, source, task, batch_size=len(task))
    if answer_only:
        read = AnswerReader(source, task, len(task))
    sites = list(dict.fromkeys(site for patch in patches for site in patch.sites()))
    with _recording(pair.source, sites) as passes:
        read(1)
    changes = [Change(patch.layer, _InOneLayer(pair.target, patch, passes)) for patch in patches]
    return sweep(pair.target, task, changes, len(task), answer_only=answer_only)


@dataclass
class _Recorded:
    """One pass: batch and positions, and what the sites had."""

    shape: tuple[int, ...]
    seen: dict[Site, Tensor] = field(default_factory=dict)


@contextmanager
def _recording(model: LanguageModel, sites: Sequence[Site]) -> Iterator[list[_Recorded]]:
    """What some sites of a model have in every forward pass inside the block."""
    passes: list[_Recorded] = []

    def begin(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        passes.append(_Recorded(tuple(ids_of(inputs, keywords).shape)))

    def keep(site: Site, tensor: Tensor) -> None:
        # a copy: some blocks (Falcon's) add to their MLP's output in place
        passes[-1].seen[site] = tensor.detach().clone()

    with ExitStack() as stack:
        stack.callback(model.hf.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for site in sites:
            stack.callback(Body(model).listen(site, partial(keep, site)))
        yield passes


class _InOneLayer:
    """A patch of one module for the length of a block; entered once for every pass, in their order."""

    def __init__(self, target: LanguageModel, patch: Copying, passes: Sequence[_Recorded]) -> None:
        self.body, self.patch, self.passes = Body(target), patch, passes
        self.entered = 0
        self.ends = ExitStack()

    def __enter__(self) -> None:
        now = self.passes[self.entered]
        self.entered += 1
        for site in self.patch.sites():
            self.ends.callback(self.body.listen(site, partial(self._edit, site, now)))

    def __exit__(self, *error: object) -> None:
        self.ends.close()

    def _edit(self, site: Site, now: _Recorded, tensor: Tensor) -> Tensor:
        # some layers see batch and positions as one axis
        shaped = tensor.reshape(*now.shape, *tensor.shape[-2 if site.place == "z" else -1 :])
        new = self.patch.changed(site, shaped, now.seen).to(tensor.dtype)
        if self.patch.positions == "last":
            new = _with(shaped, new, slice(0, 1))
        elif self.patch.positions == "decoding":
            new = _with(shaped, new, slice(1, None))
        return new.reshape(tensor.shape)


def _with(old: Tensor, new: Tensor, positions: slice) -> Tensor:
    """The old activations, with new ones at some positions."""
    mixed = old.clone()
    mixed[:, positions] = new[:, positions]
    return mixed


def _lockstepped(pair: Pair, task: Task, patches: Sequence[Copying]) -> tuple[GoldOutcomes, GoldOutcomes]:
    """Every patch with whole passes of its own, the source beside the first of them."""
    found = GoldCollector(len(patches), len(task))
    # patches read no shared prefix apart: neither does what they are compared with
    base = gold_outcomes(pair.target, task, len(task), share_prefix=False)
    one_by_one = _OneByOne(patches)
    with AppliedPatch(one_by_one, pair.target, pair.source, one_by_one.sites(), remember=True):
        for at, one_by_one.active in enumerate(patches):
            found.put([at], range(len(task)), gold_outcomes(pair.target, task, len(task)))
    return base, found.outcomes


class _OneByOne:
    """Patches of single modules behind one set of hooks; ``active`` is the one that acts."""

    def __init__(self, patches: Sequence[Copying]) -> None:
        self.each, self.positions = patches, patches[0].positions
        self.active: Copying = patches[0]
        self.heads_changed = frozenset(h for one in patches for h in one.heads_changed)
        self.heads_exchanged = frozenset(h for one in patches for h in one.heads_exchanged)

    def sites(self, model: LanguageModel | None = None) -> list[Site]:
        return list(dict.fromkeys(site for one in self.each for site in one.sites()))

    def new(self, site: Site, tensor: Tensor, now: Pass, source: Lockstep | None) -> Tensor:
        return self.active.new(site, tensor, now, source) if site in self.active.sites() else tensor
