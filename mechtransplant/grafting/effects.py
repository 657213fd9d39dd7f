"""The effect of every graft alone, without repeating what grafts have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation.gold import GoldOutcomes
from mechtransplant.evaluation.sweeps import Change, sweep
from mechtransplant.grafting.graft import KV, Graft
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair


def graft_effects(
    pair: Pair,
    task: Task,
    modules: Sequence[str],
    *,
    strength: float = 1.0,
    kv: KV = "never",
    operator: str | Mapping[str, Any] = "replace",
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[GoldOutcomes, GoldOutcomes]:
    """The gold answer's outcomes in the target as it is, and with each module's weights grafted alone.

    The target reads every batch once; each graft's pass begins at its layer, and grafts of one layer go together where
    that is faster (see ``evaluation.sweeps``). Questions that are to report an effect must not have been asked here.

    Args:
        modules: addresses of heads, neurons, MLPs, attention blocks, linear layers or blocks.
        strength, kv, operator: as :class:`Graft` has them.

    Returns:
        (outcomes of shape (questions,), outcomes of shape (modules, questions)): whether the answer is right, its
        log-probability in nats, and its logit difference.

    Raises:
        UsageError: no modules, or one that lies in no layer. UnknownNameError: an address that the pair does not have.
    """
    if isinstance(modules, str) or not len(modules):
        raise UsageError('name the modules in a list, for example ["L2.mlp", "L3H1"], or pair.modules("head")')
    addresses = [pair.layout.check(str(m)) for m in modules]
    outside = [str(m) for m, address in zip(modules, addresses, strict=True) if address.layer < 0]
    if outside:
        raise UsageError(f"{outside[0]} lies in no layer: evaluate the target inside Graft([…]).applied(pair) instead")
    changes = [
        Change(address.layer, Graft([str(m)], strength, kv=kv, operator=operator).applied(pair))
        for m, address in zip(modules, addresses, strict=True)
    ]
    return sweep(pair.target, task, changes, batch_size, progress=progress, what="grafts")
