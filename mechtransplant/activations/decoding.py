"""Activations during decoding: the mean absolute output of every linear layer at the last generated token (eq. 5).

At step t the input is the prompt and the t tokens generated so far, and the activation of a layer is
a(t) = ‖h(t)‖₁ / d at the last of them; step 0 reads the last token of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.activations.reading import plan_reading
from mechtransplant.evaluation.batches import encode, make_ready, usable_prefix
from mechtransplant.evaluation.generation import Generation, generation_batches
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel

Magnitudes = NDArray[np.float64]


@contextmanager
def _recorded_magnitudes(model: LanguageModel) -> Iterator[dict[str, list[Any]]]:
    """address → ‖h‖₁/d of every forward call, each of shape (batch, positions), or flat where the layer sees it so."""
    calls: dict[str, list[Any]] = {address: [] for address in model.layout.linears}

    def recorder(address: str) -> Any:
        # float32 sums whatever the model's dtype
        return lambda module, inputs, output: calls[address].append(output.detach().abs().float().mean(-1).cpu())

    handles = [
        model.hf.get_submodule(name).register_forward_hook(recorder(address))
        for address, name in model.layout.linears.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def decoding_magnitudes(
    model: LanguageModel, task: Task, max_new_tokens: int | None = None, batch_size: int = 64, progress: bool = False
) -> tuple[Magnitudes, list[Generation]]:
    """Magnitudes while the model writes its own greedy text, up to the end of its answer.

    Returns:
        (array of shape (linear layers, prompts, steps), NaN after a row's last step; the generations).
    """
    encoded = encode(task, model.tokenizer)
    budget = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    values = np.full((len(model.layout.linears), len(task), budget), np.nan)
    generations: list[Generation] = [Generation((), False)] * len(task)
    longest = max(map(len, encoded.prompts)) + budget
    # the prefix's own forward comes before the first batch
    before = int(bool(usable_prefix(model.hf, encoded, longest)))
    with _recorded_magnitudes(model) as calls:
        for rows, written in generation_batches(model, encoded, budget, batch_size, progress):
            steps = max(len(g.tokens) for g in written)
            for index, recorded in enumerate(calls.values()):
                # from the front: where transformers finds out late that all rows have ended (on mps), a step too many
                # was taken, whose token is undone
                for step, call in enumerate(recorded[before : before + steps]):
                    values[index, rows, step] = call.reshape(len(rows), -1)[:, -1].numpy()
                recorded.clear()
            before = 0
            for row, generation in zip(rows, written, strict=True):
                generations[row] = generation
                # a finished row goes on being padded while others write: those steps are not the model's
                values[:, row, generation.steps(model.tokenizer, task.stop) :] = np.nan
    return values, generations


def forced_magnitudes(
    model: LanguageModel, task: Task, texts: Sequence[Sequence[int]], batch_size: int = 64, progress: bool = False
) -> Magnitudes:
    """Magnitudes while the model reads given continuations, one list of token ids a prompt.

    Returns:
        array of shape (linear layers, prompts, steps), NaN after the length of a row's text.
    """
    import torch

    make_ready(model)
    reading = plan_reading(model, task, "decoding", texts=texts)
    values = np.full((len(model.layout.linears), len(task), max(reading.lengths)), np.nan)
    with torch.no_grad(), _recorded_magnitudes(model) as calls:
        for batch in reading.batches(model.hf, batch_size, progress=progress, what="read activations"):
            model.hf(**batch.hidden_only)
            step = torch.cat([torch.arange(n) for n in batch.lengths]).numpy()
            prompts = np.array(batch.prompts)[batch.row.cpu().numpy()]
            for index, recorded in enumerate(calls.values()):
                values[index, prompts, step] = batch.gather(recorded[-1][..., None])[:, 0].numpy()
                recorded.clear()
    return values
