"""Many changes of one model, each of one layer and each measured alone: what they have in common is computed once.

The questions are read once as the model is. Every change then begins at its layer, and changes of one layer go through
the layers above as one batch where that is faster: few tokens at a time leave a processor waiting. ::

    changes = [Change(7, Graft(["L7.mlp"]).applied(pair)), Change(9, Graft(["L9H3"]).applied(pair))]
    before, after = sweep(pair.target, splits.discover, changes)
    after.log_probability.mean(1) - before.log_probability.mean()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mechtransplant.errors import UsageError, check_count
from mechtransplant.evaluation.answers import AnswerReader
from mechtransplant.evaluation.batches import check_task, encode, make_ready, usable_prefix
from mechtransplant.evaluation.forked import Variant, forking, in_every_pass
from mechtransplant.evaluation.gold import GoldCollector, GoldOutcomes, gold_variants
from mechtransplant.evaluation.interventions import interventions_on
from mechtransplant.evaluation.remembered import LIMIT, can_resume, remembering
from mechtransplant.progress import track
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel

#: tokens that the variants of a layer may have together in one batch: on the CPU, and on an accelerator
TOKENS_AT_ONCE = 1 << 11
TOKENS_ON_ACCELERATORS = 1 << 15


@dataclass(frozen=True)
class Change:
    """A change of one layer: inside ``acting``, a block that is entered again for every pass, the layer is changed."""

    layer: int
    acting: Variant


def sweep(
    model: LanguageModel,
    task: Task,
    changes: Sequence[Change],
    batch_size: int = 64,
    *,
    answer_only: bool = False,
    tokens_at_once: int | None = None,
    progress: bool = False,
    what: str = "changes",
) -> tuple[GoldOutcomes, GoldOutcomes]:
    """The gold answer's outcomes as the model is, and under each change alone.

    Args:
        answer_only: the changes act at the positions that predict the answer and nowhere else: those alone are read
            again, over the prompt's keys and values (see ``answers``).
        tokens_at_once: how many tokens the changes of a layer may have together in one batch (by the device's kind).
            With fewer than two batches' each change goes alone, and its results equal a whole pass's to the bit;
            together they equal it up to the rounding of larger matrix products. Where passes cannot be resumed (see
            ``can_resume``), every change has whole passes.

    Returns:
        (outcomes of shape (questions,), outcomes of shape (changes, questions)).
    """
    make_ready(model)
    check_task(task)
    check_count("batch_size", batch_size)
    if answer_only and interventions_on(model.hf):
        raise UsageError("what acts on this model may tell its prompt from the answer: leave that block first")
    base, found = GoldCollector(1, len(task)), GoldCollector(len(changes), len(task))
    for rows, tokens in _parts(model, task, batch_size):
        part = task if len(rows) == len(task) else task.subset(rows)
        read: Callable[[int], GoldOutcomes] = partial(gold_variants, model, part, batch_size=batch_size)
        if answer_only:
            read = AnswerReader(model, part, batch_size)
            tokens = read.tokens
        with remembering(model, LIMIT) as memory:
            base.put([0], rows, read(1))
        together = at_once(model, tokens, tokens_at_once) if memory.usable else 1
        for layer, chosen in track(list(groups(changes, together)), what, progress):
            acting = [changes[i].acting for i in chosen]
            if memory.usable:
                with forking(model, memory, layer, acting):
                    found.put(chosen, rows, read(len(chosen)))
            else:
                # too much to remember, or (a layer's weights are another's as well) nothing that a layer does alone
                with in_every_pass(model, layer, acting[0]) if can_resume(model) else acting[0]:
                    found.put(chosen, rows, read(1))
    return GoldOutcomes(*(values[0] for values in base.outcomes)), found.outcomes


def groups(changes: Sequence[Change], together: int) -> Iterator[tuple[int, list[int]]]:
    """(layer, the numbers of at most so many changes of it), layer by layer."""
    for layer in sorted({change.layer for change in changes}):
        members = [i for i, change in enumerate(changes) if change.layer == layer]
        for start in range(0, len(members), together):
            yield layer, members[start : start + together]


def at_once(model: LanguageModel, tokens: int, limit: int | None = None) -> int:
    """How many variants of a layer go together, where a batch has so many tokens."""
    if limit is None:
        limit = TOKENS_AT_ONCE if model.hf.device.type == "cpu" else TOKENS_ON_ACCELERATORS
    return max(1, limit // max(1, tokens))


def _parts(model: LanguageModel, task: Task, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """(row numbers, tokens of the largest batch) of parts of the task whose layers' outputs can be remembered."""
    encoded = encode(task, model.tokenizer)
    longest = max(len(p) + len(c) for p, c in zip(encoded.prompts, encoded.completions, strict=True))
    prefix = len(usable_prefix(model.hf, encoded, longest))
    width = max(map(len, encoded.prompts)) + max(map(len, encoded.completions)) - 1 - prefix
    rows, n = list(range(len(task))), len(task)
    if can_resume(model):
        text = model.hf.config.get_text_config()
        a_token = text.hidden_size * model.hf.dtype.itemsize * model.layout.layers
        # whole batches, and at least one; the prefix has a pass of its own
        fits = (LIMIT - prefix * a_token) // (width * a_token)
        n = max(batch_size, fits // batch_size * batch_size)
    for start in range(0, len(rows), n):
        part = rows[start : start + n]
        yield part, width * min(batch_size, len(part))
