"""Greedy generation with the Hugging Face model, batched and left-padded, equal to one prompt at a time.

A row leaves its batch when it has ended, by an end token or by a stop string of its task.
"""

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
from mechtransplant.evaluation.remembered import is_watched, reading_prompts, shares_passes, writing
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

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
    model: LanguageModel,
    encoded: Encoded,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
    stop: tuple[str, ...] = (),
) -> Iterator[tuple[list[int], list[Generation]]]:
    """Greedy continuations, batch by batch: (row numbers, one Generation a row), each up to a stop string.

    Rows leave the batch when a quarter of it has ended. Where hooks or interventions see the model's passes all rows
    stay, and forward hooks see one call for the prompt of a batch and one for every later step.
    """
    import torch

    from mechtransplant.progress import track

    make_ready(model)
    hf = model.hf
    lengths = [len(p) for p in encoded.prompts]
    check_lengths(hf, max(lengths) + max_new_tokens)
    prefix = usable_prefix(hf, encoded, max(lengths) + max_new_tokens)
    batches = question_batches(hf, encoded, lengths, batch_size)
    plain_greedy, drops = greedy_settings(model, max_new_tokens), not is_watched(model)
    with torch.no_grad(), plain_greedy, one_product(hf), prefix_cache(hf, prefix) as cache_for:
        filler = hf.generation_config.pad_token_id
        for batch in track(batches, "generate", progress):
            rows = batch.rows
            rest, mask = pad([encoded.prompts[i][len(prefix) :] for i in rows], filler, "left")
            shared = torch.tensor([prefix] * len(rows), dtype=torch.long)
            ids = torch.cat([shared, rest], dim=1) if prefix else rest
            mask = torch.cat([torch.ones_like(shared), mask], dim=1) if prefix else mask
            with batch.running(hf):
                cache = cache_for(len(rows))
                written = _written(model, ids.to(hf.device), mask.to(hf.device), cache, max_new_tokens, stop, drops)
            yield rows, written


#: of the rows that are being written, the share that must have ended before the others go on without them
ENDED = 0.25


def _written(
    model: LanguageModel, ids: Tensor, mask: Tensor, cache: Any, budget: int, stop: tuple[str, ...], drops: bool
) -> list[Generation]:
    """A batch's continuations, written by Hugging Face's ``generate`` in stretches, each without the rows that ended.

    The prompt's pass is a stretch of its own where it is remembered or resumed (see ``forked``).
    """
    import torch
    from transformers import DynamicCache

    hf, width = model.hf, ids.shape[1]
    apart = shares_passes(model)
    found = [Generation((), False)] * len(ids)
    left, written = list(range(len(ids))), 0
    ended = _Ended(model.tokenizer, set(end_tokens(model)), stop, width, ENDED if drops else 1, [0] * len(ids))
    if cache is None and apart:
        # held here, because passes that resume fill its lower layers
        cache = DynamicCache(config=hf.config)
    while True:
        first = apart and not written
        with reading_prompts(model) if first else writing(model):
            stretch = hf.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=1 if first else budget - written,
                stopping_criteria=[ended],
                return_dict_in_generate=True,
            )
        before, written = written, stretch.sequences.shape[1] - width
        for at, row in enumerate(left):
            # where steps are taken before it is known that the last was the last, they are undone
            if 0 < ended.lengths[at] <= written or written == budget:
                tokens = tuple(stretch.sequences[at, width:][: ended.lengths[at] or written].tolist())
                found[row] = Generation(tokens, tokens[-1] in ended.ends)
        if written == budget or all(ended.lengths):
            return found
        ids, cache = stretch.sequences, stretch.past_key_values
        mask = torch.cat([mask, mask.new_ones(len(left), written - before)], dim=1)
        if ended.enough:
            # on the CPU, whence every layer's device takes it
            going = torch.tensor([at for at, length in enumerate(ended.lengths) if not length])
            left = [left[at] for at in going.tolist()]
            ids, mask = ids[going], mask[going]
            cache.batch_select_indices(going)
            ended.lengths = [0] * len(left)


class _Ended:
    """A stopping criterion of ``generate``: which rows have ended, and whether so many have that the rest go on alone.

    ``lengths``: how many tokens each row had written at its end; 0 while it is being written. A row that has ended and
    is still there goes on being padded.
    """

    def __init__(
        self, tokenizer: Any, ends: set[int], stop: tuple[str, ...], prompt: int, share: float, lengths: list[int]
    ) -> None:
        self.tokenizer, self.ends, self.stop, self.prompt, self.share = tokenizer, ends, stop, prompt, share
        self.lengths = lengths
        # a token has a byte at least, and special tokens are left out of a text
        self.tail = max((len(s.encode()) for s in stop), default=0) + 8

    @property
    def enough(self) -> bool:
        """Whether so many rows have ended that the others go on without them."""
        return sum(map(bool, self.lengths)) >= self.share * len(self.lengths)

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        import torch

        written = ids[:, self.prompt :].tolist()
        for row, tokens in enumerate(written):
            if not self.lengths[row] and (tokens[-1] in self.ends or (self.stop and self._stopped(tokens))):
                self.lengths[row] = len(tokens)
        return torch.tensor([self.enough or bool(n) for n in self.lengths], device=ids.device)

    def _stopped(self, tokens: list[int]) -> bool:
        """Whether the text contains a stop string: the end of it is looked at first, which may be all that is new."""
        return all(
            any(s in text for s in self.stop)
            for text in (self.tokenizer.decode(t, skip_special_tokens=True) for t in (tokens[-self.tail :], tokens))
        )


def generate(
    model: LanguageModel, task: Task, max_new_tokens: int | None = None, batch_size: int = 64, progress: bool = False
) -> list[Generation]:
    """Greedy continuations of a task's prompts, in the task's order, each up to an end token or one of its stops."""
    make_ready(model)
    encoded = encode(task, model.tokenizer)
    budget = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    results: list[Generation | None] = [None] * len(task)
    for rows, generations in generation_batches(model, encoded, budget, batch_size, progress, task.stop):
        for row, generation in zip(rows, generations, strict=True):
            results[row] = generation
    return [g for g in results if g is not None]
