"""Permutation tests of many modules at once: p-values, and the max-T distribution that adjusts them for each other.

Every permutation is applied to all modules together, so that their correlation is kept. Values are arrays of shape
(prompts, modules); NaN marks a prompt without a value of that module. All tests are two-sided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: permuted statistics that are held at once, in numbers: 16 MB
CHUNK = 2_000_000
#: keys lie between 0 and 1, and sums of equal numbers in another order differ in their last bits: still a tie
TIE = 1e-12


@dataclass(frozen=True)
class Permuted:
    """A permutation test of every module, each array of shape (modules,).

    ``statistic`` is a t statistic; ``p`` = (b + 1)/(n + 1) over n random permutations, or the exact share where all
    were enumerated (``exact``); ``p_max`` is adjusted by the largest statistic of each permutation (single-step max-T),
    ``p_step_down`` by the largest among the modules that are not ranked higher (Westfall and Young, 1993, step-down).
    """

    statistic: Floats
    p: Floats
    p_max: Floats
    p_step_down: Floats
    permutations: int
    exact: bool


def sign_flip(values: Floats, permutations: int = 10_000, seed: int = 0) -> Permuted:
    """Sign-flip test that each module's values are symmetric about 0; the statistic is Student's one-sample t.

    A prompt's sign is flipped for all modules at once. All flips are enumerated where they are no more than
    ``permutations`` (2ⁿ⁻¹: a flip and its opposite have one |t|). Valid only for signed values that are symmetric about
    0 under the null hypothesis.
    """
    flips = _Flips(values, permutations, seed)
    return _permuted(flips.statistic, flips.keys_of(flips.share), flips.bars, flips.all_keys(), flips.exact)


def largest_statistics(values: Floats, permutations: int = 10_000, seed: int = 0) -> Floats:
    """The largest |t| over all modules in each of many sign-flips: what max-T compares with.

    Where modules have different numbers of prompts, t is what the largest number would give.
    """
    flips = _Flips(values, permutations, seed)
    largest = np.concatenate([key.max(1) for key in flips.all_keys()])
    return _t_of_share(flips.share_of(largest), np.full(len(largest), flips.counts.max()))


class _Flips:
    """Sign-flips of many modules. The *share* of a module is its mean over its root mean square, between −1 and 1.

    Student's t grows with the share, and no flip changes the root mean square: only sums need computing again.
    """

    def __init__(self, values: Floats, permutations: int, seed: int) -> None:
        valid = np.isfinite(values)
        self.counts = valid.sum(0).astype(float)
        self.prompts, self.modules = values.shape
        self.permutations, self.seed = permutations, seed
        x = np.where(valid, values, 0.0)
        scale = np.sqrt(self.counts * np.square(x).sum(0))
        self.x = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
        self.share = self.x.sum(0)
        self.statistic = _t_of_share(self.share, self.counts)
        self.equal = bool((self.counts == self.counts[0]).all())
        self.exact = 2 ** (self.prompts - 1) <= permutations

    def keys_of(self, share: Floats) -> Floats:
        """What modules are compared by: |share|, or, where they have different numbers of prompts, a common scale.

        That scale is Wallace's (1959) normal equivalent of t, z ≈ (8f + 1)/(8f + 3) · √(f · ln(1 + t²/f)) with f
        degrees of freedom; any monotone scale is valid, and this one favours neither few nor many prompts.
        """
        size = np.minimum(np.abs(share), 1.0)
        if self.equal:
            return size
        f = self.counts - 1
        with np.errstate(divide="ignore"):
            return np.asarray((8 * f + 1) / (8 * f + 3) * np.sqrt(-f * np.log1p(-np.square(size))))

    def share_of(self, key: Floats) -> Floats:
        """The share that gives a key to a module with the largest number of prompts."""
        if self.equal:
            return key
        f = self.counts.max() - 1
        return np.asarray(np.sqrt(-np.expm1(-np.square(key * (8 * f + 3) / (8 * f + 1)) / f)))

    @property
    def bars(self) -> Floats:
        """The smallest keys that count as reaching the observed ones."""
        return self.keys_of(np.maximum(np.abs(self.share) - TIE, 0))

    def all_keys(self) -> Iterator[Floats]:
        """Keys of every flip, in chunks of shape (flips, modules)."""
        width = max(self.prompts, self.modules)
        signs = (
            _chunks(_all_signs(self.prompts), width)
            if self.exact
            else _random_signs(self.prompts, width, self.permutations, self.seed)
        )
        for each in signs:
            yield self.keys_of(each @ self.x)


def _t_of_share(share: Floats, counts: Floats) -> Floats:
    """Student's t of values whose mean is ``share`` times their root mean square; infinite where all are equal."""
    share = np.clip(share, -1, 1)
    rest = 1 - np.square(share)
    # what rounding leaves of 1 − 1
    rest[rest < 1e-15] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = share * np.sqrt(counts - 1) / np.sqrt(rest)
    return np.where(share == 0, 0.0, t)


def _all_signs(prompts: int) -> Floats:
    bits = np.arange(2 ** (prompts - 1))[:, None] >> np.arange(prompts - 1)[None, :] & 1
    return np.hstack([np.ones((len(bits), 1)), 1.0 - 2.0 * bits])


def _random_signs(prompts: int, width: int, permutations: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    for size in _sizes(permutations, width):
        yield np.asarray(1.0 - 2.0 * rng.integers(0, 2, (size, prompts)), dtype=np.float64)


def label_permutation(task: Floats, control: Floats, permutations: int = 10_000, seed: int = 0) -> Permuted:
    """Test that task and control prompts come from one distribution; the statistic is Welch's two-sample t.

    Prompts change sides for all modules at once. Valid for any values, norms and skewed ones included. All divisions
    into two groups are enumerated where they are no more than ``permutations``. Divisions that leave a module without
    two values on each side do not count for that module.
    """
    pooled = np.vstack([task, control])
    valid = np.isfinite(pooled).astype(float)
    # centred and scaled, so that sums of squares keep their digits
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = (pooled - np.nanmean(pooled, 0)) / np.nanstd(pooled, 0)
    x = np.where(valid > 0, np.nan_to_num(pooled, nan=0.0, posinf=0.0, neginf=0.0), 0.0)
    squares, complete = np.square(x), bool(valid.all())
    total, total_squares, total_counts = x.sum(0), squares.sum(0), valid.sum(0)
    first, size = len(task), len(pooled)

    def keys_of(members: Floats) -> Floats:
        """|t| / √(t² + 1), which keeps its digits where groups barely spread; −1 where a side is too small."""
        n1 = np.full((len(members), 1), float(first)) if complete else members @ valid
        n2 = total_counts - n1
        s1, q1 = members @ x, members @ squares
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = s1 / n1 - (total - s1) / n2
            v1 = (q1 - np.square(s1) / n1) / (n1 - 1) / n1
            v2 = (total_squares - q1 - np.square(total - s1) / n2) / (n2 - 1) / n2
            key = np.abs(difference) / np.sqrt(np.square(difference) + np.maximum(v1, 0) + np.maximum(v2, 0))
        key = np.where(np.abs(difference) < 1e-14, 0.0, key)
        return np.where((n1 < 2) | (n2 < 2), -1.0, key)

    exact = comb(size, first) <= permutations
    if exact:
        chosen = np.array(list(combinations(range(size), first)))
        members = np.zeros((len(chosen), size))
        np.put_along_axis(members, chosen, 1.0, axis=1)
        divisions = _chunks(members, max(size, x.shape[1]))
    else:
        divisions = _random_divisions(first, size, x.shape[1], permutations, seed)
    observed = keys_of(np.r_[np.ones(first), np.zeros(size - first)][None])[0]
    keys = (keys_of(d) for d in divisions)
    return _permuted(_welch(task, control), observed, np.maximum(observed - TIE, 0), keys, exact)


def _welch(task: Floats, control: Floats) -> Floats:
    """Welch's t of every module; 0 where the means are equal, infinite where neither group spreads."""
    means, errors = [], []
    for group in (task, control):
        n = np.isfinite(group).sum(0)
        means.append(np.nanmean(group, 0))
        errors.append(np.nanvar(group, 0, ddof=1) / n)
    difference = means[0] - means[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = difference / np.sqrt(errors[0] + errors[1])
    size = np.maximum(np.abs(means[0]), np.abs(means[1]))
    return np.where(np.abs(difference) <= 1e-14 * size, 0.0, t)


def _random_divisions(first: int, size: int, modules: int, permutations: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    for rows in _sizes(permutations, max(size, modules)):
        order = np.argsort(rng.random((rows, size)), axis=1)
        yield (order < first).astype(float)


def _sizes(permutations: int, width: int) -> Iterator[int]:
    step = max(1, CHUNK // width)
    for start in range(0, permutations, step):
        yield min(step, permutations - start)


def _chunks(rows: Floats, width: int) -> Iterator[Floats]:
    step = max(1, CHUNK // width)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _permuted(statistic: Floats, observed: Floats, bars: Floats, keys: Iterator[Floats], exact: bool) -> Permuted:
    """Count how often permuted keys, of shape (permutations, modules), reach the observed ones, of shape (modules,).

    A negative key stands for a permutation that does not count for its module.
    """
    order = np.argsort(-observed, kind="stable")
    single, largest, stepped, counted = (np.zeros(len(observed)) for _ in range(4))
    done = 0
    for key in keys:
        done += len(key)
        counted += (key >= 0).sum(0)
        single += (key >= bars).sum(0)
        largest += len(key) - np.searchsorted(np.sort(key.max(1)), bars, side="left")
        # the largest among this module and those with smaller observed statistics
        below = np.maximum.accumulate(key[:, order[::-1]], axis=1)[:, ::-1]
        stepped[order] += (below >= bars[order]).sum(0)
    extra = 0 if exact else 1
    p = (single + extra) / (counted + extra)
    p_max, p_step = ((count + extra) / (done + extra) for count in (largest, stepped))
    # a permutation that does not count for a module cannot make its adjusted p smaller than its own
    p_max, p_step = np.maximum(p_max, p), np.maximum(p_step, p)
    p_step[order] = np.maximum.accumulate(p_step[order])
    return Permuted(statistic, p, np.maximum(p_max, p_step), p_step, done, exact)
