"""Passes that begin at the layer that changed, and fork there: one batch for many variants of a layer.

A graft or patch of layer ℓ leaves layers 0 … ℓ−1 as they were. They answer with the very tensors that they wrote when
the pass was remembered, and everything else of the model's own code runs as always, so a single variant's results are
equal to the bit. Several variants of one layer go on as one batch, variant by variant: equal up to the rounding of
larger matrix products. ::

    with remembering(model) as memory:
        base = gold_scores(model, task)
    with Graft(["L7.mlp"]).applied(pair), resuming(model, memory, 7):
        after = gold_scores(model, task)
    with forking(model, memory, 7, [Graft([m]).applied(pair) for m in ("L7.mlp", "L7H3")]):
        both = gold_variants(model, task, 2)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation.interventions import interventions_on
from mechtransplant.evaluation.remembered import (
    Memory,
    RememberedPass,
    acting,
    answering,
    blocks_of,
    can_resume,
    generates,
    ids_of,
    is_writing,
)

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel

#: a change of one layer, entered again for every pass
Variant = AbstractContextManager[Any]


@contextmanager
def resuming(model: LanguageModel, memory: Memory, layer: int) -> Iterator[None]:
    """A block whose forward passes, the remembered ones in their order, begin at ``layer``.

    Layers from there on may have other weights than when they were remembered. Where nothing usable is remembered, or
    something acts on the model, passes are whole. Raises RuntimeError for a pass that is not the remembered one, and
    where something began to act on the model inside the block.
    """
    if layer <= 0 or not memory.usable or not can_resume(model):
        yield
        return
    with forking(model, memory, layer, [nullcontext()]):
        yield


@contextmanager
def forking(model: LanguageModel, memory: Memory, layer: int, variants: Sequence[Variant]) -> Iterator[None]:
    """A block whose forward passes, the remembered ones in their order, run ``layer`` once under each variant.

    A variant changes that layer alone, by other weights or by hooks of its own. What a pass returns has
    ``len(variants)`` times the rows, variant by variant, and so has a cache that it fills, from ``layer`` on. A cache
    that is passed in has the rows of the batch, or from ``layer`` on those of all variants.

    Raises RuntimeError where the memory or the model cannot be used (see ``can_resume``), for a pass that is not the
    remembered one, for a generation under any change (see ``resuming``), and where something began to act on the model
    inside the block.
    """
    if not memory.usable or not can_resume(model):
        raise RuntimeError("these passes cannot fork: something acts on the model, or nothing usable is remembered")
    at = iter(memory.passes)
    current: list[RememberedPass] = []

    def before(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        import torch

        if generates(model) and any(not isinstance(variant, nullcontext) for variant in variants):
            raise RuntimeError("passes that fork write no text: generate under one change at a time, and resume")
        if is_writing(model):
            return
        if interventions_on(model.hf):
            raise RuntimeError("a patch inside a block of resumed passes would miss the layers that do not run")
        remembered, ids = next(at, None), ids_of(inputs, keywords)
        if remembered is None or ids.shape != remembered.ids.shape or not torch.equal(ids, remembered.ids):
            raise RuntimeError("this forward pass is not the one that was remembered: ask the same questions again")
        current[:] = [remembered]

    def after(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not is_writing(model) and keywords.get("past_key_values") is not None:
            # a cache that later passes continue: the layers that did not run have filled nothing in
            current[0].fill(keywords["past_key_values"], layer)

    def answer(own: Callable[..., Any], number: int, *inputs: Any, **keywords: Any) -> Any:
        return own(*inputs, **keywords) if is_writing(model) else current[0].outputs[number]

    with acting(model, memory, before, after) as stack:
        for number, block in enumerate(blocks_of(model)):
            own = block.forward
            if number < layer:
                stack.enter_context(answering(block, partial(answer, own, number)))
            elif number == layer:
                stack.enter_context(answering(block, partial(_fork, own, number, variants)))
            elif len(variants) > 1:
                stack.enter_context(answering(block, partial(_widened, own, number, len(variants))))
        yield


def in_every_pass(model: LanguageModel, layer: int, variant: Variant) -> AbstractContextManager[None]:
    """A block of whole passes, in each of which the variant acts while its layer runs."""
    block = blocks_of(model)[layer]
    return answering(block, partial(_fork, block.forward, layer, [variant]))


def _fork(own: Callable[..., Any], number: int, variants: Sequence[Variant], *inputs: Any, **keywords: Any) -> Any:
    """The layer under every variant, each with its own part of the cache; outputs and caches as one batch."""
    if len(variants) == 1:
        with variants[0]:
            return own(*inputs, **keywords)
    cache = _cache_in(inputs, keywords)
    rows = _hidden(inputs, keywords).shape[0]
    outputs, layers = [], []
    for at, variant in enumerate(variants):
        view = copy.copy(cache)
        if cache is not None:
            view.layers = list(cache.layers)
            if number < len(view.layers):
                view.layers[number] = _part(view.layers[number], at, rows, len(variants))
        # some models hand the cache over by place, some by name
        given = [view if value is cache else value for value in inputs]
        named = {key: view if value is cache else value for key, value in keywords.items()}
        with variant:
            outputs.append(own(*given, **named))
        if cache is not None and number < len(view.layers):
            layers.append(view.layers[number])
    if layers:
        cache.layers[: number + 1] = [*cache.layers[:number], _one_batch(layers)]
    return _joined(outputs)


def _widened(own: Callable[..., Any], number: int, variants: int, *inputs: Any, **keywords: Any) -> Any:
    """A layer above the fork: what belongs to a batch's rows, besides the hidden states, is there for every variant."""
    rows = _hidden(inputs, keywords).shape[0] // variants
    cache = _cache_in(inputs, keywords)
    if cache is not None and number < len(cache.layers):
        held = cache.layers[number]
        if held.is_initialized and held.keys.numel() and held.keys.shape[0] == rows:
            cache.layers[number] = _one_batch([held] * variants)
    first = [inputs[0]] if inputs else []
    others = [_repeated(value, rows, variants) for value in inputs[1:]]
    named = {k: v if k == "hidden_states" else _repeated(v, rows, variants) for k, v in keywords.items()}
    return own(*first, *others, **named)


def _hidden(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return inputs[0] if inputs else keywords["hidden_states"]


def _cache_in(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    from transformers import Cache

    return next((value for value in (*inputs, *keywords.values()) if isinstance(value, Cache)), None)


def _part(layer: Any, at: int, rows: int, variants: int) -> Any:
    """A cache's layer as one variant has it; what it appends is written beside the old tensors, not into them."""
    part = copy.copy(layer)
    if layer.is_initialized and layer.keys.numel() and layer.keys.shape[0] == rows * variants and variants > 1:
        part.keys, part.values = (t[at * rows : (at + 1) * rows] for t in (layer.keys, layer.values))
    return part


def _one_batch(layers: Sequence[Any]) -> Any:
    import torch

    whole = copy.copy(layers[0])
    whole.keys, whole.values = (torch.cat([getattr(part, name) for part in layers]) for name in ("keys", "values"))
    return whole


def _joined(outputs: Sequence[Any]) -> Any:
    """The outputs of a layer, tensors or tuples of them, as one batch."""
    import torch

    if isinstance(outputs[0], tuple):
        return tuple(_joined(parts) for parts in zip(*outputs, strict=True))
    return None if outputs[0] is None else torch.cat(list(outputs))


def _repeated(value: Any, rows: int, variants: int) -> Any:
    """What has one entry a row, for every variant; what is the same for all rows as it is."""
    import torch

    if isinstance(value, tuple):
        return tuple(_repeated(part, rows, variants) for part in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == rows > 1:
        return value.repeat(variants, *[1] * (value.dim() - 1))
    return value
