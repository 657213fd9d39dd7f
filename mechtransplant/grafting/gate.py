"""A gate: what a conditional graft asks, so that it is in place for questions of a task and for nothing else.

The target reads the bare question (no chat template, no worked examples), or a text; the mean of its residual stream
over the tokens, x, is compared with the means μ⁺ and μ⁻ that two kinds of questions had when the gate was fitted. It is
a linear discriminant, open where (μ⁺ − μ⁻)ᵀ C⁻¹ (x − ½(μ⁺ + μ⁻)) > 0, whose pooled covariance is shrunk to a multiple
of the identity, C = (1 − γ) S + γ tr(S)/d I (Friedman 1989): there are fewer questions than dimensions. Nothing is
trained by gradients, and no answer is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError, check_count
from mechtransplant.evaluation.batches import check_lengths, length_sorted, make_ready, pad
from mechtransplant.evaluation.interventions import all_closed, interventions_on
from mechtransplant.pair import grafts_on
from mechtransplant.tasks import Example, Task

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel


#: γ: how far the pooled covariance is shrunk
SHRINKAGE = 0.1


class Texts(Protocol):
    """What becomes token ids, a row a text (see ``side_effects.NeutralText``)."""

    def rows(self, model: LanguageModel) -> list[list[int]]: ...


@dataclass
class Gate:
    """A predicate of a question, to be given as ``ConditionalGraft(graft, accepts=gate)``; see :func:`fit_gate`.

    ``direction`` and ``centre`` have shape (d_model,), of the residual stream after ``layer``; ``known`` keeps what was
    decided, by the question's key. It reads the target as it is: inside of a plain graft's block only what it knows.
    """

    model: LanguageModel
    layer: int
    direction: NDArray[np.float64]
    centre: NDArray[np.float64]
    batch_size: int = 64
    known: dict[str, bool] = field(default_factory=dict, repr=False)
    _texts: dict[tuple[int, ...], bool] = field(default_factory=dict, repr=False)

    def __call__(self, example: Example) -> bool:
        """Whether it is open for a question."""
        if example.key not in self.known:
            self.read([example])
        return self.known[example.key]

    def read(self, examples: Sequence[Example]) -> None:
        """Read many questions at once; evaluations do so by themselves."""
        new = list({e.key: e for e in examples if e.key not in self.known}.values())
        if new:
            for example, is_open in zip(new, self.opens(_questions(self.model, new)), strict=True):
                self.known[example.key] = bool(is_open)

    def opens(self, rows: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """Whether it is open for each of some rows of token ids."""
        x = residual_means(self.model, rows, self.layer, self.batch_size)
        return (x - self.centre) @ self.direction > 0

    def opens_for_texts(self, rows: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """As :meth:`opens`, of texts that one graft after another is measured on: each is read once."""
        asked = [tuple(row) for row in rows]
        new = [row for row in dict.fromkeys(asked) if row not in self._texts]
        if new:
            self._texts |= zip(new, self.opens(new).tolist(), strict=True)
        return np.array([self._texts[row] for row in asked], dtype=bool)

    def share(self, what: Task | Texts) -> float:
        """The share of a task's questions, or of texts, that it is open for."""
        return float(self.opens(_rows(self.model, what)).mean())


def fit_gate(
    model: LanguageModel,
    task: Task,
    others: Sequence[Task | Texts],
    layer: int | None = None,
    batch_size: int = 64,
) -> Gate:
    """A gate that is open for a task's questions and closed for those of other tasks, or for neutral texts.

    Args:
        model: the pair's target, without a graft.
        task: for example ``splits.discover``; what is reported on ``test`` was then not seen.
        others: tasks, or neutral texts (of another seed than those that harm is measured on); each counts alike.
        layer: whose residual stream is read, the middle one by default.

    Raises:
        UsageError: no others, a layer that the model does not have, or one question or text alone.
    """
    if not others:
        raise UsageError("a gate is fitted between two kinds of questions: give other tasks or neutral texts as others")
    layers = int(model.hf.config.get_text_config().num_hidden_layers)
    layer = layers // 2 if layer is None else layer
    if not 0 <= layer < layers:
        raise UsageError(f"no layer {layer} in {model.name}: give one from 0 to {layers - 1}")
    read = [residual_means(model, _rows(model, what), layer, batch_size) for what in (task, *others)]
    if min(map(len, read)) < 2:
        raise UsageError("a gate is fitted on variances: give at least two questions or texts of each kind")
    inside, outside = read[0].mean(0), np.mean([x.mean(0) for x in read[1:]], axis=0)
    covariance = np.mean([np.cov(x, rowvar=False) for x in read], axis=0)
    size = len(covariance)
    if not np.trace(covariance) > 0:
        raise UsageError("a gate is fitted on variances, and all these questions are alike: give different ones")
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / size * np.eye(size)
    direction = np.linalg.solve(shrunk, inside - outside)
    return Gate(model, layer, direction, (inside + outside) / 2, batch_size)


def residual_means(
    model: LanguageModel, rows: Sequence[Sequence[int]], layer: int, batch_size: int = 64
) -> NDArray[np.float64]:
    """Mean residual stream after a layer over each row's tokens, shape (rows, d_model).

    What asks about questions is off meanwhile; Hugging Face models give the last layer's after the final norm. Raises
    UsageError where something acts on every question, or a plain graft is in place: these would be another model's
    readings.
    """
    import torch

    make_ready(model)
    check_count("batch_size", batch_size)
    acts = any(i.accepts is None for i in interventions_on(model.hf))
    # a conditional graft asks about questions, and is off while the gate reads them
    if acts or any(entry.saved and not entry.conditional for entry in grafts_on(model.hf)):
        raise UsageError(
            "a gate reads the target as it is: leave the block of the graft or patch that acts on it first, or have "
            "the gate read the questions before it (gate.read)"
        )
    found = np.zeros((len(rows), int(model.hf.config.get_text_config().hidden_size)))
    lengths = [len(row) for row in rows]
    check_lengths(model.hf, max(lengths, default=0))
    for batch in length_sorted(lengths, batch_size):
        ids, mask = pad([list(rows[i]) for i in batch], 0, "right")
        device = model.hf.device
        with torch.no_grad(), all_closed(model.hf):
            states: Any = model.hf(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                output_hidden_states=True,
                logits_to_keep=1,
            ).hidden_states[layer + 1]
        kept = mask.to(states.device)[..., None]
        found[batch] = ((states.double() * kept).sum(1) / kept.sum(1)).cpu().numpy()
    return found


def _rows(model: LanguageModel, what: Task | Texts) -> list[list[int]]:
    if isinstance(what, Task):
        return _questions(model, what.examples)
    if not hasattr(what, "rows"):
        raise UsageError(f"a gate reads tasks and neutral texts, got {type(what).__name__}")
    return what.rows(model)


def _questions(model: LanguageModel, examples: Sequence[Example]) -> list[list[int]]:
    rows = [list(model.tokenizer(example.question)["input_ids"]) for example in examples]
    for example, row in zip(examples, rows, strict=True):
        if not row:
            raise UsageError(f"the question {example.question!r} becomes no token, and a gate has nothing to read")
    return rows
