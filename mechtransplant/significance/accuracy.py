"""Tests and intervals for paired accuracies (numpy and scipy only)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) when ``n`` is 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(before: Bools, after: Bools) -> float:
    """Two-sided exact McNemar p-value for two models on the same questions: a binomial test of the flips at 1/2.

    Args:
        before, after: one bool a question, same order. Raises ValueError for different lengths.
    """
    from scipy.stats import binomtest

    if len(before) != len(after):
        raise ValueError(f"paired test on {len(before)} and {len(after)} questions: give the same questions")
    gained = int(np.sum(~before & after))
    lost = int(np.sum(before & ~after))
    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)


def mcnemar_power(n: int, gained: float, lost: float, alpha: float = 0.05) -> float:
    """The probability that :func:`mcnemar_exact` finds a change (p ≤ alpha), computed exactly.

    Args:
        n: questions.
        gained, lost: the probabilities that a question is gained (wrong before, right after) or lost; the difference of
            the two accuracies is ``gained − lost``.

    The flips are binomial of ``n`` and ``gained + lost``; of D flips the test needs so many on one side as a fair coin
    would have with probability at most alpha / 2. Raises ValueError for what are no such probabilities.
    """
    from scipy.stats import binom

    flips = gained + lost
    if n < 1 or min(gained, lost) < 0 or flips > 1 or not 0 < alpha < 1:
        raise ValueError(f"no probabilities of n ≥ 1 questions: n = {n}, gained {gained}, lost {lost}, alpha {alpha}")
    if flips == 0:
        return 0.0
    counts = np.arange(n + 1)
    needed = binom.isf(alpha / 2, counts, 0.5) + 1
    share = gained / flips
    found = binom.sf(needed - 1, counts, share) + binom.cdf(counts - needed, counts, share)
    # without flips p is 1
    return float((binom.pmf(counts, n, flips) * np.where(counts == 0, 0.0, found)).sum())


def bootstrap_indices(n: int, resamples: int = 10_000, seed: int = 0) -> NDArray[np.int64]:
    """Question indices of every resample, shape (resamples, n)."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def percentile_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The central interval of bootstrap values; infinite values are allowed, NaN are not."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def rank_p_value(value: float, controls: NDArray[np.float64]) -> float:
    """One-sided permutation p-value of a value among controls: (1 + how many reach it) / (1 + n); never 0."""
    return float((1 + np.sum(controls >= value)) / (1 + len(controls)))
