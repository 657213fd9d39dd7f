"""The positions that predict the answer, in a pass of their own over a key-value cache of what stands before them.

A change that acts at these positions alone (the prompt's last token and all gold tokens but the last) leaves the rest
of the prompt as it was: its keys and values are computed once, and every change costs a few tokens a question.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation.batches import (
    check_lengths,
    encode,
    length_sorted,
    make_ready,
    pad,
    prefix_cache,
    scored,
    usable_prefix,
)
from mechtransplant.evaluation.gold import GoldCollector, GoldOutcomes, GoldPass, accepted_ends, gold_pass
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.pair import LanguageModel


@dataclass(frozen=True)
class AnswerBatch:
    """A batch that has read its prompts but for their last tokens: ``cache`` holds that, ``inputs`` what is left.

    ``gold`` (rows, answer tokens) and its ``mask`` are padded on the right; column 0 of the inputs is the prompt's last
    token of every row.
    """

    rows: list[int]
    inputs: dict[str, Tensor]
    cache: Any
    gold: Tensor
    mask: Tensor

    def read(self, model: LanguageModel, ends: Tensor) -> GoldPass:
        """One pass over the answer positions; the cache stays as it is."""
        cache = copy.copy(self.cache)
        # a layer that appends makes new tensors
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        answer = self.gold.shape[1]
        logits = model.hf(**self.inputs, past_key_values=cache, use_cache=True, logits_to_keep=answer).logits
        return gold_pass(self.rows, logits, self.gold, self.mask, ends)


class AnswerReader:
    """A task whose prompts a model has read.

    Called with a number of variants (see ``forked``) it reads the answers.
    """

    def __init__(self, model: LanguageModel, task: Task, batch_size: int) -> None:
        import torch

        make_ready(model)
        self.model, self.questions, self.ends = model, len(task), accepted_ends(model, task)
        with torch.no_grad():
            self.batches = list(_answer_batches(model, task, batch_size))

    @property
    def tokens(self) -> int:
        """How many tokens the largest batch of answers has."""
        return max(batch.gold.numel() for batch in self.batches)

    def __call__(self, variants: int = 1) -> GoldOutcomes:
        """Outcomes of shape (variants, questions)."""
        import torch

        collected = GoldCollector(variants, self.questions)
        with torch.no_grad():
            for batch in self.batches:
                collected.add(batch.read(self.model, self.ends), range(variants))
        return collected.outcomes


def _answer_batches(model: LanguageModel, task: Task, batch_size: int) -> Iterator[AnswerBatch]:
    """Batches of questions of similar lengths, each after the model has read its prompts."""
    import torch
    from transformers import DynamicCache

    hf, encoded = model.hf, encode(task, model.tokenizer)
    totals = [len(p) + len(c) for p, c in zip(encoded.prompts, encoded.completions, strict=True)]
    check_lengths(hf, max(totals))
    prefix = usable_prefix(hf, encoded, max(totals))
    with prefix_cache(hf, prefix) as cache_for:
        for rows in length_sorted(totals, batch_size):
            prompts = [encoded.prompts[i][len(prefix) :] for i in rows]
            gold, gold_mask = pad([encoded.completions[i] for i in rows], 0, "right")
            before, seen = pad([p[:-1] for p in prompts], 0, "left")
            # the answer's last token is written and never read
            tail = torch.cat([torch.tensor([[p[-1]] for p in prompts]), gold[:, :-1]], 1)
            ones = torch.ones(len(rows), len(prefix) + 1, dtype=torch.long)
            mask = torch.cat([ones[:, 1:], seen, ones[:, :1], gold_mask[:, :-1]], 1).to(hf.device)
            # positions count real tokens only
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            cache, cut = cache_for(len(rows)), len(prefix) + before.shape[1]
            if cache is None:
                cache = DynamicCache(config=hf.config)
            if before.shape[1]:
                hf(
                    input_ids=before.to(hf.device),
                    attention_mask=mask[:, :cut],
                    position_ids=positions[:, len(prefix) : cut],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=scored(before, before.shape[1] - 1, before.shape[1]),
                )
            inputs = {"input_ids": tail.to(hf.device), "attention_mask": mask, "position_ids": positions[:, cut:]}
            yield AnswerBatch(rows, inputs, cache, gold, gold_mask)
