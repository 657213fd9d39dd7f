"""Prompts as token batches: one encoding for both models, sorted by length, the shared prefix computed once.

A batch is laid out ``prefix | pad | rest | completion | pad``: the prefix that all prompts share (system message,
worked examples) stands before the padding, so that its keys and values are computed once and repeated for every row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mechtransplant.errors import TaskError, UsageError
from mechtransplant.evaluation.interventions import accepting, by_acceptance, interventions_on
from mechtransplant.tasks import Example, Task

if TYPE_CHECKING:
    import torch

PaddingSide = Literal["left", "right"]
#: below this many shared tokens a prefix is not worth a forward pass of its own
SHORTEST_PREFIX = 8


@dataclass(frozen=True)
class Encoded:
    """Token ids of a task's prompts and gold completions, in the task's order; gold ends with the end token."""

    prompts: list[list[int]]
    completions: list[list[int]]
    prefix: list[int]
    examples: tuple[Example, ...]


def make_ready(model: Any) -> None:
    """Have a model's weights where it runs; raises UsageError for what is no model (a pair, a Hugging Face model)."""
    if not all(hasattr(model, name) for name in ("hf", "tokenizer", "awaken")):
        raise UsageError(f"expected a model, such as pair.target, got {type(model).__name__}")
    model.awaken()


def check_task(task: Any) -> None:
    """Raise UsageError for what is no task (splits, a task's name)."""
    if not isinstance(task, Task):
        raise UsageError(f"expected a task, such as load_task(…) or splits.test, got {type(task).__name__}")


def encode(task: Task, tokenizer: Any) -> Encoded:
    """The task's prompts and completions as token ids; raises TaskError for a prompt that becomes no token.

    A completion ends with the tokenizer's end token, if it has one.
    """
    check_task(task)
    # a chat template writes its own begin token
    templated = task.format.chat is not False and bool(getattr(tokenizer, "chat_template", None))
    prompts = [list(tokenizer(text, add_special_tokens=not templated)["input_ids"]) for text in task.prompts(tokenizer)]
    for example, ids in zip(task.examples, prompts, strict=True):
        if not ids:
            raise TaskError(
                f"the question {example.question!r} becomes no token: give the tokenizer a begin token, or a "
                "longer prompt"
            )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    completions = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) + end for text in task.completions()]
    return Encoded(prompts, completions, _shared_prefix(prompts), tuple(task.examples))


def _shared_prefix(prompts: list[list[int]]) -> list[int]:
    """The longest common prefix that leaves at least one token of every prompt; empty where it is too short to pay."""
    if len(prompts) < 2:
        return []
    low, high = min(prompts), max(prompts)
    shared = 0
    limit = min(map(len, prompts)) - 1
    while shared < limit and low[shared] == high[shared]:
        shared += 1
    return low[:shared] if shared >= SHORTEST_PREFIX else []


def length_sorted(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of row numbers with similar lengths, longest first, so that a run that will not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def question_batches(model: Any, encoded: Encoded, lengths: list[int], batch_size: int) -> list[QuestionBatch]:
    """Batches of similar lengths, each of questions about which all that acts on the model has one verdict."""
    return [
        QuestionBatch([group[i] for i in rows], verdicts)
        for group, verdicts in by_acceptance(model, encoded.examples)
        for rows in length_sorted([lengths[i] for i in group], batch_size)
    ]


@dataclass(frozen=True)
class QuestionBatch:
    """Row numbers, and the verdicts of what acts on the model (see ``interventions``)."""

    rows: list[int]
    verdicts: list[bool]

    def running(self, model: Any) -> AbstractContextManager[None]:
        """A block in which the model's forward passes are this batch's."""
        return accepting(model, self.verdicts)


def scored(ids: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """What to give as ``logits_to_keep`` for positions ``start`` … ``stop`` − 1 of a batch's token ids.

    A number is taken as a slice, whose rows lie apart in memory: the output head then reads its weights once for every
    row of the batch, which takes up to five times as long.
    """
    import torch

    return torch.arange(start, stop, device=ids.device)


@contextmanager
def one_product(model: Any) -> Iterator[None]:
    """A block in which the output head reads its weights once a batch (see :func:`scored`), whoever calls the model."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]) if inputs else None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def prefix_cache(model: Any, prefix: list[int]) -> Iterator[Any]:
    """A function of a batch size that gives a fresh key-value cache holding the prefix, or None without a prefix."""
    import copy

    import torch
    from transformers import DynamicCache

    if not prefix:
        yield lambda rows: None
        return
    with torch.no_grad():
        cache = model(
            input_ids=torch.tensor([prefix], device=model.device),
            use_cache=True,
            logits_to_keep=1,
            past_key_values=DynamicCache(config=model.config),
        ).past_key_values

    def repeated(rows: int) -> Any:
        # a model appends to the cache that it is given
        fresh = copy.deepcopy(cache)
        fresh.batch_repeat_interleave(rows)
        return fresh

    yield repeated


def check_lengths(model: Any, longest: int) -> None:
    """Refuse prompts (with what is to be written) beyond learned positions; warn where rotary ones are stretched."""
    import torch

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or longest <= limit:
        return
    words = model.get_input_embeddings()
    # OPT's table has two places more than its config says
    learned = any(
        isinstance(m, torch.nn.Embedding) and m is not words and limit <= m.num_embeddings <= limit + 2
        for m in model.modules()
    )
    said = f"prompt and answer have {longest} tokens, and {type(model).__name__} has {limit} positions"
    if learned:
        raise TaskError(f"{said}: shorten the prompts or the token budget")
    warnings.warn(f"{said}: beyond them its answers mean little", stacklevel=3)


def usable_prefix(model: Any, encoded: Encoded, longest: int) -> list[int]:
    """The shared prefix, unless padding inside a sliding window would count, or a pass of its own would mislead."""
    if interventions_on(model):
        return []
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return encoded.prefix if window is None or longest <= window else []


def pad(rows: list[list[int]], value: int, side: PaddingSide = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows of unequal length, each of shape (rows, longest)."""
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1
    return ids, mask
