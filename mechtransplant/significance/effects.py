"""How large a shift is: means and standardised means of many modules at once, with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: bootstrap resamples; intervals vary by about 2 % of their width between seeds
RESAMPLES = 2_000
#: with fewer values there is no interval: one resample in hundreds would hold one value only
FEWEST = 5
#: modules whose resamples are held at once
BLOCK = 4_096


@dataclass(frozen=True)
class Effects:
    """Effects of every module, each array of shape (modules,).

    ``mean`` with the studentised bootstrap interval ``low``–``high`` (Efron and Tibshirani, 1993, ch. 12), in the
    units of the values; ``size`` (mean / standard deviation: Cohen's d) with the bias-corrected percentile interval
    ``size_low``–``size_high``. An interval is NaN where it cannot be had: fewer than five values, or so few different
    ones that resamples have no spread. Below about 32 prompts the intervals of d are too narrow (their coverage is in
    benchmarks/README.md).
    """

    mean: Floats
    low: Floats
    high: Floats
    size: Floats
    size_low: Floats
    size_high: Floats


@dataclass(frozen=True)
class _Moments:
    mean: Floats
    variance: Floats
    n: Floats


def _moments(values: Floats, weights: Floats | None = None) -> _Moments:
    """Mean, unbiased variance and count per module; with ``weights`` (resamples, prompts), of every resample."""
    valid = np.isfinite(values).astype(float)
    x = np.where(valid > 0, np.nan_to_num(values), 0.0)
    w = np.ones((1, len(x))) if weights is None else weights
    n = w @ valid
    # centred first: the variance of numbers far from 0 keeps its digits
    centre = x.sum(0) / np.maximum(valid.sum(0), 1)
    x = (x - centre) * valid
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (w @ x) / n
        variance = np.maximum((w @ np.square(x)) / n - np.square(mean), 0) * n / (n - 1)
    # what rounding leaves of no spread at all
    variance = np.where(variance < 1e-13 * np.maximum(np.square(x).max(0, initial=0), 1e-300), 0, variance)
    return _Moments(mean + centre, variance, n)


def _in_blocks(effects: Callable[[slice], Effects], modules: int) -> Effects:
    """The effects of some modules after the other: the same resamples, whose values of all would not fit."""
    blocks = [effects(slice(first, first + BLOCK)) for first in range(0, modules, BLOCK)]
    return Effects(*(np.concatenate([getattr(b, f.name) for b in blocks]) for f in fields(Effects)))


def _weights(prompts: int, resamples: int, rng: np.random.Generator) -> Floats:
    """How often each resample holds each prompt, shape (resamples, prompts)."""
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(float)


def one_sample_effects(values: Floats, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Effects:
    """Effects of values of shape (prompts, modules), NaN where one is missing; d = mean / standard deviation."""
    if values.shape[1] > BLOCK:
        return _in_blocks(lambda part: one_sample_effects(values[:, part], level, resamples, seed), values.shape[1])
    whole = _moments(values)
    drawn = _moments(values, _weights(len(values), resamples, np.random.default_rng(seed)))
    return _effects(
        whole.mean[0],
        np.sqrt(whole.variance / whole.n)[0],
        np.sqrt(whole.variance)[0],
        drawn.mean,
        np.sqrt(drawn.variance / np.maximum(drawn.n, 1)),
        np.sqrt(drawn.variance),
        whole.n[0],
        level,
    )


def two_sample_effects(
    task: Floats, control: Floats, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Effects:
    """Effects of the difference task − control, each of shape (prompts, modules); prompts are resampled in each group.

    d = difference of means / √(mean of the two variances).
    """
    if task.shape[1] > BLOCK:
        return _in_blocks(
            lambda part: two_sample_effects(task[:, part], control[:, part], level, resamples, seed), task.shape[1]
        )
    rng = np.random.default_rng(seed)
    whole = _moments(task), _moments(control)
    drawn = tuple(_moments(v, _weights(len(v), resamples, rng)) for v in (task, control))

    def error(pair: tuple[_Moments, ...]) -> Floats:
        return np.sqrt(sum(m.variance / np.maximum(m.n, 1) for m in pair))

    def spread(pair: tuple[_Moments, ...]) -> Floats:
        return np.sqrt((pair[0].variance + pair[1].variance) / 2)

    return _effects(
        (whole[0].mean - whole[1].mean)[0],
        error(whole)[0],
        spread(whole)[0],
        drawn[0].mean - drawn[1].mean,
        error(drawn),
        spread(drawn),
        np.minimum(whole[0].n, whole[1].n)[0],
        level,
    )


def _effects(
    mean: Floats,
    error: Floats,
    spread: Floats,
    drawn_mean: Floats,
    drawn_error: Floats,
    drawn_spread: Floats,
    n: Floats,
    level: float,
) -> Effects:
    from scipy.special import ndtr, ndtri

    tail = (1 - level) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((drawn_mean - mean) / drawn_error, nan=0.0, posinf=np.inf, neginf=-np.inf)
        size = np.where(mean == 0, 0.0, mean / spread)
        sizes = np.where(drawn_mean == 0, 0.0, drawn_mean / drawn_spread)
    upper, lower = np.quantile(t, [1 - tail, tail], axis=0, method="inverted_cdf")
    constant = spread == 0
    low = np.where(constant, mean, mean - upper * np.where(constant, 0, error))
    high = np.where(constant, mean, mean - lower * np.where(constant, 0, error))
    # the resampled d is biased away from 0 (its spread is too small): corrected by where the observed d stands in it
    sizes = np.sort(np.nan_to_num(sizes, nan=0.0, posinf=np.inf, neginf=-np.inf), axis=0)
    resamples = len(sizes)
    below = np.clip(((sizes < size).sum(0) + (sizes <= size).sum(0)) / (2 * resamples), 0.5 / resamples, None)
    bias = ndtri(np.minimum(below, 1 - 0.5 / resamples))
    columns = np.arange(sizes.shape[1])

    def at(z: float) -> Floats:
        share = ndtr(2 * bias + z)
        return sizes[np.clip((share * resamples).astype(int), 0, resamples - 1), columns]

    size_low, size_high = at(float(ndtri(tail))), at(float(ndtri(1 - tail)))
    few = ~constant & ((n < FEWEST) | ~(np.isfinite(low) & np.isfinite(high)))
    nan = np.full(len(mean), np.nan)
    return Effects(
        mean,
        np.where(few, nan, low),
        np.where(few, nan, high),
        size,
        np.where(few | constant, nan, size_low),
        np.where(few | constant, nan, size_high),
    )
