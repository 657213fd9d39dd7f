"""The gold answer under teacher forcing: what a model thinks of it, token by token, with gradients where wanted.

Three outcomes of one forward, per question, with logits ℓ at the answer's tokens g₁ … g_m (the end token last):

* correct: greedy decoding would write the answer: every gₖ has the largest logit;
* log-probability: Σₖ log p(gₖ | prompt, g₁ … gₖ₋₁), in nats;
* logit difference: minₖ (ℓ(gₖ) − max over other tokens of ℓ), the answer's narrowest margin: above 0 exactly where the
  answer is correct, so it is accuracy made continuous.

The end of the text may be written by any of the model's end tokens, and by any token that brings one of the task's
stops: for log-probabilities they count as one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import TaskError, check_count
from mechtransplant.evaluation.batches import (
    PaddingSide,
    check_lengths,
    check_task,
    encode,
    make_ready,
    pad,
    prefix_cache,
    question_batches,
    scored,
    usable_prefix,
)
from mechtransplant.evaluation.generation import end_tokens
from mechtransplant.evaluation.interventions import is_phased
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.pair import LanguageModel


class GoldOutcomes(NamedTuple):
    """One value a question, in the task's order (see the module's docstring); of variants, one row each."""

    correct: NDArray[np.bool_]
    log_probability: NDArray[np.float64]
    logit_difference: NDArray[np.float64]


@dataclass(frozen=True)
class GoldPass:
    """One batch's forward: ``logits`` (rows, answer tokens, vocabulary) at the answer's tokens.

    ``gold`` holds their ids, ``real`` which of them are no padding, ``last`` which end the text; ``ends`` are the
    tokens that may. Of several variants the rows come variant by variant.
    """

    rows: list[int]
    logits: Tensor
    gold: Tensor
    real: Tensor
    last: Tensor
    ends: Tensor

    @cached_property
    def hits(self) -> Tensor:
        """(rows,) whether greedy decoding writes the answer; on the CPU."""
        import torch

        written = self.logits.argmax(-1).cpu()
        return (torch.where(self.last, torch.isin(written, self.ends), written == self.gold) | ~self.real).all(1)

    @cached_property
    def log_probability(self) -> Tensor:
        """(rows,) in nats; differentiable, in float32."""
        import torch

        device = self.logits.device
        chosen = self.logits.gather(-1, self.gold.to(device)[..., None])[..., 0].float()
        ended = self.logits[..., self.ends.to(device)].float().logsumexp(-1)
        # a row at a time: float32 copies of a whole batch's logits take gigabytes with a large vocabulary
        whole = torch.stack([row.float().logsumexp(-1) for row in self.logits])
        scores = torch.where(self.last.to(device), ended, chosen) - whole
        return scores.masked_fill(~self.real.to(device), 0).sum(1)

    @cached_property
    def logit_difference(self) -> Tensor:
        """(rows,) the narrowest margin; differentiable almost everywhere, in float32."""
        import torch

        device = self.logits.device
        gold, last, ends = self.gold.to(device)[..., None], self.last.to(device), self.ends.to(device)
        ours = torch.where(last, self.logits[..., ends].amax(-1), self.logits.gather(-1, gold)[..., 0])
        # one more than can be the answer, so that another token is always among them
        highest = self.logits.topk(len(ends) + 1, -1)
        answer = torch.where(last[..., None], torch.isin(highest.indices, ends), highest.indices == gold)
        others = highest.values.masked_fill(answer, -torch.inf).amax(-1)
        margins = ours.float() - others.float()
        return margins.masked_fill(~self.real.to(device), torch.inf).amin(1)


def gold_passes(
    model: LanguageModel,
    task: Task,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    share_prefix: bool = True,
) -> Iterator[GoldPass]:
    """One forward a batch of questions of similar lengths; inside ``torch.no_grad()`` or not, as the caller likes.

    With gradients no prefix is shared. Passes that fork (see ``forked``) give every variant's rows. Raises TaskError
    where the tokenizer has no end token.
    """
    import torch

    make_ready(model)
    check_count("batch_size", batch_size)
    ends = accepted_ends(model, task)
    encoded = encode(task, model.tokenizer)
    hf = model.hf
    totals = [len(p) + len(c) for p, c in zip(encoded.prompts, encoded.completions, strict=True)]
    check_lengths(hf, max(totals))
    phased = is_phased(hf)
    # right padding stands after the gold tokens of every row, so the rows' gold positions are not aligned
    aligned = padding_side == "left" or phased
    shared = share_prefix and not torch.is_grad_enabled()
    prefix = usable_prefix(hf, encoded, max(totals)) if shared else []
    with prefix_cache(hf, prefix) as cache_for:
        for batch in question_batches(hf, encoded, totals, batch_size):
            rows = batch.rows
            prompts = [encoded.prompts[i][len(prefix) :] for i in rows]
            golds = [encoded.completions[i] for i in rows]
            gold, gold_mask = pad(golds, 0, "right")
            answer = gold.shape[1]
            # the answer's last token is written and never read
            if aligned:
                ids, mask = pad(prompts, 0, "left")
                ids, mask = torch.cat([ids, gold[:, :-1]], 1), torch.cat([mask, gold_mask[:, :-1]], 1)
                first = ids.shape[1] - answer
            else:
                ids, mask = pad([p + g[:-1] for p, g in zip(prompts, golds, strict=True)], 0, "right")
                first = 0
            with batch.running(hf):
                if phased:
                    logits = _logits_in_phases(hf, ids, mask, answer)
                else:
                    # positions count real tokens only; a pad's own position never matters
                    positions = (mask.cumsum(1) - 1).clamp_min(0) + len(prefix)
                    full_mask = torch.cat([torch.ones(len(rows), len(prefix), dtype=torch.long), mask], 1)
                    ids = ids.to(hf.device)
                    logits = hf(
                        input_ids=ids,
                        attention_mask=full_mask.to(hf.device),
                        position_ids=positions.to(hf.device),
                        past_key_values=cache_for(len(rows)),
                        use_cache=bool(prefix),
                        logits_to_keep=scored(ids, first, ids.shape[1]),
                    ).logits
            if not aligned:
                starts = torch.tensor([len(p) - 1 for p in prompts]).repeat(len(logits) // len(rows))
                index = (starts[:, None] + torch.arange(answer)).clamp_max(ids.shape[1] - 1)
                logits = logits[torch.arange(len(logits))[:, None], index.to(logits.device)]
            yield gold_pass(rows, logits, gold, gold_mask, ends)


def accepted_ends(model: LanguageModel, task: Task) -> Tensor:
    """The tokens that may end an answer; raises TaskError where the tokenizer has none.

    Stops of a free-form task are left out: its gold answer is followed by whatever the format has there.
    """
    import torch

    if model.tokenizer.eos_token_id is None:
        raise TaskError(f"the tokenizer of {model.name} has no end token: use method='generate'")
    stopping = stopping_tokens(model.tokenizer, task.stop) if task.short_answer and task.stop else ()
    return torch.tensor(sorted({*end_tokens(model), *stopping}))


@lru_cache(maxsize=16)
def stopping_tokens(tokenizer: Any, stops: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens whose text has a stop with nothing but spaces before it."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return tuple(
        token
        for token, text in enumerate(texts)
        if any(at >= 0 and not text[:at].strip() for at in (text.find(stop) for stop in stops))
    )


def gold_pass(rows: list[int], logits: Tensor, gold: Tensor, mask: Tensor, ends: Tensor) -> GoldPass:
    """A batch's logits with what scores them: ``gold`` (rows, answer tokens) and its ``mask``, padded on the right."""
    variants = len(logits) // len(rows)
    real = mask.bool().repeat(variants, 1)
    last = real & (real.cumsum(1) == real.sum(1, keepdim=True))
    return GoldPass(rows * variants, logits, gold.repeat(variants, 1), real, last, ends)


def gold_outcomes(
    model: LanguageModel,
    task: Task,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    share_prefix: bool = True,
) -> GoldOutcomes:
    """Verdict, log-probability and logit difference of every question: one teacher-forced forward a batch."""
    found = gold_variants(model, task, 1, batch_size, padding_side, share_prefix)
    return GoldOutcomes(*(values[0] for values in found))


def gold_variants(
    model: LanguageModel,
    task: Task,
    variants: int,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    share_prefix: bool = True,
) -> GoldOutcomes:
    """The outcomes of passes that fork (see ``forked``), each of shape (variants, questions)."""
    import torch

    make_ready(model)
    check_task(task)
    collected = GoldCollector(variants, len(task))
    with torch.no_grad():
        for done in gold_passes(model, task, batch_size, padding_side, share_prefix):
            collected.add(done, range(variants))
    return collected.outcomes


class GoldCollector:
    """Outcomes of shape (variants, questions), filled batch by batch or part by part."""

    def __init__(self, variants: int, questions: int) -> None:
        shape = (variants, questions)
        self.outcomes = GoldOutcomes(np.zeros(shape, dtype=bool), np.zeros(shape), np.zeros(shape))

    def add(self, done: GoldPass, variants: Sequence[int]) -> None:
        """A batch under some of the variants."""
        found = GoldOutcomes(
            done.hits.numpy(),
            done.log_probability.cpu().double().numpy(),
            done.logit_difference.cpu().double().numpy(),
        )
        self.put(variants, done.rows[: len(done.rows) // len(variants)], found)

    def put(self, variants: Sequence[int], rows: Sequence[int], found: GoldOutcomes) -> None:
        """Outcomes of some questions under some of the variants."""
        for into, new in zip(self.outcomes, found, strict=True):
            into[np.ix_(variants, rows)] = new.reshape(len(variants), len(rows))


def gold_scores(
    model: LanguageModel,
    task: Task,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    share_prefix: bool = True,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(verdicts, log-probabilities) of :func:`gold_outcomes`."""
    found = gold_outcomes(model, task, batch_size, padding_side, share_prefix)
    return found.correct, found.log_probability


def _logits_in_phases(hf: Any, ids: Any, mask: Any, answer: int) -> Any:
    """The logits of the last ``answer`` tokens, from a pass over the prompt and one over the answer, as generation
    has them: what acts on one of the two sees it alone."""
    import torch
    from transformers import DynamicCache

    ids, mask = ids.to(hf.device), mask.to(hf.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, whole = DynamicCache(config=hf.config), ids.shape[1]
    # the prompt's last token predicts the answer's first
    cut = whole - answer + 1
    logits = []
    for start, stop, wanted in ((0, cut, cut - 1), (cut, whole, 0)):
        if start < stop:
            out = hf(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=scored(ids, wanted, stop - start),
            )
            logits.append(out.logits)
    return torch.cat(logits, 1)
