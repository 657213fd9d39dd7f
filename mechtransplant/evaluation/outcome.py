"""What a graft did: accuracies, exact McNemar, TIR and Recovery with intervals, or the reason why they are withheld."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.evaluation.scoring import Evaluation
from mechtransplant.significance import bootstrap_indices, mcnemar_exact, percentile_interval

Interval = tuple[float, float]


#: below so many right answers of the target a ratio to them says little
FEW = 10
#: below so many questions bootstrap percentiles cannot be trusted
SMALL = 50


@dataclass(frozen=True)
class Outcome:
    """A graft's outcome on one set of questions; ``None`` stands for undefined or withheld, and ``notes`` says why.

    ``tir`` = Acc_after / Acc_target; ``recovery`` = 100 · (Acc_after − Acc_target) / (Acc_source − Acc_target), in per
    cent, not clipped; ``difference`` = Acc_after − Acc_target; ``interval`` is the difference's 95 % paired bootstrap
    interval; ``p_value`` is exact McNemar's (two-sided); ``gained`` and ``lost`` count flipped questions.
    """

    target_accuracy: float
    source_accuracy: float
    after_accuracy: float
    n: int
    difference: float
    interval: Interval
    p_value: float
    gained: int
    lost: int
    tir: float | None
    tir_interval: Interval | None
    recovery: float | None
    recovery_interval: Interval | None
    gap_interval: Interval
    notes: tuple[str, ...]
    #: the questions: the task's name, the split's role, and the fingerprint
    task: str = ""
    role: str = ""
    questions: str = ""

    def __str__(self) -> str:
        tir = "undefined" if self.tir is None else f"{self.tir:.2f}"
        recovery = "withheld" if self.recovery is None else f"{self.recovery + 0.0:.0f} %".replace("-0 %", "0 %")
        return (
            f"{self.target_accuracy:.1%} → {self.after_accuracy:.1%} (source {self.source_accuracy:.1%}, "
            f"n = {self.n}), TIR {tir}, Recovery {recovery}, McNemar p = {self.p_value:.2g}"
        )


def compare(
    target: Evaluation, source: Evaluation, after: Evaluation, resamples: int = 10_000, seed: int = 0
) -> Outcome:
    """The outcome of a graft from three evaluations of the same questions; intervals by paired bootstrap.

    TIR is undefined (None) when the target's accuracy is 0. Recovery is withheld (None) when the 95 % interval of the
    gap between source and target covers 0. Raises UsageError when the questions differ, or served to select modules.
    """
    three = (target, source, after)
    strange = [type(e).__name__ for e in three if not isinstance(e, Evaluation)]
    if strange:
        raise UsageError(f"compare needs three evaluations (see evaluate), got {strange[0]}")
    if len({e.fingerprint for e in three}) > 1:
        raise UsageError("compare needs three evaluations of the same questions, format and scorer: use one split")
    if len({e.budget for e in three}) > 1:
        budgets = ", ".join(str(e.budget) for e in three)
        raise UsageError(f"compare needs evaluations at one token budget, got {budgets}: evaluate at one")
    if target.role in ("discover", "choose"):
        raise UsageError(
            f"these questions are the {target.role!r} split, which served to select: report an effect on the test split"
        )
    n = len(target)
    stacked = np.stack([target.correct, source.correct, after.correct]).astype(float)
    base, best, grafted = (float(row.mean()) for row in stacked)
    picks = bootstrap_indices(n, resamples, seed)
    base_b, best_b, after_b = (row[picks].mean(axis=1) for row in stacked)
    notes = []

    gap_interval = percentile_interval(best_b - base_b)
    tir, tir_interval = None, None
    if base == 0:
        notes.append("TIR is undefined: the target answers none of the questions, and nothing divides by 0")
    else:
        tir = grafted / base
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = after_b / base_b
        # a resample without a single right answer has no ratio; it counts as unboundedly large
        tir_interval = percentile_interval(np.where(np.isnan(ratios), math.inf, ratios))
        if target.correct.sum() < FEW:
            notes.append(
                f"TIR rests on {int(target.correct.sum())} right answers of the target: read the difference instead"
            )
    if n < SMALL:
        notes.append(f"{n} questions are few: bootstrap intervals are too narrow, and empty where no answer differs")

    recovery, recovery_interval = None, None
    if gap_interval[0] <= 0 <= gap_interval[1]:
        notes.append(
            f"Recovery is withheld: the gap between source and target, {best - base:+.1%}, has the interval "
            f"[{gap_interval[0]:+.1%}, {gap_interval[1]:+.1%}], which covers 0"
        )
    else:
        recovery = 100 * (grafted - base) / (best - base)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = 100 * (after_b - base_b) / (best_b - base_b)
        usable = np.isfinite(shares)
        recovery_interval = percentile_interval(shares[usable])
    return Outcome(
        base,
        best,
        grafted,
        n,
        grafted - base,
        percentile_interval(after_b - base_b),
        mcnemar_exact(target.correct, after.correct),
        int(np.sum(~target.correct & after.correct)),
        int(np.sum(target.correct & ~after.correct)),
        tir,
        tir_interval,
        recovery,
        recovery_interval,
        gap_interval,
        tuple(notes),
        target.task,
        target.role,
        target.fingerprint,
    )
