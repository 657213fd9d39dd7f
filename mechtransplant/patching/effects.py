"""What carries the signal and what computes it: for every module, moving its activations beside moving its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import gold_scores
from mechtransplant.grafting import KV, graft_effects
from mechtransplant.modules import module_frame
from mechtransplant.patching.passes import Where
from mechtransplant.patching.patch import HeadPoint
from mechtransplant.patching.sites import modules_of
from mechtransplant.patching.sweeps import patch_effects
from mechtransplant.selection import remembering
from mechtransplant.significance import bootstrap_indices, percentile_interval
from mechtransplant.significance.effects import FEWEST
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import Pair


def patch_versus_graft(
    pair: Pair,
    task: Task,
    modules: Sequence[str] | None = None,
    *,
    positions: Where = "all",
    heads: HeadPoint = "result",
    kv: KV = "never",
    batch_size: int = 64,
    resamples: int = 10_000,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """For every module the effect of patching its activations and of grafting its weights, each alone.

    An effect is the mean over prompts of log p(gold answer | module moved) − log p(gold answer | target), in nats. A
    module that carries the signal has a large patch effect; one that computes it has a large graft effect, since its
    own weights turn the target's input into the source's output.

    Args:
        modules: heads and MLPs (all of them by default).
        positions: where patches act (see :class:`Patch`); a graft acts everywhere.
        heads: what a patch moves of a head (see :class:`Patch`).
        kv: what becomes of K and V under the graft of a head (see :class:`Graft`).

    Returns:
        one row a module: module, kind, layer, head, n, and for "patch" and "graft" each ``…_effect``, ``…_low``,
        ``…_high`` (95 % bootstrap interval over prompts; NaN below five of them) and ``…_accuracy`` (share answered
        rightly). ``attrs`` holds the log-probabilities and accuracies of "target" and "source".
    """
    if modules is None:
        modules = [*pair.modules("head"), *pair.modules("mlp")]
    names = [modules] if isinstance(modules, str) else [str(m) for m in modules]
    if not names:
        raise UsageError("no modules were named: leave modules out for all heads and MLPs")
    places = modules_of(pair.layout, names)
    if [m.address for m in places] != names or any(m.site.place not in ("z", "post", "mlp", "attn") for m in places):
        raise UsageError("patch_versus_graft compares heads, neurons, MLPs and attention blocks, each named once")
    best = gold_scores(pair.source, task, batch_size)
    plain, patched = patch_effects(pair, task, names, positions, heads=heads, batch_size=batch_size, progress=progress)
    base, grafted = graft_effects(pair, task, names, kv=kv, batch_size=batch_size, progress=progress)
    picks = bootstrap_indices(len(task), resamples, seed)
    rows = []
    for at in range(len(names)):
        row: dict[str, float] = {}
        for what, after, before in (("patch", patched, plain), ("graft", grafted, base)):
            gain = after.log_probability[at] - before.log_probability
            # of one prompt it would have no width
            low, high = percentile_interval(gain[picks].mean(1)) if len(task) >= FEWEST else (np.nan, np.nan)
            row |= {f"{what}_effect": gain.mean(), f"{what}_low": low, f"{what}_high": high}
            row[f"{what}_accuracy"] = after.correct[at].mean()
        rows.append(row)
    import pandas as pd

    frame = pd.concat([module_frame(names).assign(n=len(task)), pd.DataFrame(rows)], axis=1)
    for role, (correct, log_probability) in (("target", base[:2]), ("source", best)):
        frame.attrs[role] = {"accuracy": float(correct.mean()), "log_probability": float(log_probability.mean())}
    frame["module"] = remembering(frame.module, task.keys)
    return frame
