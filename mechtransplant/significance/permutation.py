"""Permutation tests of many modules at once: p-values, and the max-T distribution that adjusts them for each other.

Every permutation is applied to all modules together, so that their correlation is kept. Values are arrays of shape
(prompts, modules); NaN marks a prompt without a value of that module. All tests are two-sided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Signs = Iterator[Floats]
#: permuted statistics that are held at once, in numbers: 16 MB
CHUNK = 2_000_000
#: sums of equal numbers in another order differ in the last bits, and must still count as ties
TIE = 1e-10


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

    A prompt's sign is flipped for all modules at once. All 2ⁿ flips are enumerated where they are no more than
    ``permutations``. Valid only for signed values that are symmetric about 0 under the null hypothesis.
    """
    observed, key, signs, exact = _flips(values, permutations, seed)
    return _permuted(observed, key(np.ones((1, len(values))))[0], map(key, signs), exact)


def largest_statistics(values: Floats, permutations: int = 10_000, seed: int = 0) -> Floats:
    """The largest |t| over all modules in each of many random sign-flips: what max-T compares with."""
    _, key, signs, _ = _flips(values, permutations, seed)
    counts = np.isfinite(values).sum(0)
    largest = np.concatenate([key(s).max(1) for s in signs])
    equal = bool((counts == counts[0]).all())
    return _t_of_share(largest, np.full(len(largest), float(counts[0]))) if equal else largest


def _flips(values: Floats, permutations: int, seed: int) -> tuple[Floats, Callable[[Floats], Floats], Signs, bool]:
    """(observed t, a function from signs to keys that order modules as |t| does, the signs, whether they are all)."""
    valid = np.isfinite(values)
    counts = valid.sum(0).astype(float)
    x = np.where(valid, values, 0.0)
    prompts, modules = x.shape
    # t grows with the mean over the root mean square, which no flip changes: only the sums need computing again
    scale = np.sqrt(counts * np.square(x).sum(0))
    x = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    equal = bool((counts == counts[0]).all())

    def key(signs: Floats) -> Floats:
        share = signs @ x
        return np.abs(share if equal else _t_of_share(share, counts))

    # a flip and its opposite have one |t|: half of them are all of them
    exact = 2 ** (prompts - 1) <= permutations
    signs = _chunks(_all_signs(prompts), modules) if exact else _random_signs(prompts, modules, permutations, seed)
    return _t_of_share(x.sum(0), counts), key, signs, exact


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


def _random_signs(prompts: int, modules: int, permutations: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    for size in _sizes(permutations, max(prompts, modules)):
        yield np.asarray(1.0 - 2.0 * rng.integers(0, 2, (size, prompts)), dtype=np.float64)


def label_permutation(task: Floats, control: Floats, permutations: int = 10_000, seed: int = 0) -> Permuted:
    """Test that task and control prompts come from one distribution; the statistic is Welch's two-sample t.

    Prompts change sides for all modules at once. Valid for any values, norms and skewed ones included. All divisions
    into two groups are enumerated where they are no more than ``permutations``. Each module needs at least two values
    on each side of every division: missing values are allowed where that holds for the observed one.
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

    def statistic(members: Floats) -> Floats:
        n1 = np.full((len(members), 1), float(first)) if complete else members @ valid
        n2 = total_counts - n1
        s1, q1 = members @ x, members @ squares
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = s1 / n1 - (total - s1) / n2
            v1 = (q1 - np.square(s1) / n1) / (n1 - 1) / n1
            v2 = (total_squares - q1 - np.square(total - s1) / n2) / (n2 - 1) / n2
            variance = np.maximum(v1, 0) + np.maximum(v2, 0)
            # rounding leaves a little of a variance that is 0
            variance[variance < 1e-14] = 0
            t = difference / np.sqrt(variance)
        # a division that leaves a side without two values says nothing
        return np.where((np.abs(difference) < 1e-14) | (n1 < 2) | (n2 < 2), 0.0, t)

    exact = comb(size, first) <= permutations
    if exact:
        chosen = np.array(list(combinations(range(size), first)))
        members = np.zeros((len(chosen), size))
        np.put_along_axis(members, chosen, 1.0, axis=1)
        divisions = _chunks(members, x.shape[1])
    else:
        divisions = _random_divisions(first, size, x.shape[1], permutations, seed)
    observed = statistic(np.r_[np.ones(first), np.zeros(size - first)][None])[0]
    return _permuted(observed, np.abs(observed), (np.abs(statistic(d)) for d in divisions), exact)


def _random_divisions(first: int, size: int, modules: int, permutations: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    for rows in _sizes(permutations, max(size, modules)):
        order = np.argsort(rng.random((rows, size)), axis=1)
        yield (order < first).astype(float)


def _sizes(permutations: int, width: int) -> Iterator[int]:
    step = max(1, CHUNK // width)
    for start in range(0, permutations, step):
        yield min(step, permutations - start)


def _chunks(rows: Floats, modules: int) -> Iterator[Floats]:
    step = max(1, CHUNK // max(modules, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _permuted(statistic: Floats, observed: Floats, keys: Iterator[Floats], exact: bool) -> Permuted:
    """Count how often permuted keys, of shape (permutations, modules), reach the observed ones, of shape (modules,)."""
    bar = np.where(np.isinf(observed), observed, observed * (1 - TIE))
    order = np.argsort(-observed, kind="stable")
    single, largest, stepped = (np.zeros(len(observed)) for _ in range(3))
    done = 0
    for key in keys:
        done += len(key)
        single += (key >= bar).sum(0)
        largest += len(key) - np.searchsorted(np.sort(key.max(1)), bar, side="left")
        # the largest among this module and those with smaller observed statistics
        below = np.maximum.accumulate(key[:, order[::-1]], axis=1)[:, ::-1]
        stepped[order] += (below >= bar[order]).sum(0)
    extra = 0 if exact else 1
    p, p_max, p_step = ((count + extra) / (done + extra) for count in (single, largest, stepped))
    p_step[order] = np.maximum.accumulate(p_step[order])
    return Permuted(statistic, p, p_max, p_step, done, exact)
