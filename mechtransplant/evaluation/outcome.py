"""What a graft did: accuracies, exact McNemar, TIR and Recovery with intervals, or the reason why they are withheld.

Intervals of accuracies and of their differences and ratios invert score tests (see ``significance.paired``); those of
the continuous outcomes are paired bootstrap percentiles over questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechtransplant.display import html_table, percent
from mechtransplant.errors import UsageError
from mechtransplant.evaluation.scoring import Evaluation
from mechtransplant.selection import Selection
from mechtransplant.significance import (
    SAME_NATS,
    CurveRank,
    RankAmong,
    accuracy_ratio_interval,
    bootstrap_indices,
    mcnemar_exact,
    paired_difference_interval,
    percentile_interval,
    rank_among,
    recovery_interval,
)

Interval = tuple[float, float]

#: below so many right answers of the target a ratio to them says little
FEW = 10
#: below so many questions an interval is wide whatever the method, and the continuous outcomes' are too narrow
SMALL = 50
#: the note of an outcome without random sets
UNCONTROLLED = "no random sets were compared: the graft may do no better than chance"


@dataclass(frozen=True)
class Change:
    """The mean change of a continuous outcome, after − target, with its 95 % paired bootstrap interval."""

    target: float
    source: float
    after: float
    change: float
    interval: Interval


@dataclass(frozen=True)
class Truncation:
    """Within the token budget: the share of questions answered, of texts that ended, of answered ones that are right.

    ``right_given_answered`` is None where nothing was answered.
    """

    answered: float
    ended: float
    right_given_answered: float | None


@dataclass(frozen=True)
class Outcome:
    """A graft's outcome on one set of questions; ``None`` stands for undefined or withheld, and ``notes`` says why.

    ``tir`` = Acc_after / Acc_target; ``recovery`` = 100 · (Acc_after − Acc_target) / (Acc_source − Acc_target), in per
    cent, not clipped; ``difference`` = Acc_after − Acc_target with its 95 % ``interval``; ``p_value`` is exact
    McNemar's (two-sided); ``gained`` and ``lost`` count flipped questions. ``log_probability`` (nats) and
    ``logit_difference`` are the gold answer's; ``truncation`` maps role to its split at this budget (generated answers
    only). ``controls`` and ``log_probability_controls`` say where the graft stands among random sets, ``curve`` where
    its K-curve does; ``parameter_share`` is its share of the numbers in linear layers.
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
    log_probability: Change | None = None
    logit_difference: Change | None = None
    truncation: dict[str, Truncation] | None = None
    controls: RankAmong | None = None
    log_probability_controls: RankAmong | None = None
    curve: CurveRank | None = None
    parameter_share: float | None = None

    def _repr_html_(self) -> str:
        change = f"{100 * self.difference:+.1f} points [{100 * self.interval[0]:+.1f}, {100 * self.interval[1]:+.1f}]"
        rows: list[tuple[str, str]] = [
            ("target", percent(self.target_accuracy)),
            ("after the graft", percent(self.after_accuracy)),
            ("source", percent(self.source_accuracy)),
            ("difference", f"{change}; exact McNemar p = {self.p_value:.2g}; {self.gained} gained, {self.lost} lost"),
            ("TIR", _ratio(self.tir, self.tir_interval, "undefined", ".2f", "")),
            ("Recovery", _ratio(self.recovery, self.recovery_interval, "withheld", ".0f", " %")),
        ]
        if self.log_probability is not None:
            nats, (low, high) = self.log_probability.change, self.log_probability.interval
            rows.append(("log p(gold answer)", f"{nats:+.2f} nats [{low:+.2f}, {high:+.2f}]"))
        rows.append(("random sets", "no random control" if self.controls is None else str(self.controls)))
        if self.curve is not None:
            rows.append(("K-curve", f"p = {self.curve.p_value:.2g} over all K, among {self.curve.n} random orders"))
        title = f"{self.task} ({self.role}), n = {self.n}, 95 % intervals" if self.task else f"n = {self.n}"
        return html_table(rows, title=title, notes=self.notes)

    def __str__(self) -> str:
        tir = "undefined (the target has none right)" if self.tir is None else f"{self.tir:.2f}"
        recovery = (
            "withheld (the gap's interval covers 0)"
            if self.recovery is None
            else f"{self.recovery + 0.0:.0f} %".replace("-0 %", "0 %")
        )
        controls = "no random control" if self.controls is None else f"{self.controls} among random sets"
        return (
            f"{self.target_accuracy:.1%} → {self.after_accuracy:.1%} (source {self.source_accuracy:.1%}, "
            f"n = {self.n}), TIR {tir}, Recovery {recovery}, McNemar p = {self.p_value:.2g}; {controls}"
        )


def _ratio(value: float | None, interval: Interval | None, without: str, form: str, unit: str) -> str:
    """A ratio with its interval, an unbounded end as ∞; a word where it has no value."""
    if value is None:
        return without
    # nothing is 0, and not −0
    said = f"{round(value, 2) + 0.0:{form}}{unit}".replace("-0 %", "0 %")
    if interval is None:
        return said
    low, high = (f"{end + 0.0:{form}}".replace("inf", "∞") for end in interval)
    return f"{said} [{low}, {high}]"


def compare(
    target: Evaluation,
    source: Evaluation,
    after: Evaluation,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    controls: Sequence[Evaluation] = (),
    curve: CurveRank | None = None,
    graft: Any = None,
    pair: Any = None,
) -> Outcome:
    """The outcome of a graft from three evaluations of the same questions.

    TIR is undefined (None) when the target's accuracy is 0. Recovery is withheld (None) when the 95 % interval of the
    gap between source and target covers 0.

    Args:
        controls: evaluations of random matched sets (see ``controls.random_matched``), for the graft's rank and p.
        curve: where the whole K-curve stands (see ``significance.curve_rank``).
        graft: what was grafted, for its share of the parameters.
        pair: where it was grafted, for the same.

    Raises:
        UsageError: the questions differ, or served to select the modules, whatever split they are called.
    """
    check_comparable([target, source, after, *controls])
    for evaluation in (target, source, after):
        check_unseen(evaluation)
    n = len(target)
    base, best, grafted = target.accuracy, source.accuracy, after.accuracy
    notes = []

    gap_interval = paired_difference_interval(target.correct, source.correct)
    tir, tir_interval = None, None
    if base == 0:
        notes.append("TIR is undefined: the target answers none of the questions, and nothing divides by 0")
    else:
        tir = grafted / base
        tir_interval = accuracy_ratio_interval(target.correct, after.correct)
        if target.correct.sum() < FEW:
            notes.append(
                f"TIR rests on {int(target.correct.sum())} right answers of the target: read the difference instead"
            )
    if n < SMALL:
        notes.append(f"{n} questions are few: intervals are wide, and those of log-probabilities too narrow")
    recovery, shares = None, None
    if gap_interval[0] <= 0 <= gap_interval[1]:
        notes.append(
            f"Recovery is withheld: the gap between source and target, {best - base:+.1%}, has the interval "
            f"[{gap_interval[0]:+.1%}, {gap_interval[1]:+.1%}], which covers 0"
        )
    else:
        recovery = 100 * (grafted - base) / (best - base)
        shares = recovery_interval(target.correct, source.correct, after.correct)
    tried = max((len(s.tried.get(after.fingerprint, ())) for s in after.selections), default=0)
    if tried > 1:
        notes.append(
            f"{tried} grafts of this ranking were evaluated on these questions: if the best of them was picked, its "
            "numbers are too good, and p does not count the picking"
        )
    named = {"target": target, "source": source, "graft": after}
    for role, e in named.items():
        if e.log_probability is not None and not np.isfinite(e.log_probability).all():
            notes.append(f"the {role} overflows: the gold answer has no log-probability")
    if not controls:
        notes.append(UNCONTROLLED)
    return Outcome(
        base,
        best,
        grafted,
        n,
        grafted - base,
        paired_difference_interval(target.correct, after.correct),
        mcnemar_exact(target.correct, after.correct),
        int(np.sum(~target.correct & after.correct)),
        int(np.sum(target.correct & ~after.correct)),
        tir,
        tir_interval,
        recovery,
        shares,
        gap_interval,
        tuple(notes),
        target.task,
        target.role,
        target.fingerprint,
        _change(target, source, after, "log_probability", resamples, seed),
        _change(target, source, after, "logit_difference", resamples, seed),
        _truncation({"target": target, "source": source, "after": after}),
        rank_among(grafted, [c.accuracy for c in controls]) if controls else None,
        _mean_rank(after, controls),
        curve,
        _share(graft, pair),
    )


def check_comparable(evaluations: Sequence[Any]) -> None:
    """Raise UsageError unless all are evaluations of the same questions at one token budget."""
    strange = [type(e).__name__ for e in evaluations if not isinstance(e, Evaluation)]
    if strange:
        raise UsageError(f"compare needs three evaluations (see evaluate), got {strange[0]}")
    if len({e.fingerprint for e in evaluations}) > 1:
        raise UsageError("compare needs three evaluations of the same questions, format and scorer: use one split")
    if len({e.budget for e in evaluations}) > 1:
        budgets = ", ".join(str(b) for b in dict.fromkeys(e.budget for e in evaluations))
        raise UsageError(f"compare needs evaluations at one token budget, got {budgets}: evaluate at one")


def check_unseen(evaluation: Evaluation) -> None:
    """Raise UsageError where an evaluation's questions selected what it is about."""
    check_questions(evaluation.task, evaluation.role, evaluation.questions, evaluation.selections)


def check_questions(task: str, role: str, questions: Sequence[str], selections: Sequence[Selection]) -> None:
    """The same for questions by their keys, before anything is evaluated."""
    if role in ("discover", "choose"):
        raise UsageError(
            f"these questions are the {role!r} split, which served to select: report an effect on the test split"
        )
    seen = set(questions) & {q for s in selections for q in s.questions}
    if seen:
        raise UsageError(
            f"{len(seen)} of these {len(questions)} questions of {task!r} selected the modules (another "
            "split of the same task, or the same one under another name): report on the test split of the split whose "
            "discover and choose questions selected"
        )


def _change(
    target: Evaluation, source: Evaluation, after: Evaluation, what: str, resamples: int, seed: int
) -> Change | None:
    values = [getattr(e, what) for e in (target, source, after)]
    if any(v is None or not np.isfinite(v).all() for v in values):
        return None
    base, best, grafted = values
    gain = grafted - base
    interval = percentile_interval(gain[bootstrap_indices(len(gain), resamples, seed)].mean(1))
    return Change(float(base.mean()), float(best.mean()), float(grafted.mean()), float(gain.mean()), interval)


def truncation_of(evaluation: Evaluation) -> Truncation | None:
    """How the token budget cut an evaluation's answers; None where no text was written."""
    if evaluation.answered is None or evaluation.ended is None:
        return None
    answered = evaluation.answered
    right = float(evaluation.correct[answered].mean()) if answered.any() else None
    return Truncation(float(answered.mean()), float(evaluation.ended.mean()), right)


def _truncation(evaluations: dict[str, Evaluation]) -> dict[str, Truncation] | None:
    found = {role: truncation_of(e) for role, e in evaluations.items()}
    return {role: t for role, t in found.items() if t is not None} or None


def _mean_rank(after: Evaluation, controls: Sequence[Evaluation]) -> RankAmong | None:
    others = [c.log_probability for c in controls if c.log_probability is not None]
    if after.log_probability is None or not others or len(others) < len(controls):
        return None
    means = [float(o.mean()) for o in (after.log_probability, *others)]
    # a graft that overflows has no log-probability, and no rank by it
    return rank_among(means[0], means[1:], SAME_NATS) if np.isfinite(means).all() else None


def _share(graft: Any, pair: Any) -> float | None:
    """The graft's share of the numbers in the linear layers (all of what could be grafted)."""
    if graft is None or pair is None:
        return None
    plain = getattr(graft, "graft", graft)
    return float(plain.parameter_count(pair) / type(plain)(pair.modules("linear")).parameter_count(pair))
