"""What the measures of localisation share: the jackknife, and checks of what is asked for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError, check_count, check_level, check_seed

Floats = NDArray[np.float64]
#: with fewer prompts there is no interval
FEWEST = 5


def jackknife(value: float, without: Floats, level: float) -> tuple[float, float, float]:
    """(value less its estimated bias, and its interval by Student's t) from the values without each prompt in turn.

    Efron and Tibshirani (1993, ch. 11). NaN with fewer than ``FEWEST`` prompts.
    """
    from scipy.stats import t

    n = len(without)
    if n < FEWEST:
        return value, np.nan, np.nan
    error = float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum()))
    corrected = float(n * value - (n - 1) * without.mean())
    half = float(t.isf((1 - level) / 2, n - 1)) * error
    return corrected, corrected - half, corrected + half


def refuse_overlap(kinds: Iterable[str]) -> None:
    """Raise UsageError where modules of one kind are parts of another kind's: a shift would count twice."""
    kinds = set(kinds)
    inside = {"head", "attn"} <= kinds or {"neuron", "mlp"} <= kinds
    if inside or ("linear" in kinds and len(kinds) > 1):
        raise UsageError(
            f"{', '.join(sorted(kinds))} overlap, so a shift would count twice: choose kinds that do not (head and "
            "mlp, head and neuron, attn and mlp, or linear alone)"
        )


def check_k(k: int, modules: int) -> None:
    """Raise UsageError unless K is a whole number from 1 to the number of modules."""
    check_count("k", k, most=modules)


def check_resampling(level: float, seed: int, **counts: int) -> None:
    """Raise UsageError for a level, a seed or a number of resamples that cannot be used."""
    check_level(level)
    check_seed(seed)
    for name, value in counts.items():
        check_count(name, value)
