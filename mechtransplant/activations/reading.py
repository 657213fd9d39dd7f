"""What a model reads and which positions count: the text of every prompt, in padded batches, without its padding.

A position counts where its output is wanted. Padding never counts: batches name the counted positions one by one, and
whoever records activations gathers just those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from mechtransplant.errors import UnknownNameError, UsageError, check_count
from mechtransplant.evaluation.batches import PaddingSide, check_lengths, encode, length_sorted, pad, scored
from mechtransplant.evaluation.interventions import check_recordable
from mechtransplant.progress import track
from mechtransplant.tasks import Task
from mechtransplant.weights import runs_on

if TYPE_CHECKING:
    import torch

    from mechtransplant.pair import LanguageModel

Positions = Literal["all", "last", "answer", "decoding"]
Text = Literal["target", "source", "gold"]
#: name → which positions count
POSITIONS: dict[str, str] = {
    "all": "every token of the prompt",
    "last": "the prompt's last token",
    "answer": "the positions that predict the gold answer: the prompt's last token and all gold ones but the last",
    "decoding": "the positions that predict a greedy text: the prompt's last token and all written ones but the last",
}


@dataclass(frozen=True)
class Batch:
    """One padded batch: ``prompts`` (their numbers), the model's ``inputs``, and the counted positions.

    ``row`` and ``column`` (each of shape (counted,)) index a tensor of shape (batch, position, …); counted positions
    are in order, prompt by prompt, ``lengths`` of them each.
    """

    prompts: list[int]
    inputs: dict[str, torch.Tensor]
    row: torch.Tensor
    column: torch.Tensor
    lengths: list[int]

    @property
    def hidden_only(self) -> dict[str, Any]:
        """What to ask of a model whose hidden states alone are wanted: one position of logits is the least."""
        last = self.inputs["input_ids"].shape[1] - 1
        return {**self.inputs, "use_cache": False, "logits_to_keep": scored(self.inputs["input_ids"], last, last + 1)}

    def gather(self, output: torch.Tensor) -> torch.Tensor:
        """The counted positions of a module's output: (batch, position, width) → (counted, width).

        Also takes outputs that a layer sees flat, of shape (batch · position, width).
        """
        positions = self.inputs["input_ids"].shape[1]
        rows, columns = self.row.to(output.device), self.column.to(output.device)
        return output.reshape(len(self.prompts), positions, -1)[rows, columns]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over a prompt's counted positions: (counted, …) → (prompts, …)."""
        import torch

        lengths = torch.tensor(self.lengths, device=values.device)
        sums = torch.zeros((len(self.lengths), *values.shape[1:]), dtype=values.dtype, device=values.device)
        sums.index_add_(0, self.row.to(values.device), values)
        return sums / lengths.reshape(-1, *[1] * (values.dim() - 1))


@dataclass(frozen=True)
class Reading:
    """Token ids of every prompt, and the half-open span of positions that count in each."""

    rows: list[list[int]]
    spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """How many positions count in every prompt."""
        return [stop - start for start, stop in self.spans]

    def batches(
        self, model: Any, batch_size: int, side: PaddingSide = "left", progress: bool = False, what: str = "read"
    ) -> Iterator[Batch]:
        """Padded batches of prompts of similar length; ``model`` is the Hugging Face model that will read them."""
        import torch

        check_count("batch_size", batch_size)
        check_recordable(model)
        if side not in get_args(PaddingSide):
            raise UsageError(f"unknown padding side {side!r}: expected left or right")
        lengths = [len(row) for row in self.rows]
        device = runs_on(model)
        check_lengths(model, max(lengths))
        for prompts in track(list(length_sorted(lengths, batch_size)), what, progress):
            ids, mask = pad([self.rows[i] for i in prompts], 0, side)
            inputs = {
                "input_ids": ids.to(device),
                "attention_mask": mask.to(device),
                "position_ids": (mask.cumsum(1) - 1).clamp_min(0).to(device),
            }
            row: list[int] = []
            column: list[int] = []
            for at, prompt in enumerate(prompts):
                start, stop = self.spans[prompt]
                shift = ids.shape[1] - lengths[prompt] if side == "left" else 0
                row += [at] * (stop - start)
                column += range(start + shift, stop + shift)
            yield Batch(
                prompts,
                inputs,
                torch.tensor(row, device=device),
                torch.tensor(column, device=device),
                [self.lengths[i] for i in prompts],
            )


def plan_reading(
    model: LanguageModel,
    task: Task,
    positions: Positions = "all",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    texts: Sequence[Sequence[int]] | None = None,
    progress: bool = False,
) -> Reading:
    """What to read for a choice of positions (see ``POSITIONS``).

    Args:
        model: whose tokenizer is used, and, for "decoding" without ``texts``, whose greedy text is read.
        texts: for "decoding", the token ids of each prompt's continuation.

    Raises:
        UnknownNameError: no such positions.
    """
    if positions not in get_args(Positions):
        raise UnknownNameError("positions", positions, POSITIONS)
    if max_new_tokens is not None:
        check_count("max_new_tokens", max_new_tokens)
    if texts is not None and positions != "decoding":
        raise UsageError(f"texts are read at positions='decoding', not {positions!r}")
    encoded = encode(task, model.tokenizer)
    if positions == "all":
        return Reading(encoded.prompts, [(0, len(p)) for p in encoded.prompts])
    if positions == "last":
        return Reading(encoded.prompts, [(len(p) - 1, len(p)) for p in encoded.prompts])
    if positions == "answer":
        texts = encoded.completions
    elif texts is None:
        texts = _greedy(model, task, max_new_tokens, batch_size, progress)
    # the last token of a text is written and never read
    rows = [[*prompt, *list(text)[:-1]] for prompt, text in zip(encoded.prompts, texts, strict=True)]
    spans = [(len(prompt) - 1, len(row)) for prompt, row in zip(encoded.prompts, rows, strict=True)]
    return Reading(rows, spans)


def _greedy(
    model: LanguageModel, task: Task, max_new_tokens: int | None, batch_size: int, progress: bool
) -> list[list[int]]:
    from mechtransplant.evaluation.generation import generate

    written = generate(model, task, max_new_tokens, batch_size, progress)
    return [list(g.tokens[: g.steps(model.tokenizer, task.stop)]) for g in written]


def written_texts(
    source: LanguageModel,
    target: LanguageModel,
    task: Task,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[int]]:
    """Token ids that both models of a pair read at every step: the target's own greedy text, the source's, or gold."""
    if max_new_tokens is not None:
        check_count("max_new_tokens", max_new_tokens)
    if text == "gold":
        return encode(task, target.tokenizer).completions
    if text not in ("target", "source"):
        raise UsageError(f"unknown text {text!r}: expected target, source or gold")
    return _greedy(target if text == "target" else source, task, max_new_tokens, batch_size, progress)
