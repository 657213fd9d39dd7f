"""Passes that begin at the lowest layer that changed: what the layers below it wrote is remembered, not computed again.

A graft of layer ℓ leaves layers 0 … ℓ−1 as they were, so a sweep over modules needs each of them once: on average half
of the work. The layers below answer with the very tensors that they wrote before, and everything else of the model's
own code runs as always, so results are equal to the bit. ::

    with remembering(model) as memory:
        base = gold_scores(model, task)
    with Graft(["L7.mlp"]).applied(pair), resuming(model, memory, 7):
        after = gold_scores(model, task)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation.interventions import interventions_on

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel

#: bytes of layers' outputs that are kept; a workload that needs more is computed whole every time
LIMIT = 2 << 30


@dataclass
class RememberedPass:
    """One forward pass: its token ids, what every layer returned, and the cache's layers if it began an empty one."""

    ids: Any
    outputs: list[Any]
    begun: list[Any] | None = None


@dataclass
class Memory:
    """The passes of one workload in their order; ``usable`` is False where they are too large or cannot be resumed."""

    passes: list[RememberedPass] = field(default_factory=list)
    bytes: int = 0
    usable: bool = True

    def forget(self) -> None:
        """Give the memory back, and let later passes be computed whole."""
        self.passes, self.usable = [], False


@contextmanager
def remembering(model: LanguageModel, limit: int = LIMIT) -> Iterator[Memory]:
    """A block whose forward passes are remembered, up to ``limit`` bytes of the layers' outputs."""
    memory, blocks = Memory(), _blocks(model)
    if interventions_on(model.hf) or _shares_parameters(blocks):
        memory.forget()
        yield memory
        return

    def before(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        began = cache is not None and cache.get_seq_length() == 0
        memory.passes.append(RememberedPass(_ids(inputs, keywords), [], [] if began else None))

    def wrote(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
        memory.passes[-1].outputs.append(output)
        memory.bytes += sum(t.numel() * t.element_size() for t in _tensors(output))

    def after(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        done = memory.passes[-1]
        if done.begun is not None:
            done.begun = list(keywords["past_key_values"].layers)
        if len(done.outputs) != len(blocks) or memory.bytes > limit:
            stop()
            memory.forget()

    hooks = [
        model.hf.register_forward_pre_hook(before, with_kwargs=True),
        model.hf.register_forward_hook(after, with_kwargs=True),
        *(block.register_forward_hook(wrote) for block in blocks),
    ]

    def stop() -> None:
        for hook in hooks:
            hook.remove()

    try:
        yield memory
    finally:
        stop()


@contextmanager
def resuming(model: LanguageModel, memory: Memory, layer: int) -> Iterator[None]:
    """A block whose forward passes, the remembered ones in their order, begin at ``layer``.

    Layers from there on may have other weights than when they were remembered. Where nothing usable is remembered, or
    something acts on the model, passes are whole. Raises RuntimeError for a pass that is not the remembered one.
    """
    if layer <= 0 or not memory.usable or interventions_on(model.hf):
        yield
        return
    blocks, at = _blocks(model), iter(memory.passes)
    current: list[RememberedPass] = []

    def before(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        import torch

        remembered, ids = next(at, None), _ids(inputs, keywords)
        if remembered is None or ids.shape != remembered.ids.shape or not torch.equal(ids, remembered.ids):
            raise RuntimeError("this forward pass is not the one that was remembered: ask the same questions again")
        current[:] = [remembered]

    def after(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if current[0].begun is not None:
            # a cache that later passes continue: the layers that did not run have filled nothing in
            keywords["past_key_values"].layers[:layer] = current[0].begun[:layer]

    def answer(number: int, *_: Any, **__: Any) -> Any:
        return current[0].outputs[number]

    with ExitStack() as stack:
        for hook in (
            model.hf.register_forward_pre_hook(before, with_kwargs=True),
            model.hf.register_forward_hook(after, with_kwargs=True),
        ):
            stack.callback(hook.remove)
        for number, block in enumerate(blocks[:layer]):
            stack.enter_context(_answering(block, partial(answer, number)))
        yield


@contextmanager
def _answering(block: Any, forward: Any) -> Iterator[None]:
    """A module whose forward is another function; its own is back afterwards."""
    mine = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if mine is None:
            del block.forward
        else:
            block.forward = mine


def _blocks(model: LanguageModel) -> list[Any]:
    return [model.hf.get_submodule(model.layout.block(n)) for n in range(model.layout.layers)]


def _shares_parameters(blocks: list[Any]) -> bool:
    """Whether two blocks have a parameter in common: a graft of one would change the other."""
    known: set[int] = set()
    for block in blocks:
        mine = {id(p) for p in block.parameters()}
        if known & mine:
            return True
        known |= mine
    return False


def _ids(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return keywords["input_ids"] if "input_ids" in keywords else inputs[0]


def _tensors(output: Any) -> Iterator[Any]:
    if isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif hasattr(output, "element_size"):
        yield output
