"""Rules from activation shifts: how differently source and target respond to the same prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from mechtransplant.activations import Positions, Text
from mechtransplant.errors import UsageError
from mechtransplant.ranking.registry import Kinds, Scores, kinds_of, register_rule
from mechtransplant.shifts import Alignment, decoding_shifts, measure_shifts
from mechtransplant.shifts.recorder import SlotKind
from mechtransplant.significance import test_shifts
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import Pair

SHIFTING = ("linear", "head", "neuron", "mlp", "attn")
#: kinds whose scores are over something else than other kinds' are
ALONE = {
    "neuron": "divides a neuron's shift by what its whole MLP writes, and other modules' by what they write themselves"
}
DECODING = "2 forward passes, and what writing the texts takes"
BOTH = "1 forward pass of each model"


@register_rule(
    "lae",
    "s(m) = mean over prompts and steps of |a_source(t) − a_target(t)|, a = ‖h‖₁/d",
    kinds=SHIFTING,
    cost=DECODING,
    sign="the output's size differs much",
)
def lae(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    alignment: Alignment | None = None,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The seed paper's layer-wise activation evaluation (eqs. 5 and 6)."""
    return _lae(pair, task, kind, "lae", alignment, text, max_new_tokens, batch_size, progress)


@register_rule(
    "lae_relative",
    "s(m) = mean over prompts and steps of |a_source(t) − a_target(t)| / ½(a_source(t) + a_target(t))",
    kinds=SHIFTING,
    cost=DECODING,
    sign="the output's size differs much for its size",
)
def lae_relative(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    alignment: Alignment | None = None,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The same relative to the outputs' size, so that layers with large outputs have no lead."""
    return _lae(pair, task, kind, "lae_relative", alignment, text, max_new_tokens, batch_size, progress)


def _lae(
    pair: Pair,
    task: Task,
    kind: Kinds,
    measure: str,
    alignment: Alignment | None,
    text: Text,
    max_new_tokens: int | None,
    batch_size: int,
    progress: bool,
) -> Scores:
    """Own texts for linear layers, as in the paper; one text for other kinds, whose writes need both models at once."""
    kinds = kinds_of(kind)
    if kinds == ("linear",):
        relative = measure == "lae_relative"
        if text not in (None, "target") and alignment in (None, "own-text"):
            raise UsageError("text= says what both models read, and own-text has none: add alignment='teacher-forced'")
        alignment = alignment or "own-text"
        shifts = decoding_shifts(pair, task, alignment, text, max_new_tokens, batch_size, progress, relative)
    elif alignment == "own-text":
        raise UsageError(
            f"alignment own-text is measured for linear layers, not for {' and '.join(kinds)}: use teacher-forced"
        )
    else:
        shifts = measure_shifts(
            pair,
            task,
            kinds,
            measure,
            "decoding",
            text=text,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
    return _means(shifts, pair, kind)


@register_rule(
    "distance",
    "s(m) = mean over prompts of ‖a_source − a_target‖ / ½(‖a_source‖ + ‖a_target‖)",
    kinds=SHIFTING,
    cost=BOTH,
    sign="the output differs much, in size or direction",
    alone=ALONE,
)
def distance(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    positions: Positions = "answer",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """How far the outputs lie apart, whatever the cause (of a neuron over what its MLP writes)."""
    return _means(_shifts(pair, task, kind, ["distance"], positions, batch_size, progress), pair, kind)


@register_rule(
    "own",
    "s(m) = mean over prompts of ‖f_source(x_target) − f_target(x_target)‖ / ½(‖a_source‖ + ‖a_target‖)",
    kinds=SHIFTING,
    cost="2 forward passes of the source's modules and 1 of the target",
    sign="its own weights change its output much",
    alone=ALONE,
)
def own(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    positions: Positions = "answer",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """What the module's own weights change, with the target's input (of a neuron over what its MLP writes)."""
    return _means(_shifts(pair, task, kind, ["own"], positions, batch_size, progress), pair, kind)


@register_rule(
    "own_over_inherited",
    "s(m) = o / (o + i), o and i the means over prompts of the own and the inherited shift; 0 where both are 0",
    kinds=SHIFTING,
    cost="2 forward passes of the source's modules and 1 of the target",
    sign="its shift is its own work rather than upstream's",
)
def own_over_inherited(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    positions: Positions = "answer",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The own shift as a share of own and inherited, which ranks as their ratio does and stays finite."""
    shifts = _shifts(pair, task, kind, ["own", "inherited"], positions, batch_size, progress)
    mine, theirs = (np.asarray(_means(shifts[shifts.measure == m], pair, kind)) for m in ("own", "inherited"))
    whole = mine + theirs
    return np.divide(mine, whole, out=np.zeros_like(mine), where=whole > 0)


@register_rule(
    "significant",
    "s(m) = how many modules have a larger adjusted p, or the same and a smaller |effect| (sign-flip of the magnitude)",
    kinds=SHIFTING,
    cost=BOTH,
    sign="its size shifts in one direction on every prompt",
)
def significant(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    positions: Positions = "answer",
    correction: Literal["max-t", "max-t-step-down", "holm", "bh", "by"] = "max-t",
    permutations: int = 10_000,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The smallest adjusted p of a consistent signed shift first, then the largest effect (mean, in its units)."""
    shifts = _shifts(pair, task, kind, ["magnitude"], positions, batch_size, progress)
    table = test_shifts(shifts, correction=correction, permutations=permutations, seed=seed)
    rows = table.set_index(table.module.astype(str)).reindex(pair.modules(kind))
    order = np.lexsort((-rows.effect.abs().to_numpy(), rows.p_adjusted.to_numpy()))
    scores = np.empty(len(order))
    scores[order] = np.arange(len(order))[::-1]
    return scores


def _shifts(
    pair: Pair, task: Task, kind: Kinds, measures: list[str], positions: Positions, batch_size: int, progress: bool
) -> pd.DataFrame:
    kinds = cast("tuple[SlotKind, ...]", kinds_of(kind))
    return measure_shifts(pair, task, kinds, measures, positions, batch_size=batch_size, progress=progress)


def _means(shifts: pd.DataFrame, pair: Pair, kind: Kinds) -> Any:
    means = shifts.groupby("module", sort=False, observed=True).value.mean()
    means.index = means.index.astype(str)
    return means.reindex(pair.modules(kind)).to_numpy()
