"""Forward passes that are remembered: what every layer wrote, so that later passes may begin at the layer that changed.

See ``forked`` for passes that begin so. What cannot promise to be the same again (hooks or patches, gradients, layers
that share parameters or pass something sideways, decoding steps) is not remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation.interventions import interventions_on

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel

#: bytes of layers' outputs, and of keys and values, that are kept; what needs more is computed whole every time
LIMIT = 2 << 30


#: models in a block of either kind, with what is or was remembered: one block inside another is computed whole
_ACTIVE: weakref.WeakKeyDictionary[Any, Memory] = weakref.WeakKeyDictionary()
#: models that read a prompt which is to be continued, and models that continue one: every text has steps of its own
_READING: weakref.WeakSet[Any] = weakref.WeakSet()
_WRITING: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass
class RememberedPass:
    """One forward pass: its token ids, and what every layer returned.

    ``begun`` are the cache's layers if the pass began an empty one; ``added`` the keys and values that each layer added
    to one that was begun before, where a text is to be written after it.
    """

    ids: Any
    outputs: list[Any]
    begun: list[Any] | None = None
    added: list[tuple[Any, Any]] | None = None

    def fill(self, cache: Any, layers: int) -> None:
        """Do to the lowest layers of a cache what the pass did."""
        import copy

        if self.begun is not None:
            cache.layers[:layers] = copy.deepcopy(self.begun[:layers])
        if self.added is not None:
            for layer, (keys, values) in zip(cache.layers[:layers], self.added, strict=False):
                layer.update(keys, values)


@dataclass
class Memory:
    """The passes of one workload in their order; ``usable`` is False where they are too large or cannot be resumed."""

    passes: list[RememberedPass] = field(default_factory=list)
    bytes: int = 0
    usable: bool = True

    def forget(self) -> None:
        """Give the memory back, and let later passes be computed whole."""
        self.passes, self.usable = [], False


def is_watched(model: LanguageModel, inside: Iterable[Any] | None = None) -> bool:
    """Whether interventions, or hooks anywhere in the model or ``inside`` some of its modules, see its passes."""
    return bool(interventions_on(model.hf)) or any(
        _acts(hook)
        for whole in ([model.hf] if inside is None else inside)
        for module in whole.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def can_resume(model: LanguageModel) -> bool:
    """Whether passes of the model, as it is now, may begin at a layer."""
    import torch

    hf, blocks = model.hf, blocks_of(model)
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in hf.parameters())
    busy = is_watched(model, blocks) or trained or hf in _ACTIVE
    # Gemma 3n and 4: upper layers read keys and values that lower ones made
    sideways = bool(getattr(hf.config.get_text_config(), "num_kv_shared_layers", 0))
    return not (busy or sideways or _shares_parameters(blocks))


@contextmanager
def remembering(model: LanguageModel, limit: int = LIMIT) -> Iterator[Memory]:
    """A block whose forward passes are remembered, up to ``limit`` bytes of the layers' outputs."""
    memory, blocks = Memory(), blocks_of(model)
    if not can_resume(model):
        memory.forget()
        yield memory
        return
    caches: weakref.WeakSet[Any] = weakref.WeakSet()

    def before(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if model.hf in _WRITING:
            return
        cache = keywords.get("past_key_values")
        if interventions_on(model.hf) or (cache is not None and cache in caches):
            memory.forget()
        if cache is not None:
            caches.add(cache)
        if memory.usable:
            began = cache is not None and cache.get_seq_length() == 0
            memory.passes.append(RememberedPass(ids_of(inputs, keywords), [], [] if began else None))

    def wrote(own: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        output = own(*inputs, **keywords)
        if model.hf in _WRITING:
            return output
        if any(isinstance(value, dict) for value in keywords.values()):
            # something that layers write for one another
            memory.forget()
        if memory.usable:
            memory.bytes += sum(map(_size, tensors(output)))
            memory.passes[-1].outputs.append(output)
            if memory.bytes > limit:
                memory.forget()
        return output

    def after(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        import copy

        if not memory.usable or model.hf in _WRITING:
            return
        done = memory.passes[-1]
        if done.begun is not None:
            # later passes may append to it
            done.begun = copy.deepcopy(keywords["past_key_values"].layers)
            memory.bytes += sum(_size(t) for part in done.begun for t in (part.keys, part.values))
        elif model.hf in _READING:
            new = done.ids.shape[1]
            held = keywords["past_key_values"].layers
            done.added = [(part.keys[:, :, -new:].clone(), part.values[:, :, -new:].clone()) for part in held]
            memory.bytes += sum(_size(t) for pair in done.added for t in pair)
        if len(done.outputs) != len(blocks) or memory.bytes > limit:
            memory.forget()

    with acting(model, memory, before, after) as stack:
        for block in blocks:
            stack.enter_context(answering(block, partial(wrote, block.forward)))
        yield memory


@contextmanager
def acting(
    model: LanguageModel, memory: Memory, before: Callable[..., None], after: Callable[..., None]
) -> Iterator[ExitStack]:
    """A block in which every forward pass of the model has these two beside it, and no other block of this kind."""
    with ExitStack() as stack:
        stack.callback(model.hf.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(model.hf.register_forward_hook(after, with_kwargs=True).remove)
        _ACTIVE[model.hf] = memory
        stack.callback(_ACTIVE.pop, model.hf, None)
        yield stack


@contextmanager
def answering(block: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """A module whose forward is another function; its own is back afterwards."""
    mine = block.__dict__.get("forward")
    try:
        block.forward = forward
        yield
    finally:
        if mine is not None:
            block.forward = mine
        else:
            block.__dict__.pop("forward", None)


def shares_passes(model: LanguageModel) -> bool:
    """Whether the model's passes are being remembered or resumed; False once there is too much to remember."""
    return model.hf in _ACTIVE and _ACTIVE[model.hf].usable


def reading_prompts(model: LanguageModel) -> AbstractContextManager[None]:
    """A block of passes over prompts whose caches are then written on."""
    return _being(_READING, model.hf)


def writing(model: LanguageModel) -> AbstractContextManager[None]:
    """A block of decoding steps: they are neither remembered nor resumed, and every layer runs."""
    return _being(_WRITING, model.hf)


def is_writing(model: LanguageModel) -> bool:
    """Whether the model's passes are decoding steps."""
    return model.hf in _WRITING


def generates(model: LanguageModel) -> bool:
    """Whether the model's passes are a generation's."""
    return model.hf in _READING or model.hf in _WRITING


@contextmanager
def _being(known: weakref.WeakSet[Any], hf: Any) -> Iterator[None]:
    known.add(hf)
    try:
        yield
    finally:
        known.discard(hf)


def _acts(hook: Any) -> bool:
    """Whether a hook may change or keep anything: not those here, nor what transformers' ``output_…`` leave behind."""
    return getattr(hook, "__module__", "") not in ("transformers.utils.output_capturing", *_OURS)


#: where the hooks are that see to passes, their products, and where weights are, and that keep nothing of a batch
_OURS = (
    *(f"mechtransplant.evaluation.{name}" for name in ("remembered", "forked", "batches")),
    *(f"mechtransplant.weights.{name}" for name in ("residence", "spread")),
)


def blocks_of(model: LanguageModel) -> list[Any]:
    return [model.hf.get_submodule(model.layout.block(n)) for n in range(model.layout.layers)]


def _shares_parameters(blocks: list[Any]) -> bool:
    """Whether two blocks have a parameter in common: a graft of one would change the other."""
    known: set[int] = set()
    for block in blocks:
        mine = {p.data_ptr() for p in block.parameters()}
        if known & mine:
            return True
        known |= mine
    return False


def _size(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.numel() * tensor.element_size())


def ids_of(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return keywords["input_ids"] if "input_ids" in keywords else inputs[0]


def tensors(output: Any) -> Iterator[Any]:
    if isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors(part)
    elif hasattr(output, "element_size"):
        yield output
