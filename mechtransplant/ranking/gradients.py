"""Rules from gradients of the gold answer's log-probability: two or three passes for all modules at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from mechtransplant.grafting import KV, Graft
from mechtransplant.patching.patch import HeadPoint
from mechtransplant.ranking.registry import Kinds, Scores, kinds_of, register_rule
from mechtransplant.ranking.sensitivity import WeightChanges, activation_effects, weight_effects
from mechtransplant.shifts.recorder import SlotKind
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair

GAIN = "grafting it alone raises the gold answer's log-probability (nats)"


@register_rule(
    "gradient",
    "s(m) = ⟨∂L/∂W_m at the target, W_source − W_target⟩, L the mean log-probability of the gold answer",
    needs="gradients",
    cost="1 forward and 1 backward pass",
    sign=GAIN + ", to first order",
)
def gradient(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    kv: KV = "never",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The first-order effect of every graft, at the target."""
    changes = WeightChanges(pair, pair.modules(kind), kv)
    return weight_effects(changes, task, batch_size, progress)[0]


@register_rule(
    "integrated_gradient",
    "s(m) = ⟨mean over α of ∂L/∂W_m at W_target + α (W_source − W_target), W_source − W_target⟩, α = (i − ½) / steps",
    needs="gradients",
    cost="`steps` forward and backward passes",
    sign="its share (nats) of what grafting all modules gains, to which those that share no weights sum",
)
def integrated_gradient(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    steps: int = 8,
    kv: KV = "never",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The same along the straight path from the target to all modules grafted (integrated gradients)."""
    modules = pair.modules(kind)
    changes = WeightChanges(pair, modules, kv).keep()
    total = np.zeros(len(modules))
    for step in range(steps):
        with Graft(modules, (step + 0.5) / steps, kv=kv).applied(pair):
            total += weight_effects(changes, task, batch_size, progress)[0]
    return total / steps


@register_rule(
    "activation_gradient",
    "s(m) = Σ over positions of ⟨∂L/∂a_m at the target, a_source − a_target⟩ (attribution patching)",
    needs="gradients",
    kinds=("linear", "head", "neuron", "mlp", "attn"),
    cost="2 forward passes and 1 backward pass",
    sign="patching its activations alone raises the gold answer's log-probability (nats), to first order",
)
def activation_gradient(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    heads: HeadPoint = "result",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The first-order effect of every activation patch; inherited shifts count, unlike in `gradient`."""
    kinds = cast("tuple[SlotKind, ...]", kinds_of(kind))
    return activation_effects(pair, task, kinds, heads, batch_size, progress)
