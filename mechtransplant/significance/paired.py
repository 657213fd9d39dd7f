"""Score intervals of paired accuracies: a difference, a ratio, and Recovery, which is a ratio of two differences.

Three models on the same n questions sort every question into one of eight outcomes, so that the counts are one draw
from a multinomial with probabilities p. Each quantity is θ = (u·p)/(v·p) for two weightings u, v of the outcomes:

    difference  after − target                         u = after − target    v = 1
    ratio       after / target                         u = after             v = target
    Recovery    (after − target) / (source − target)   u = after − target    v = source − target

θ is the true value if and only if the contrast c = u − θv has the mean c·p = 0. The score test of that is

    T(θ) = n (c·p̂)² / Σ p̃ c²,    p̂ = counts / n,    p̃ = the likeliest p among those with c·p = 0,

and the interval holds every θ with T(θ) ≤ z². The variance is taken where θ would be true, not where the data lie, so
that it does not vanish where no answer differs. For the difference this is Tango's interval (1998, Statistics in
Medicine 17, 891–908); for the ratio that of Nam and Blackwelder (2002, Statistics in Medicine 21, 689–699) and of
Tang, Tang and Chan (2003), here with a continuity correction; for Recovery it does what Fieller's theorem (1954) does
for normal means. How often each holds the truth, beside its rivals: ``benchmarks/coverage.py``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

#: the eight outcomes of a question, one row each: is the target, the source, the grafted model right?
OUTCOMES: Floats = np.array([[k >> 2 & 1, k >> 1 & 1, k & 1] for k in range(8)], dtype=float)
TARGET, SOURCE, AFTER = OUTCOMES.T
ONE = np.ones(8)

#: θ is sought as an angle, θ = tan(angle), because an unbounded θ has a finite one: ±∞ at a quarter turn, ±1 at half
QUARTER, EIGHTH = math.pi / 2, math.pi / 4
#: at most, of either search; Newton's is over after about eight
STEPS = 60


def outcome_counts(target: Bools, source: Bools, after: Bools) -> Floats:
    """How many questions have each of the :data:`OUTCOMES`, shape (8,)."""
    three = [np.asarray(each, dtype=bool) for each in (target, source, after)]
    sizes = {each.shape for each in three}
    if len(sizes) > 1 or three[0].ndim != 1:
        shapes = ", ".join(str(each.shape) for each in three)
        raise ValueError(f"paired answers of shapes {shapes}: give one bool a question, the same questions")
    if not len(three[0]):
        raise ValueError("no questions: an interval needs at least one")
    return np.bincount(4 * three[0] + 2 * three[1] + three[2], minlength=8).astype(float)


def null_variance(counts: Floats, contrast: Floats) -> Floats:
    """Σ p̃ c² for the likeliest p̃ with Σ p̃ c = 0, for each row of ``counts`` and ``contrast`` (both (rows, 8)).

    By Lagrange p̃ = counts / (n + λc), where λ solves Σ counts · c / (n + λc) = 0, a decreasing function of λ. An
    outcome that was never seen may have a probability too: where λ would make n + λc negative for the outcome with the
    most extreme c, λ stops there, and that outcome takes what is missing from Σ p̃ = 1.
    """
    n = counts.sum(1)
    # turned so that the observed mean is positive, and λ too: it lies between 0 and n / −(the lowest c)
    contrast = np.where((counts * contrast).sum(1) < 0, -1.0, 1.0)[:, None] * contrast
    lowest = contrast.min(1)
    impossible = lowest >= 0
    highest = n / np.where(impossible, 1.0, -lowest)
    seen = counts > 0
    at, below, above = np.zeros_like(n), np.zeros_like(n), highest.copy()

    def shares(at: Floats) -> Floats:
        return np.where(seen, contrast / (n[:, None] + at[:, None] * contrast), 0.0)

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        extreme_seen = (seen & (contrast == lowest[:, None])).any(1)
        stopped = ~extreme_seen & ((counts * shares(highest)).sum(1) >= 0)
        for _ in range(STEPS):
            share = shares(at)
            value = (counts * share).sum(1)
            below, above = np.where(value > 0, at, below), np.where(value > 0, above, at)
            newton = at + value / (counts * share * share).sum(1)
            # Newton's step where it stays within the bounds, else halfway
            step = np.where((newton >= below) & (newton <= above), newton, (below + above) / 2)
            step = np.where(stopped, highest, step)
            if np.all(np.abs(step - at) <= 1e-14 * highest):
                break
            at = step
        at = np.where(stopped, highest, at)
        p = np.where(seen, counts / (n[:, None] + at[:, None] * contrast), 0.0)
    unseen = np.clip(1 - p.sum(1), 0.0, 1.0)
    variance = (p * contrast**2).sum(1) + unseen * lowest**2
    # where no c is below 0, only outcomes with c = 0 can be left
    return np.where(impossible, 0.0, variance)


def score_statistic(counts: Floats, contrast: Floats, correction: Floats | float = 0.0) -> Floats:
    """T of each row; ``correction`` is taken from |Σ counts · c| first (Yates)."""
    n = counts.sum(1)
    distance = np.maximum(np.abs((counts * contrast).sum(1)) - correction, 0.0)
    # sums of a hundred products are not exactly 0 where they should be
    distance = np.where(distance < 1e-12 * n, 0.0, distance)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0, 0.0, distance**2 / (n * null_variance(counts, contrast)))


def score_intervals(
    counts: Floats, top: Floats, bottom: Floats, span: tuple[float, float], level: float = 0.95, corrected: bool = False
) -> tuple[Floats, Floats]:
    """Both ends of the interval of (top·p)/(bottom·p) for each row of ``counts``, shape (rows, 8).

    Args:
        top, bottom: u and v, eight weights each.
        span: the possible angles arctan θ, at most (−π/2, π/2); an end at ±π/2 is an unbounded one.
        corrected: take half of the largest step that one answer can make, ½ max(1, |θ|), from the distance.
    """
    from scipy.stats import norm

    critical = float(norm.ppf((1 + level) / 2)) ** 2
    numerator, denominator = counts @ top, counts @ bottom
    # θ and the sign of both do not depend on which of the two is negative
    sign = np.where(denominator < 0, -1.0, 1.0)
    start = np.clip(np.arctan2(sign * numerator, sign * denominator), *span)
    both = np.concatenate([counts, counts])

    def accepted(angle: Floats) -> NDArray[np.bool_]:
        cos, sin = np.cos(angle), np.sin(angle)
        contrast = cos[:, None] * top - sin[:, None] * bottom
        # the sine of π/2 is exact and its cosine is 6e-17
        contrast = np.where(np.abs(contrast) < 1e-15, 0.0, contrast)
        step = np.maximum(np.abs(cos), np.abs(sin)) / 2 if corrected else 0.0
        return score_statistic(both, contrast, step) <= critical

    inside = np.concatenate([start, start])
    outside = np.repeat(np.array(span), len(counts))
    # an end of the span that is itself accepted is the interval's end
    inside = np.where(accepted(outside), outside, inside)
    for _ in range(STEPS):
        middle = (inside + outside) / 2
        good = accepted(middle)
        inside, outside = np.where(good, middle, inside), np.where(good, outside, middle)
        if np.all(np.abs(outside - inside) < 1e-14):
            break
    ends = np.tan(inside)
    for turn, value in ((QUARTER, math.inf), (EIGHTH, 1.0)):
        ends = np.where(np.abs(inside) == turn, np.copysign(value, inside), ends)
    return ends[: len(counts)], ends[len(counts) :]


def difference_intervals(counts: Floats, before: Floats, after: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Tango's intervals of after − before, for two columns of :data:`OUTCOMES`."""
    return score_intervals(counts, after - before, ONE, (-EIGHTH, EIGHTH), level)


def ratio_intervals(counts: Floats, level: float = 0.95, corrected: bool = True) -> tuple[Floats, Floats]:
    """Intervals of after / target."""
    low, high = score_intervals(counts, AFTER, TARGET, (0.0, QUARTER), level, corrected)
    # with no right answer of either, every ratio is as good
    nothing = (counts @ AFTER == 0) & (counts @ TARGET == 0)
    return np.where(nothing, 0.0, low), np.where(nothing, math.inf, high)


def recovery_intervals(counts: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Intervals of (after − target) / (source − target); (−inf, inf) where the gap's interval covers 0."""
    from scipy.stats import norm

    low, high = score_intervals(counts, AFTER - TARGET, SOURCE - TARGET, (-QUARTER, QUARTER), level)
    gap = score_statistic(counts, np.broadcast_to(SOURCE - TARGET, counts.shape))
    open_ended = gap <= float(norm.ppf((1 + level) / 2)) ** 2
    return np.where(open_ended, -math.inf, low), np.where(open_ended, math.inf, high)


def paired_difference_interval(before: Bools, after: Bools, level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of accuracy(after) − accuracy(before) on the same questions; never empty.

    Every δ with n (δ̂ − δ)² ≤ z² (p̃₁₀ + p̃₀₁ − δ²), where δ̂ = (gained − lost)/n and p̃ is the likeliest table with
    p₁₀ − p₀₁ = δ (Tango 1998). With no answer that differs it is ± z²/(n + z²).

    Args:
        before, after: one bool a question, same order. Raises ValueError for different lengths or no questions.
        level: of confidence.
    """
    low, high = difference_intervals(outcome_counts(before, before, after)[None], TARGET, AFTER, level)
    return float(low[0]), float(high[0])


def accuracy_ratio_interval(target: Bools, after: Bools, level: float = 0.95) -> tuple[float, float]:
    """Score interval of accuracy(after) / accuracy(target) on the same questions, with a continuity correction.

    Every φ with (|Σ (after − φ target)| − ½ max(1, φ))² ≤ z² n Σ p̃ (after − φ target)², where p̃ is the likeliest
    table with that ratio (Nam and Blackwelder 2002; the correction: Yates 1934). Without the correction it is too
    narrow where the target has a handful of right answers. The upper end is inf when it has none, and the lower end 0
    when the grafted model has none; exchanging the two inverts the interval.

    Args:
        target, after: one bool a question, same order. Raises ValueError for different lengths or no questions.
        level: of confidence.
    """
    low, high = ratio_intervals(outcome_counts(target, target, after)[None], level)
    return float(low[0]), float(high[0])


def recovery_interval(target: Bools, source: Bools, after: Bools, level: float = 0.95) -> tuple[float, float]:
    """Score interval of Recovery = 100 (after − target) / (source − target), in per cent, by the Fieller argument.

    Every R with n (c·p̂)² ≤ z² Σ p̃ c² for c = (after − target) − R (source − target) (see the module). It is
    (−inf, inf) exactly when :func:`paired_difference_interval` of target and source covers 0, and bounded otherwise,
    because R → ±∞ is the test that the gap is 0.

    Args:
        target, source, after: one bool a question, same order. Raises ValueError for different lengths or no questions.
        level: of confidence, of this interval and of the gap's.
    """
    low, high = recovery_intervals(outcome_counts(target, source, after)[None], level)
    return 100 * float(low[0]), 100 * float(high[0])
