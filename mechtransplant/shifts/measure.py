"""Shifts of heads, neurons, MLPs, attention blocks, linear layers: every measure of the statistical contract, streamed.

Sign: source minus target. A value is a mean over a prompt's chosen positions; both models read the same tokens. With
a^S = f^S(x^S) the source's output, a^T = f^T(x^T) the target's, and f^S(x^T) the source's module on the target's input
(the moved output), at one position:

==========  ============================================================  ========
magnitude   ‖a^S‖₁/d − ‖a^T‖₁/d                                           signed
distance    ‖a^S − a^T‖ / N, where N = ½(‖a^S‖ + ‖a^T‖)                   ≥ 0
own         ‖f^S(x^T) − a^T‖ / N: what the module's own weights change    ≥ 0
inherited   ‖a^S − f^S(x^T)‖ / N: what comes from upstream                ≥ 0
lae         |‖a^S‖₁ − ‖a^T‖₁| / d, at every position: the seed paper's  ≥ 0
lae_rel.    the same over ½(‖a^S‖₁ + ‖a^T‖₁)/d (`lae_relative`)         ≥ 0
alignment   cosine of a prompt's shift vector with the mean of the others  −1 … 1
projection  a prompt's shift vector on a direction fixed by other prompts  signed
==========  ============================================================  ========

One N for all three, so that distance ≤ own + inherited holds as it stands; where N is 0, so is the measure. A
neuron's N is that of its MLP (what all neurons of the layer write together), because a neuron can be silent where its
weights or its input change much.

A head's output is z @ W_O of its own columns, without the layer's bias, and a neuron's its activation times its column
of the MLP's last layer. An attention block's or MLP's output is that of its last linear layer: where a norm follows
(Gemma, OLMo 2), before that norm, because the norm mixes all heads. A module's input is what enters it, so norm scales
before it count as inherited. The source's attention block is run on the target's input with the target's mask and
rotary angles; a head's own shift therefore includes the K and V of its group.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mechtransplant.activations import Positions, Text, plan_reading, written_texts
from mechtransplant.errors import UsageError, check_count, check_seed
from mechtransplant.evaluation.batches import PaddingSide, make_ready
from mechtransplant.selection import QUESTIONS
from mechtransplant.shifts.collector import Collector, Moments, PromptValues, names_of
from mechtransplant.shifts.frames import DIRECT, FROM_VECTORS, MEASURES
from mechtransplant.shifts.recorder import PairRecorder
from mechtransplant.shifts.stored import StoredOutputs
from mechtransplant.shifts.vectors import ShiftVectors
from mechtransplant.tasks import Task
from mechtransplant.weights import runs_on, takes_turns

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import Pair


def measure_shifts(
    pair: Pair,
    task: Task,
    kinds: str | Iterable[str] = ("head", "mlp"),
    measures: str | Iterable[str] = ("magnitude", "distance", "own"),
    positions: Positions = "all",
    *,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Every module's shift on every prompt, in one pass over the prompts; both models read a batch once.

    Memory holds one batch, the values, and nothing that grows with positions; "alignment" and "projection" keep their
    vectors in a temporary file.

    Args:
        kinds: "head", "neuron", "mlp", "attn", "linear", in the order of the result.
        measures: see the module's docstring.
        positions: "all" (of the prompt), "last", "answer" or "decoding" (see ``activations.POSITIONS``).
        text: for "decoding": whose text both models read, "target", "source" or "gold".
        seed: for "projection": which half of the prompts fixes the direction.

    Returns:
        a tidy frame: module, kind, layer, head, prompt (the question's number in the task), measure, value.

    Raises:
        UnknownNameError: unknown kinds, measures or positions. UsageError: a measure that needs two prompts.
    """
    options = (positions, text, max_new_tokens, batch_size, padding_side, seed, progress)
    return _measured(pair, task, kinds, measures, False, *options)[0]


def shifts_and_vectors(
    pair: Pair,
    task: Task,
    kinds: str | Iterable[str] = ("head", "mlp"),
    measures: str | Iterable[str] = MEASURES,
    positions: Positions = "all",
    *,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    seed: int = 0,
    progress: bool = False,
) -> tuple[pd.DataFrame, ShiftVectors]:
    """(:func:`measure_shifts`, :func:`shift_vectors`) of the same prompts in one pass; arguments, errors as there."""
    options = (positions, text, max_new_tokens, batch_size, padding_side, seed, progress)
    frame, vectors = _measured(pair, task, kinds, measures, True, *options)
    assert vectors is not None
    return frame, vectors


def summarize_shifts(
    pair: Pair,
    task: Task,
    kinds: str | Iterable[str] = ("head", "mlp"),
    measures: str | Iterable[str] = ("magnitude", "distance", "own"),
    positions: Positions = "all",
    *,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    progress: bool = False,
) -> pd.DataFrame:
    """Mean shifts of many prompts in memory that does not grow with them: no prompt's own value is kept.

    Arguments as of :func:`measure_shifts`. Means and variances are updated batch by batch in float64 (Chan, Golub and
    LeVeque's pairwise formula).

    Returns:
        one row a module and measure: module, kind, layer, head, measure, n (prompts), mean, sd (NaN of one prompt), se,
        low and high (95 % interval of the mean by Student's t), smallest, largest.

    Raises:
        UsageError: for alignment and projection, which compare prompts with each other.
    """
    import pandas as pd

    check_pair(pair, task)
    check_count("batch_size", batch_size)
    wanted = names_of(measures, "measure", MEASURES)
    for measure in wanted:
        if measure in FROM_VECTORS:
            raise UsageError(f"{measure} compares prompts with each other: use measure_shifts, which keeps them")
    moments = Moments()
    collector = Collector(pair, len(task), kinds, tuple(wanted), moments)
    collect(pair, task, collector, positions, text, max_new_tokens, batch_size, padding_side, progress)
    whole = pd.concat([moments.frame(measure) for measure in wanted], ignore_index=True)
    whole.attrs[QUESTIONS] = list(task.keys)
    return whole


def _measured(
    pair: Pair,
    task: Task,
    kinds: str | Iterable[str],
    measures: str | Iterable[str],
    keep_vectors: bool,
    positions: Positions,
    text: Text,
    max_new_tokens: int | None,
    batch_size: int,
    padding_side: PaddingSide,
    seed: int,
    progress: bool,
) -> tuple[pd.DataFrame, ShiftVectors | None]:
    import pandas as pd

    check_pair(pair, task)
    check_seed(seed)
    check_count("batch_size", batch_size)
    wanted = names_of(measures, "measure", MEASURES)
    with_vectors = [m for m in wanted if m in FROM_VECTORS]
    if with_vectors and len(task) < 2:
        raise UsageError(f"{with_vectors[0]} compares prompts with each other: give at least two, got {len(task)}")
    direct = tuple(m for m in wanted if m in DIRECT)
    values = PromptValues(len(task))
    collector = Collector(pair, len(task), kinds, direct, values, keep_vectors or bool(with_vectors))
    collect(pair, task, collector, positions, text, max_new_tokens, batch_size, padding_side, progress)
    frames = []
    for measure in wanted:
        if measure in DIRECT:
            frames.append(values.frame(measure))
        else:
            assert collector.vectors is not None
            frames.append(collector.vectors.frame(measure, seed))
    whole = pd.concat(frames, ignore_index=True)
    whole.attrs[QUESTIONS] = list(task.keys)
    return whole, collector.vectors


def check_pair(pair: object, task: object) -> None:
    """Raise UsageError for anything that is no pair or no task (names of them are not enough)."""
    if not (hasattr(pair, "source") and hasattr(pair, "target")):
        raise UsageError(f"expected a pair, got {type(pair).__name__}: pass load_pair(…)")
    if not isinstance(task, Task):
        raise UsageError(f"expected a task, got {type(task).__name__}: pass load_task(…), or one of its splits")


def collect(
    pair: Pair,
    task: Task,
    collector: Collector,
    positions: Positions,
    text: Text,
    max_new_tokens: int | None,
    batch_size: int,
    padding_side: PaddingSide,
    progress: bool,
) -> None:
    """Read the task with both models, batch by batch, into the collector."""
    import torch

    texts = None
    if positions == "decoding":
        texts = written_texts(pair.source, pair.target, task, text, max_new_tokens, batch_size, progress)
    reading = plan_reading(pair.target, task, positions, texts=texts)
    batches = partial(reading.batches, pair.target.hf, batch_size, padding_side, progress)
    with torch.no_grad(), PairRecorder(pair, collector.slots, collector.needs_moved) as recorder:
        if not takes_turns(pair.source.hf):
            for batch in batches("measure shifts"):
                recorder.read(batch, collector.consumer(batch))
            return
        stored = StoredOutputs(pair.source.hf.dtype, runs_on(pair.source.hf))
        make_ready(pair.source)
        for number, batch in enumerate(batches("read the source")):
            recorder.read_source(batch, partial(stored.put, number))
        make_ready(pair.target)
        for number, batch in enumerate(batches("read the target")):
            recorder.read_target(batch, partial(stored.get, number), collector.consumer(batch))


def average_by_template(shifts: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The shifts with templates as the unit instead of prompts: means over the prompts that share one.

    ``prompt`` then numbers the templates, in the order of their names. Raises UsageError where the task has fewer
    than two, or the frame's prompts are not the task's.
    """
    lacking = [c for c in ("module", "prompt", "measure", "value") if c not in shifts.columns]
    if lacking:
        raise UsageError(f"the shifts lack the columns {', '.join(lacking)}: pass a frame from measure_shifts")
    compared = sorted({"alignment", "projection"} & set(shifts.measure))
    if compared:
        raise UsageError(
            f"{compared[0]} compares prompts with each other, and those of one template would be on both sides: "
            "average the other measures"
        )
    names = sorted({e.template for e in task})
    if len(names) < 2:
        raise UsageError(f"task {task.name!r} has {len(names)} template: prompts are then the unit")
    strange = ~shifts.prompt.isin(range(len(task)))
    if strange.any():
        raise UsageError(
            f"the shifts have prompt {shifts.prompt[strange].iloc[0]!r} and the task has prompts 0 to {len(task) - 1}: "
            "give the task that was measured"
        )
    number = np.array([names.index(e.template) for e in task])
    columns = [c for c in ("module", "kind", "layer", "head", "prompt", "measure") if c in shifts.columns]
    numbered = shifts.assign(prompt=number[shifts.prompt.to_numpy(dtype=int)])
    by_template = numbered.groupby(columns, sort=False, dropna=False, observed=True)
    return by_template["value"].mean().reset_index()
