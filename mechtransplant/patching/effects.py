"""What carries the signal and what computes it: for every module, moving its activations beside moving its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import gold_scores
from mechtransplant.evaluation.batches import encode, length_sorted
from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import module_frame
from mechtransplant.patching.applied import AppliedPatch
from mechtransplant.patching.lockstep import Lockstep
from mechtransplant.patching.passes import Pass, Where
from mechtransplant.patching.patch import Copying, HeadPoint, Patch
from mechtransplant.patching.sites import Site, modules_of
from mechtransplant.progress import track
from mechtransplant.selection import remembering
from mechtransplant.significance import bootstrap_indices, percentile_interval
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from mechtransplant.pair import LanguageModel, Pair


def patch_versus_graft(
    pair: Pair,
    task: Task,
    modules: Sequence[str] | None = None,
    *,
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
        heads: what a patch moves of a head (see :class:`Patch`).
        kv: what becomes of K and V under the graft of a head (see :class:`Graft`).

    Returns:
        one row a module: module, kind, layer, head, n, and for "patch" and "graft" each ``…_effect``, ``…_low``,
        ``…_high`` (95 % bootstrap interval over prompts) and ``…_accuracy`` (share answered rightly). ``attrs`` holds
        the log-probabilities and accuracies of "target" and "source".
    """
    if modules is None:
        modules = [*pair.modules("head"), *pair.modules("mlp")]
    names = [modules] if isinstance(modules, str) else [str(m) for m in modules]
    if not names:
        raise UsageError("no modules were named: leave modules out for all heads and MLPs")
    places = modules_of(pair.layout, names)
    if [m.address for m in places] != names or any(m.site.place not in ("z", "mlp", "attn") for m in places):
        raise UsageError("patch_versus_graft compares heads, MLPs and attention blocks, each named once")
    base, best = (gold_scores(model, task, batch_size) for model in (pair.target, pair.source))
    # patches read no shared prefix apart: neither does what they are compared with
    plain = gold_scores(pair.target, task, batch_size, share_prefix=False)
    patched = _patched(pair, task, names, heads, batch_size, progress)
    picks = bootstrap_indices(len(task), resamples, seed)
    rows = []
    for at, name in enumerate(track(names, "grafts", progress)):
        with Graft([name], kv=kv).applied(pair):
            grafted = gold_scores(pair.target, task, batch_size)
        row: dict[str, float] = {}
        for what, (correct, log_probability), before in (("patch", patched[at], plain), ("graft", grafted, base)):
            gain = log_probability - before[1]
            low, high = percentile_interval(gain[picks].mean(1))
            row |= {f"{what}_effect": gain.mean(), f"{what}_low": low, f"{what}_high": high}
            row[f"{what}_accuracy"] = correct.mean()
        rows.append(row)
    import pandas as pd

    frame = pd.concat([module_frame(names).assign(n=len(task)), pd.DataFrame(rows)], axis=1)
    for role, (correct, log_probability) in (("target", base), ("source", best)):
        frame.attrs[role] = {"accuracy": float(correct.mean()), "log_probability": float(log_probability.mean())}
    frame["module"] = remembering(frame.module, task.keys)
    return frame


Scores = tuple[NDArray[np.bool_], NDArray[np.float64]]


def _patched(
    pair: Pair, task: Task, names: list[str], heads: HeadPoint, batch_size: int, progress: bool
) -> list[Scores]:
    """Scores with every module patched alone, in the order of the names; the source reads each batch once."""
    encoded = encode(task, pair.target.tokenizer)
    lengths = [len(p) + len(c) for p, c in zip(encoded.prompts, encoded.completions, strict=True)]
    found = [(np.zeros(len(task), dtype=bool), np.zeros(len(task))) for _ in names]
    sweep = _OneByOne(pair, names, heads)
    with AppliedPatch(sweep, pair.target, pair.source, sweep.watched, remember=True):
        for rows in track(list(length_sorted(lengths, batch_size)), "patches", progress):
            part = task.subset(rows)
            for at, name in enumerate(names):
                sweep.active = sweep.each[name]
                correct, log_probability = gold_scores(pair.target, part, len(rows))
                found[at][0][rows], found[at][1][rows] = correct, log_probability
    return found


class _OneByOne:
    """Patches of single modules behind one set of hooks; ``active`` is the one that acts."""

    positions: Where = "all"

    def __init__(self, pair: Pair, names: list[str], heads: HeadPoint) -> None:
        self.each = {name: Copying(Patch([name], heads=heads), pair, modules_of(pair.layout, [name])) for name in names}
        self.watched = list(dict.fromkeys(m.site for m in modules_of(pair.layout, names)))
        self.active: Copying | None = None
        self.heads_changed = frozenset(h for one in self.each.values() for h in one.heads_changed)
        self.heads_exchanged = frozenset(h for one in self.each.values() for h in one.heads_exchanged)

    def sites(self, model: LanguageModel) -> list[Site]:
        return list(dict.fromkeys(site for one in self.each.values() for site in one.sites(model)))

    def new(self, site: Site, tensor: Tensor, now: Pass, source: Lockstep | None) -> Tensor:
        if self.active is None or site not in self.active.sites():
            return tensor
        return self.active.new(site, tensor, now, source)
