"""Accuracy on a task: by one teacher-forced forward where that is exact, else by generation.

Greedy decoding writes the gold tokens exactly when every gold token, the end token included, is the argmax given the
gold tokens before it. For a task with one short right answer (``short_answer``) one forward therefore decides what a
generation loop would; ``tests/test_evaluation.py`` proves the two agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mechtransplant.display import html_table, percent
from mechtransplant.errors import TaskError, UsageError
from mechtransplant.evaluation.batches import check_task, encode, make_ready
from mechtransplant.evaluation.generation import generate
from mechtransplant.evaluation.gold import gold_outcomes
from mechtransplant.selection import Selection, selections_on, what_acts_on
from mechtransplant.significance import wilson_interval
from mechtransplant.tasks import Task
from mechtransplant.tasks.scorers import extract_boxed, has_answer

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel

Method = Literal["auto", "teacher-forced", "generate"]


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on a task.

    ``fingerprint`` is the task's: its questions, format and scorer. ``correct`` has one bool a question, in the task's
    order; ``log_probability`` the natural log-probability of the gold completion and ``logit_difference`` its
    narrowest margin, both under teacher forcing (see ``gold``); ``answered`` whether anything could be scored within
    the budget (a box, a number, for ``math`` either or a formula, for ``exact`` the ended text) and ``ended`` whether
    the model ended its answer (generated evaluations only). ``questions`` are the questions' keys, ``selections`` what
    selected the modules that acted on the model.
    """

    task: str
    role: str
    fingerprint: str
    correct: NDArray[np.bool_]
    method: str
    budget: int
    log_probability: NDArray[np.float64] | None = None
    logit_difference: NDArray[np.float64] | None = None
    answered: NDArray[np.bool_] | None = None
    ended: NDArray[np.bool_] | None = None
    texts: tuple[str, ...] | None = None
    questions: tuple[str, ...] = ()
    selections: tuple[Selection, ...] = field(default=(), repr=False, compare=False)

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

    def _repr_html_(self) -> str:
        right = f"{int(self.correct.sum())} of {len(self)} right"
        rows = [("accuracy", f"{percent(self.accuracy, self.interval)}; {right}"), ("decided by", self.method)]
        rows.append(("token budget", str(self.budget)))
        if self.log_probability is not None:
            rows.append(("log p(gold answer), mean", f"{self.log_probability.mean():.2f} nats"))
        return html_table(rows, title=f"{self.task} ({self.role}), 95 % interval")


def evaluate(
    model: LanguageModel,
    task: Task,
    method: Method = "auto",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
    gold: bool = True,
) -> Evaluation:
    """Greedy accuracy of a model on a task, with the interval and one verdict a question.

    Args:
        model: for example ``pair.target``, inside ``with graft.applied(pair)`` or not.
        method: "teacher-forced" (exact only for short-answer tasks), "generate", or "auto", which takes the first
            where it is exact.
        max_new_tokens: the token budget of generation; the task's own by default.
        gold: with "generate", measure the gold answer's log-probability and logit difference too, in one forward more.

    Raises:
        TaskError: teacher-forcing asked of a task whose answers are free-form.
    """
    make_ready(model)
    check_task(task)
    budget = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    return evaluate_budgets(model, task, [budget], batch_size, progress, gold, method)[budget]


def is_short(model: LanguageModel, task: Task) -> bool:
    """Whether one forward decides a task's answers: each is short, and it is known where it ends."""
    return task.short_answer and model.tokenizer.eos_token_id is not None


def _decided(method: str, model: LanguageModel, task: Task) -> str:
    """The method that is meant, once it is known to be one, and exact for the task."""
    if method == "auto":
        return "teacher-forced" if is_short(model, task) else "generate"
    if method not in ("teacher-forced", "generate"):
        raise UsageError(f"unknown method {method!r}: expected auto, teacher-forced or generate")
    if method == "teacher-forced" and not task.short_answer:
        raise TaskError(
            f"task {task.name!r} has free-form answers, which one forward cannot decide: use method='generate'"
        )
    return method


def _short_answers(model: LanguageModel, task: Task, budgets: Sequence[int], batch_size: int) -> dict[int, Evaluation]:
    """Evaluations of a short-answer task at several budgets, from one forward: a longer answer than fits is wrong."""
    found = gold_outcomes(model, task, batch_size)
    lengths = np.array([len(c) for c in encode(task, model.tokenizer).completions])
    selections = _noted(model, task)
    return {
        budget: Evaluation(
            task.name,
            task.role,
            task.fingerprint,
            found.correct & (lengths <= budget),
            "teacher-forced",
            budget,
            found.log_probability,
            found.logit_difference,
            questions=task.keys,
            selections=selections,
        )
        for budget in budgets
    }


def evaluate_budgets(
    model: LanguageModel,
    task: Task,
    budgets: Sequence[int],
    batch_size: int = 64,
    progress: bool = False,
    gold: bool = True,
    method: Method = "generate",
) -> dict[int, Evaluation]:
    """Accuracy at several token budgets from one generation: greedy text at a smaller budget is a prefix of it.

    Arguments and errors as of :func:`evaluate`; short answers are decided by one forward for all budgets.
    """
    make_ready(model)
    check_task(task)
    method = cast("Method", _decided(method, model, task))
    if not budgets or min(budgets) < 1:
        raise UsageError(f"token budgets must be positive whole numbers, got {list(budgets)}")
    if method == "teacher-forced":
        return _short_answers(model, task, budgets, batch_size)
    generations = generate(model, task, max(budgets), batch_size, progress)
    # without an end token it is not known where the gold answer ends
    outcomes = gold_outcomes(model, task, batch_size) if gold and model.tokenizer.eos_token_id is not None else None
    selections = _noted(model, task)
    results = {}
    for budget in budgets:
        written = [g.within(budget).text(model.tokenizer, task.stop) for g in generations]
        texts, ended = [t for t, _ in written], np.array([e for _, e in written])
        settled = [_settled(text, done, task.scorer) for text, done in written]
        correct = np.array([task.score(text, e.answer) for text, e in zip(settled, task.examples, strict=True)])
        answered = np.array([has_answer(text, task.scorer) for text in settled])
        if task.scorer == "exact":
            # an answer that is still being written is not yet the whole text
            answered, correct = ended.copy(), correct & ended
        results[budget] = Evaluation(
            task.name,
            task.role,
            task.fingerprint,
            correct,
            "generate",
            budget,
            None if outcomes is None else outcomes.log_probability,
            None if outcomes is None else outcomes.logit_difference,
            answered,
            ended,
            tuple(texts),
            task.keys,
            selections,
        )
    return results


def _noted(model: LanguageModel, task: Task) -> tuple[Selection, ...]:
    """What selected the modules that act on the model; a selecting split on which they are tried joins it."""
    found = selections_on(model.hf)
    for selection in found:
        if task.role in ("discover", "choose"):
            selection.questions.update(task.keys)
        else:
            selection.tried.setdefault(task.fingerprint, set()).add(what_acts_on(model.hf))
    return found


def _settled(text: str, ended: bool, scorer: str) -> str:
    """The text without what may still be being written: a number or a word that the token budget cut off."""
    if ended or scorer in ("boxed", "exact"):
        return text
    if scorer == "math" and extract_boxed(text) is not None:
        return text
    return re.sub(r"\S+$", "", text)
