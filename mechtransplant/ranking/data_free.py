"""Rules that look at no prompt: how far weights moved, how deep a module lies, and nothing at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import parse_address
from mechtransplant.ranking.registry import Kinds, Scores, register_rule
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair


@register_rule(
    "weight_delta",
    "s(m) = ‖W_source − W_target‖ (Frobenius; over ‖W_target‖ with relative=True)",
    needs="nothing",
    cost="none",
    sign="the weights moved far",
)
def weight_delta(
    pair: Pair, task: Task | None, kind: Kinds, *, relative: bool = False, kv: KV = "never", seed: int = 0
) -> Scores:
    """How far the weights moved; needs no data."""
    theirs, ours = pair.source_parameters, pair.target_parameters
    scores = []
    for module in pair.modules(kind):
        regions = Graft([module], kv=kv).regions(pair)
        moved = 0.0
        for region in regions:
            mine = region.of(ours[region.parameter])
            # of models in memory one at a time the source's are on the CPU
            moved += float((region.of(theirs[region.parameter]).to(mine.device).float() - mine.float()).square().sum())
        size = sum(float(r.of(ours[r.parameter]).float().square().sum()) for r in regions) if relative else 1.0
        scores.append(float(np.sqrt(moved / size)) if size else 0.0)
    return scores


@register_rule(
    "weight_delta_relative",
    "s(m) = ‖W_source − W_target‖ / ‖W_target‖ (Frobenius)",
    needs="nothing",
    cost="none",
    sign="the weights moved far for their size",
)
def weight_delta_relative(pair: Pair, task: Task | None, kind: Kinds, *, kv: KV = "never", seed: int = 0) -> Scores:
    """The same relative to the weights, so that a large module has no lead over a small one."""
    return weight_delta(pair, task, kind, relative=True, kv=kv)


@register_rule("random", "s(m) uniform on [0, 1)", needs="nothing", cost="none", sign="nothing")
def random(pair: Pair, task: Task | None, kind: Kinds, *, seed: int = 0) -> Scores:
    """No information: what any other rule must beat."""
    return np.random.default_rng(seed).random(len(pair.modules(kind)))


@register_rule("depth", "s(m) = ± layer of m", needs="nothing", cost="none", sign="late (or early, with first='early')")
def depth(
    pair: Pair, task: Task | None, kind: Kinds, *, first: Literal["late", "early"] = "late", seed: int = 0
) -> Scores:
    """Where a module lies, whatever it does: the last layers first, or the first ones."""
    layers = np.array([parse_address(m).layer for m in pair.modules(kind)], dtype=float)
    return layers if first == "late" else -layers
