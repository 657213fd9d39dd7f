"""Rules that try patches: what moving every module's activations alone does, for all modules or the highest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from mechtransplant.errors import check_count
from mechtransplant.patching.patch import HeadPoint
from mechtransplant.patching.sweeps import patch_effects
from mechtransplant.ranking.registry import Kinds, Scores, kinds_of, register_rule
from mechtransplant.ranking.screening import confirmed
from mechtransplant.ranking.sensitivity import activation_effects
from mechtransplant.ranking.steps import Floats, kept, layer_by_layer
from mechtransplant.shifts.recorder import SlotKind
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair

GAIN = "patching its activations at all positions alone raises the gold answer's log-probability (nats)"
#: patches of single linear layers are not made
KINDS = ("head", "neuron", "mlp", "attn")


@register_rule(
    "single_patch",
    "s(m) = L(target with a_m of the source) − L(target), L the mean log-probability of the gold answer",
    needs="gold answers",
    kinds=KINDS,
    cost="2 forward passes for every 64 modules, and N from the module's layer on",
    sign=GAIN + ", exactly",
)
def single_patch(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    heads: HeadPoint = "result",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The exact effect of every module's activations patched alone, at all positions (activation patching)."""
    return _gains(pair, task, pair.modules(kind), heads, batch_size, progress)


@register_rule(
    "screened_patch",
    "s(m) = L(target with a_m of the source) − L(target) for the `confirm` highest, Σ ⟨∂L/∂a_m, a_source − a_target⟩ "
    "below them",
    needs="gradients",
    kinds=KINDS,
    cost="2 forward passes and 1 backward pass; then, once or more, 2 forward passes and `confirm` from the modules' "
    "layers on",
    sign=GAIN + ", exactly for the `confirm` highest",
)
def screened_patch(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    confirm: int = 32,
    heads: HeadPoint = "result",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """All by `activation_gradient`, and the highest again by `single_patch`, until the highest are all exact."""
    check_count("confirm", confirm)
    modules = pair.modules(kind)
    slots = cast("tuple[SlotKind, ...]", kinds_of(kind))
    scores = kept(
        {"activation gradient of": modules},
        lambda: activation_effects(pair, task, slots, heads, batch_size, progress),
    )
    return confirmed(modules, scores, confirm, lambda names: _gains(pair, task, names, heads, batch_size, progress))


def _gains(pair: Pair, task: Task, modules: Sequence[str], heads: HeadPoint, batch_size: int, progress: bool) -> Floats:
    """What every module, patched in turn, adds to the mean log-probability."""

    def now(names: Sequence[str]) -> Floats:
        before, after = patch_effects(pair, task, names, heads=heads, batch_size=batch_size, progress=progress)
        return np.asarray(after.log_probability.mean(1) - before.log_probability.mean())

    return layer_by_layer(modules, {"patched": heads}, now)
