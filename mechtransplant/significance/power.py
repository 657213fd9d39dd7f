"""How many prompts an effect needs, and the smallest effect that a number of prompts can show.

A module is found when its two-sided t test passes the level that the family leaves to one test: Šidák's
1 − (1 − α)^(1/tests), which is close to max-T for independent modules and conservative for correlated ones (then pass
:func:`effective_tests` of a pilot as ``tests``). Effects are Cohen's d; power is from the noncentral t distribution.
Prompts are those that are tested: the direction test projects half of them, so it needs twice as many.
"""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np

from mechtransplant.errors import UsageError, check_count, check_seed

if TYPE_CHECKING:
    import pandas as pd

Design = Literal["one-sample", "control"]
MOST_PROMPTS = 1_000_000


def _check(design: str, **shares: float) -> None:
    if design not in ("one-sample", "control"):
        raise UsageError(f"unknown design {design!r}: expected one-sample (sign-flip, matched) or control (two groups)")
    for name, value in shares.items():
        _check_number(name, value)
        if not 0 < value < 1:
            raise UsageError(f"{name} must lie between 0 and 1, got {value}")


def _check_number(name: str, value: object, least: float | None = None) -> None:
    """Raise UsageError unless ``value`` is a finite number, at least ``least``."""
    number = isinstance(value, Real) and bool(np.isfinite(float(value)))
    if not number or (least is not None and float(value) < least):  # type: ignore[arg-type]
        raise UsageError(f"{name} must be a number{'' if least is None else f' of at least {least:g}'}, got {value!r}")


def power(
    effect_size: float, prompts: int, tests: float = 300, alpha: float = 0.05, design: Design = "one-sample"
) -> float:
    """Probability that one module with this Cohen's d is found.

    Args:
        effect_size: mean / standard deviation of the shift; for "control", difference / standard deviation.
        prompts: how many; for "control", in each of the two groups.
        tests: the number of modules (or effective number) in the family.
        alpha: the family-wise error.

    Raises:
        UsageError: fewer than two prompts, less than one test, or an alpha outside (0, 1).
    """
    from scipy.stats import nct, norm, t

    from mechtransplant.significance.table import smallest_p

    _check(design, alpha=alpha)
    check_count("prompts", prompts, least=2)
    _check_number("effect_size", effect_size)
    _check_number("tests", tests, least=1)
    level = -np.expm1(np.log1p(-alpha) / tests)
    one = design == "one-sample"
    # no permutation p-value, adjusted or not, is below the share of the observed arrangement and its mirror image
    if smallest_p(design, prompts, prompts) > alpha:
        return 0.0
    freedom = prompts - 1 if one else 2 * prompts - 2
    centre = effect_size * np.sqrt(prompts if one else prompts / 2)
    bar = t.isf(level / 2, freedom)
    right, left = nct.sf(bar, freedom, abs(centre)), nct.cdf(-bar, freedom, abs(centre))
    if np.isnan(right):
        # scipy's series gives up far out; there the normal approximation is as good (Johnson and Welch, 1940)
        right = norm.sf((bar * (1 - 1 / (4 * freedom)) - abs(centre)) / np.sqrt(1 + bar**2 / (2 * freedom)))
    # the tail on the wrong side: NaN only where it is far below 1e-16
    return float(np.clip(right + np.nan_to_num(left), 0, 1))


def prompts_needed(
    effect_size: float, tests: float = 300, alpha: float = 0.05, wanted: float = 0.8, design: Design = "one-sample"
) -> int:
    """The smallest number of prompts (per group, for "control") with which ``wanted`` power is reached."""
    _check(design, alpha=alpha, wanted=wanted)
    _check_number("effect_size", effect_size)
    if effect_size == 0:
        raise UsageError("an effect of 0 cannot be found with any number of prompts: give the smallest that matters")
    low, high = 1, 2
    while power(effect_size, high, tests, alpha, design) < wanted:
        low, high = high, 2 * high
        if high > MOST_PROMPTS:
            raise UsageError(f"an effect of {effect_size} needs more than {MOST_PROMPTS:,} prompts: give a larger one")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect_size, middle, tests, alpha, design) >= wanted else (middle, high)
    return high


def smallest_effect(
    prompts: int, tests: float = 300, alpha: float = 0.05, wanted: float = 0.8, design: Design = "one-sample"
) -> float:
    """The smallest Cohen's d that this many prompts (per group, for "control") show with ``wanted`` power.

    Infinite where no effect can reach significance with so few prompts.
    """
    _check(design, alpha=alpha, wanted=wanted)
    low, high = 0.0, 1.0
    while power(high, prompts, tests, alpha, design) < wanted:
        high *= 2
        if high > 1e6:
            return float("inf")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, prompts, tests, alpha, design) >= wanted else (middle, high)
    return high


def effective_tests(
    shifts: pd.DataFrame, measure: str | None = None, alpha: float = 0.05, permutations: int = 10_000, seed: int = 0
) -> float:
    """How many independent tests the correlated modules of a pilot amount to, by max-T: between 1 and their number.

    The level that max-T leaves to one test, p, gives log(1 − α) / log(1 − p). Takes a frame of a signed measure.
    """
    from scipy.stats import t

    from mechtransplant.significance.permutation import largest_statistics
    from mechtransplant.significance.table import one_measure, refuse_norms, shift_matrix

    _check("one-sample", alpha=alpha)
    check_count("permutations", permutations, least=99)
    check_seed(seed)
    chosen = one_measure(shifts, measure)
    refuse_norms(chosen, "a sign-flip")
    values, modules = shift_matrix(chosen)
    largest = largest_statistics(values, permutations, seed)
    bar = float(np.quantile(largest, 1 - alpha))
    level = 2 * t.sf(bar, np.isfinite(values).sum(0).max() - 1)
    return float(np.clip(np.log1p(-alpha) / np.log1p(-level), 1, len(modules)))
