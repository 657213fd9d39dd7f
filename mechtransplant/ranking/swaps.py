"""Rules that try grafts: every module alone, and the best one to add, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import check_count
from mechtransplant.evaluation.sweeps import Change, sweep
from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import parse_address
from mechtransplant.progress import track
from mechtransplant.ranking.gradients import GAIN
from mechtransplant.ranking.registry import CHOOSE, Kinds, Scores, register_rule
from mechtransplant.ranking.screening import confirmed
from mechtransplant.ranking.sensitivity import WeightChanges, weight_effects
from mechtransplant.ranking.steps import kept, layer_by_layer
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair


@register_rule(
    "single_swap",
    "s(m) = L(target with m grafted) − L(target), L the mean log-probability of the gold answer",
    needs="gold answers",
    cost="1 forward pass for every 64 modules, and N from the module's layer on",
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
    return _gains(pair, task, pair.modules(kind), kv, batch_size, progress)


@register_rule(
    "screened_swap",
    "s(m) = L(target with m grafted) − L(target) for the `confirm` highest, ⟨∂L/∂W_m, W_source − W_target⟩ below them",
    needs="gradients",
    cost="1 forward and 1 backward pass, then `confirm` or more passes from the modules' layers on",
    sign=GAIN + ", exactly for the `confirm` highest",
)
def screened_swap(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    confirm: int = 32,
    kv: KV = "never",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """All modules by `gradient`, and the highest of them again by `single_swap`, until the highest are all exact."""
    check_count("confirm", confirm)
    modules = pair.modules(kind)
    scores = kept(
        {"gradient of": modules},
        lambda: weight_effects(WeightChanges(pair, modules, kv), task, batch_size, progress)[0],
    )
    return confirmed(modules, scores, confirm, lambda names: _gains(pair, task, names, kv, batch_size, progress))


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
        best = candidates[0]
        if len(candidates) > 1:
            best = candidates[int(np.argmax(_gains(pair, task, candidates, kv, batch_size, False, order)))]
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

    def now() -> NDArray[np.float64]:
        with _grafted(pair, order, kv):
            return weight_effects(WeightChanges(pair, modules, kv), task, min(batch_size, 16))[0]

    effects = kept({"gradient of": list(modules), "beside": list(order)}, now)
    return [modules[i] for i in np.argsort(-effects, kind="stable")]


def _gains(
    pair: Pair,
    task: Task,
    modules: Sequence[str],
    kv: KV,
    batch_size: int,
    progress: bool,
    order: Sequence[str] = (),
) -> NDArray[np.float64]:
    """What every module, grafted in turn, adds to the mean log-probability with those of ``order`` in place."""

    def now(names: Sequence[str]) -> NDArray[np.float64]:
        with _grafted(pair, order, kv):
            changes = []
            for module in names:
                layer = parse_address(module).layer
                # a set may move more than its members one by one (kv="whole-group"), all of it in their layer
                beside = [m for m in order if parse_address(m).layer == layer]
                changes.append(Change(layer, Graft([*beside, module], kv=kv).applied(pair)))
            before, after = sweep(pair.target, task, changes, batch_size, progress=progress, what="grafts")
        return np.asarray(after.log_probability.mean(1) - before.log_probability.mean())

    return layer_by_layer(modules, {"beside": list(order)}, now)


def _grafted(pair: Pair, modules: Sequence[str], kv: KV) -> AbstractContextManager[object]:
    return Graft(modules, kv=kv).applied(pair) if modules else nullcontext()
