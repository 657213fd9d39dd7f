"""Rules that try grafts: every module alone, and the best one to add, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import gold_scores
from mechtransplant.evaluation.resumed import Memory, can_resume, remembering, resuming
from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import parse_address
from mechtransplant.progress import track
from mechtransplant.ranking.gradients import GAIN
from mechtransplant.ranking.registry import CHOOSE, Kinds, Scores, register_rule
from mechtransplant.ranking.sensitivity import WeightChanges, weight_effects
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair


@register_rule(
    "single_swap",
    "s(m) = L(target with m grafted) − L(target), L the mean log-probability of the gold answer",
    needs="gold answers",
    cost="1 forward pass, and N from the module's layer on",
    sign=GAIN + ", exactly",
)
def single_swap(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    kv: KV = "never",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The exact effect of every module grafted alone."""
    with remembering(pair.target) as memory:
        base = _objective(pair, task, batch_size)
    return np.array(_tried(pair, task, pair.modules(kind), kv, batch_size, progress, memory)) - base


@register_rule(
    "greedy",
    "m₁ = argmax L(target with m), then m₂ = argmax L(target with m₁ and m), …; s = N − place",
    needs="gold answers",
    cost="N (N + 3) / 2 forward passes; with a pool of p, about K forward and backward, and K (p + 1) forward passes; "
    "most of them from a module's layer on",
    sign="chosen early",
    splits=CHOOSE,
)
def greedy(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    pool: int | None = None,
    stop: int | None = None,
    kv: KV = "never",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """Forward selection by the gold answer's log-probability, on `choose`.

    ``pool``: try only that many modules at each step, those with the largest gradient at the graft so far. ``stop``:
    after so many modules the rest follow in the order of that gradient.
    """
    modules = pair.modules(kind)
    order: list[str] = []
    left = list(modules)
    last = len(modules) if stop is None else min(stop, len(modules))
    for _ in track(range(last), "greedy", progress):
        candidates = left
        if pool is not None and pool < len(left):
            candidates = _steepest(pair, task, order, left, kv, batch_size)[:pool]
        if len(candidates) == 1:
            best = candidates[0]
        else:
            memory = Memory(usable=False)
            # the pass that is remembered costs one, and saves about half of each
            if len(candidates) > 2 and can_resume(pair.target):
                with _grafted(pair, order, kv), remembering(pair.target) as memory:
                    _objective(pair, task, batch_size)
            values = _tried(pair, task, candidates, kv, batch_size, False, memory, order)
            best = candidates[int(np.argmax(values))]
        order.append(best)
        left.remove(best)
    if left:
        order += _steepest(pair, task, order, left, kv, batch_size)
    place = {m: at for at, m in enumerate(order)}
    return [len(modules) - place[m] for m in modules]


def _steepest(
    pair: Pair, task: Task, order: Sequence[str], modules: Sequence[str], kv: KV, batch_size: int
) -> list[str]:
    """Modules by the gradient with those of ``order`` grafted, largest first."""
    with _grafted(pair, order, kv):
        effects, _ = weight_effects(WeightChanges(pair, modules, kv), task, min(batch_size, 16))
    return [modules[i] for i in np.argsort(-effects, kind="stable")]


def _objective(pair: Pair, task: Task, batch_size: int) -> float:
    return float(gold_scores(pair.target, task, batch_size)[1].mean())


def _tried(
    pair: Pair,
    task: Task,
    modules: Sequence[str],
    kv: KV,
    batch_size: int,
    progress: bool,
    memory: Memory,
    order: Sequence[str] = (),
) -> list[float]:
    """The mean log-probability with every module grafted in turn, together with those of ``order``.

    One graft of them all, since a set may move more than its members one by one (``kv="whole-group"``). A module
    changes nothing below its layer, so a pass begins there where ``memory`` has the pass without the module.
    """
    if not modules:
        raise UsageError("there is no module to try: name a kind that the models have")
    values = []
    for module in track(modules, "grafts", progress):
        with _grafted(pair, [*order, module], kv), resuming(pair.target, memory, parse_address(module).layer):
            values.append(_objective(pair, task, batch_size))
    return values


def _grafted(pair: Pair, modules: Sequence[str], kv: KV) -> AbstractContextManager[object]:
    return Graft(modules, kv=kv).applied(pair) if modules else nullcontext()
