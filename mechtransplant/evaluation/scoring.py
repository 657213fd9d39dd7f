"""Accuracy on a task: by one teacher-forced forward where that is exact, else by generation.

Greedy decoding writes the gold tokens exactly when every gold token, the end token included, is the argmax given the
gold tokens before it. For a task with one short right answer (``short_answer``) one forward therefore decides what a
generation loop would; ``tests/test_evaluation.py`` proves the two agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import TaskError, UsageError, check_count
from mechtransplant.evaluation.batches import (
    PaddingSide,
    check_lengths,
    check_model,
    check_task,
    encode,
    pad,
    prefix_cache,
    question_batches,
    usable_prefix,
)
from mechtransplant.evaluation.generation import end_tokens, generate
from mechtransplant.evaluation.interventions import is_phased
from mechtransplant.significance import wilson_interval
from mechtransplant.tasks import Task
from mechtransplant.tasks.scorers import extract_boxed

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel

Method = Literal["auto", "teacher-forced", "generate"]


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on a task.

    ``fingerprint`` is the task's: its questions, format and scorer. ``correct`` has one bool a question, in the task's
    order; ``log_probability`` the natural log-probability of the
    gold completion (teacher-forced evaluations only); ``answered`` whether anything could be scored within the budget
    (a box, for boxed scorers) and ``ended`` whether the model ended its answer (generated evaluations only).
    """

    task: str
    role: str
    fingerprint: str
    correct: NDArray[np.bool_]
    method: str
    budget: int
    log_probability: NDArray[np.float64] | None = None
    answered: NDArray[np.bool_] | None = None
    ended: NDArray[np.bool_] | None = None
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of questions answered rightly."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))

    def __repr__(self) -> str:
        low, high = self.interval
        return f"Evaluation({self.task}/{self.role}: {self.accuracy:.1%} [{low:.1%}, {high:.1%}], n = {len(self)})"


def gold_scores(
    model: LanguageModel,
    task: Task,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    share_prefix: bool = True,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(greedy decoding would write the gold tokens, their log-probability): one teacher-forced forward a batch.

    Both have one value a question, in the task's order; log-probabilities are natural and include the end of the text,
    which any of the model's end tokens may write. Raises TaskError where the tokenizer has no end token.
    """
    import torch

    check_model(model)
    check_count("batch_size", batch_size)
    if model.tokenizer.eos_token_id is None:
        raise TaskError(f"the tokenizer of {model.name} has no end token: use method='generate'")
    ends = torch.tensor(end_tokens(model))
    encoded = encode(task, model.tokenizer)
    hf = model.hf
    totals = [len(p) + len(c) for p, c in zip(encoded.prompts, encoded.completions, strict=True)]
    check_lengths(hf, max(totals))
    phased = is_phased(hf)
    # right padding stands after the gold tokens of every row, so the rows' gold positions are not aligned
    aligned = padding_side == "left" or phased
    prefix = usable_prefix(hf, encoded, max(totals)) if share_prefix else []
    correct = np.zeros(len(task), dtype=bool)
    log_probability = np.zeros(len(task))
    with torch.no_grad(), prefix_cache(hf, prefix) as cache_for:
        for batch in question_batches(hf, encoded, totals, batch_size):
            rows = batch.rows
            prompts = [encoded.prompts[i][len(prefix) :] for i in rows]
            golds = [encoded.completions[i] for i in rows]
            gold, gold_mask = pad(golds, 0, "right")
            if aligned:
                ids, mask = pad(prompts, 0, "left")
                ids, mask = torch.cat([ids, gold], 1), torch.cat([mask, gold_mask], 1)
                keep = gold.shape[1] + 1
            else:
                ids, mask = pad([p + g for p, g in zip(prompts, golds, strict=True)], 0, "right")
                keep = ids.shape[1]
            with batch.running(hf):
                if phased:
                    logits = _logits_in_phases(hf, ids, mask, gold.shape[1])
                else:
                    # positions count real tokens only; a pad's own position never matters
                    positions = (mask.cumsum(1) - 1).clamp_min(0) + len(prefix)
                    full_mask = torch.cat([torch.ones(len(rows), len(prefix), dtype=torch.long), mask], 1)
                    logits = hf(
                        input_ids=ids.to(hf.device),
                        attention_mask=full_mask.to(hf.device),
                        position_ids=positions.to(hf.device),
                        past_key_values=cache_for(len(rows)),
                        use_cache=bool(prefix),
                        logits_to_keep=keep,
                    ).logits
                    if aligned:
                        logits = logits[:, :-1]
            if not aligned:
                starts = torch.tensor([len(p) - 1 for p in prompts])
                index = (starts[:, None] + torch.arange(gold.shape[1])).clamp_max(ids.shape[1] - 1)
                logits = logits[torch.arange(len(rows))[:, None], index.to(logits.device)]
            real = gold_mask.bool()
            last = real & (real.cumsum(1) == real.sum(1, keepdim=True))
            written = logits.argmax(-1).cpu()
            hits = torch.where(last, torch.isin(written, ends), written == gold) | ~real
            scores = logits.float().log_softmax(-1)
            chosen = scores.gather(-1, gold.to(logits.device)[..., None])[..., 0].cpu()
            chosen = torch.where(last, scores[..., ends.to(logits.device)].logsumexp(-1).cpu(), chosen)
            correct[rows] = hits.all(1).numpy()
            log_probability[rows] = chosen.masked_fill(~real, 0).double().sum(1).numpy()
    return correct, log_probability


def _logits_in_phases(hf: Any, ids: Any, mask: Any, answer: int) -> Any:
    """The logits of the last ``answer`` tokens, from a pass over the prompt and one over the answer, as generation
    has them: what acts on one of the two sees it alone."""
    import torch
    from transformers import DynamicCache

    ids, mask = ids.to(hf.device), mask.to(hf.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, cut, last = DynamicCache(config=hf.config), ids.shape[1] - answer, ids.shape[1] - 1
    logits = []
    for start, stop in ((0, cut), (cut, last)):
        if start < stop:
            out = hf(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1 if start == 0 else stop - start,
            )
            logits.append(out.logits)
    return torch.cat(logits, 1)


def evaluate(
    model: LanguageModel,
    task: Task,
    method: Method = "auto",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Greedy accuracy of a model on a task, with the interval and one verdict a question.

    Args:
        model: for example ``pair.target``, inside ``with graft.applied(pair)`` or not.
        method: "teacher-forced" (exact only for short-answer tasks), "generate", or "auto", which takes the first
            where it is exact.
        max_new_tokens: the token budget of generation; the task's own by default.

    Raises:
        TaskError: teacher-forcing asked of a task whose answers are free-form.
    """
    check_model(model)
    check_task(task)
    budget = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    if method == "auto":
        decided = task.short_answer and model.tokenizer.eos_token_id is not None
        method = "teacher-forced" if decided else "generate"
    if method == "generate":
        return evaluate_budgets(model, task, [budget], batch_size, progress)[budget]
    if method != "teacher-forced":
        raise UsageError(f"unknown method {method!r}: expected auto, teacher-forced or generate")
    if not task.short_answer:
        raise TaskError(
            f"task {task.name!r} has free-form answers, which one forward cannot decide: use method='generate'"
        )
    correct, log_probability = gold_scores(model, task, batch_size)
    fits = np.array([len(c) <= budget for c in encode(task, model.tokenizer).completions])
    return Evaluation(task.name, task.role, task.fingerprint, correct & fits, "teacher-forced", budget, log_probability)


def evaluate_budgets(
    model: LanguageModel, task: Task, budgets: Sequence[int], batch_size: int = 64, progress: bool = False
) -> dict[int, Evaluation]:
    """Accuracy at several token budgets from one generation: greedy text at a smaller budget is a prefix of it."""
    check_model(model)
    check_task(task)
    if not budgets or min(budgets) < 1:
        raise UsageError(f"token budgets must be positive whole numbers, got {list(budgets)}")
    generations = generate(model, task, max(budgets), batch_size, progress)
    results = {}
    for budget in budgets:
        written = [g.within(budget).text(model.tokenizer, task.stop) for g in generations]
        texts, ended = [t for t, _ in written], np.array([e for _, e in written])
        settled = [_settled(text, done, task.scorer) for text, done in written]
        correct = np.array([task.score(text, e.answer) for text, e in zip(settled, task.examples, strict=True)])
        answered = ended.copy()
        if task.scorer in ("boxed", "math"):
            answered = np.array([extract_boxed(text) is not None for text in texts])
        elif task.scorer == "exact":
            # an answer that is still being written is not yet the whole text
            correct &= ended
        results[budget] = Evaluation(
            task.name, task.role, task.fingerprint, correct, "generate", budget, None, answered, ended, tuple(texts)
        )
    return results


def _settled(text: str, ended: bool, scorer: str) -> str:
    """The text without what may still be being written: a number or a word that the token budget cut off."""
    if ended or scorer in ("boxed", "exact"):
        return text
    if scorer == "math" and extract_boxed(text) is not None:
        return text
    return re.sub(r"\S+$", "", text)
