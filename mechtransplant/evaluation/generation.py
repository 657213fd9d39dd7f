"""Greedy generation with the Hugging Face model, batched and left-padded, equal to one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation.batches import (
    Encoded,
    check_lengths,
    encode,
    make_ready,
    one_product,
    pad,
    prefix_cache,
    question_batches,
    usable_prefix,
)
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel


@dataclass(frozen=True)
class Generation:
    """One greedy continuation: its tokens, the end token included where the model wrote one."""

    tokens: tuple[int, ...]
    ended: bool

    def within(self, budget: int) -> Generation:
        """What the same greedy decoding had written after ``budget`` tokens."""
        return self if len(self.tokens) <= budget else Generation(self.tokens[:budget], False)

    def steps(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> int:
        """How many decoding steps belong to the answer: all of them, or up to the one that completed a stop string."""
        if not stop:
            return len(self.tokens)
        for step in range(1, len(self.tokens) + 1):
            so_far = tokenizer.decode(self.tokens[:step], skip_special_tokens=True)
            if any(s in so_far for s in stop):
                return step
        return len(self.tokens)

    def text(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> tuple[str, bool]:
        """(the text up to a stop string, whether it ended by itself: an end token or a stop string)."""
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        cuts = [at for at in (text.find(s) for s in stop) if at >= 0]
        return (text[: min(cuts)], True) if cuts else (text, self.ended)


def end_tokens(model: LanguageModel) -> list[int]:
    """The tokens that end an answer: the tokenizer's and those of the model's own generation settings."""
    own = getattr(model.hf.generation_config, "eos_token_id", None)
    tokens = {model.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(t for t in tokens if t is not None)


@contextmanager
def greedy_settings(model: LanguageModel, max_new_tokens: int) -> Iterator[None]:
    """Plain greedy decoding, whatever the model's own generation settings ask for (sampling, penalties)."""
    from transformers import GenerationConfig

    kept = model.hf.generation_config
    ends = end_tokens(model)
    pad_token = model.tokenizer.pad_token_id
    model.hf.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad_token is None else pad_token,
    )
    try:
        yield
    finally:
        model.hf.generation_config = kept


def generation_batches(
    model: LanguageModel, encoded: Encoded, max_new_tokens: int, batch_size: int, progress: bool = False
) -> Iterator[tuple[list[int], list[Generation]]]:
    """Greedy continuations, batch by batch: (row numbers, one Generation a row).

    Forward hooks on the model see one call for the prompt of a batch and one for every later step.
    """
    import torch

    from mechtransplant.progress import track

    make_ready(model)
    hf = model.hf
    lengths = [len(p) for p in encoded.prompts]
    check_lengths(hf, max(lengths) + max_new_tokens)
    prefix = usable_prefix(hf, encoded, max(lengths) + max_new_tokens)
    ends = set(end_tokens(model))
    batches = question_batches(hf, encoded, lengths, batch_size)
    plain_greedy = greedy_settings(model, max_new_tokens)
    with torch.no_grad(), plain_greedy, one_product(hf), prefix_cache(hf, prefix) as cache_for:
        filler = hf.generation_config.pad_token_id
        for batch in track(batches, "generate", progress):
            rows = batch.rows
            rest, mask = pad([encoded.prompts[i][len(prefix) :] for i in rows], filler, "left")
            shared = torch.tensor([prefix] * len(rows), dtype=torch.long)
            ids = torch.cat([shared, rest], dim=1) if prefix else rest
            mask = torch.cat([torch.ones_like(shared), mask], dim=1) if prefix else mask
            with batch.running(hf):
                written = hf.generate(
                    input_ids=ids.to(hf.device),
                    attention_mask=mask.to(hf.device),
                    past_key_values=cache_for(len(rows)),
                )[:, ids.shape[1] :]
            yield rows, [_until_end(row, ends) for row in written.tolist()]


def _until_end(tokens: list[int], ends: set[int]) -> Generation:
    at = next((i for i, token in enumerate(tokens) if token in ends), None)
    return Generation(tuple(tokens), False) if at is None else Generation(tuple(tokens[: at + 1]), True)


def generate(
    model: LanguageModel, task: Task, max_new_tokens: int | None = None, batch_size: int = 64, progress: bool = False
) -> list[Generation]:
    """Greedy continuations of a task's prompts, in the task's order."""
    make_ready(model)
    encoded = encode(task, model.tokenizer)
    budget = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    results: list[Generation | None] = [None] * len(task)
    for rows, generations in generation_batches(model, encoded, budget, batch_size, progress):
        for row, generation in zip(rows, generations, strict=True):
            results[row] = generation
    return [g for g in results if g is not None]
