"""Adjusting p-values for how many were looked at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def bonferroni(p: Floats) -> Floats:
    """m · p: family-wise error under any dependence."""
    return np.minimum(1.0, len(p) * p)


def holm(p: Floats) -> Floats:
    """Holm (1979), step-down: family-wise error under any dependence, never weaker than Bonferroni."""
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return adjusted


def benjamini_hochberg(p: Floats) -> Floats:
    """Benjamini and Hochberg (1995): false-discovery rate under independence or positive dependence."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p, method="bh"))


def benjamini_yekutieli(p: Floats) -> Floats:
    """Benjamini and Yekutieli (2001): false-discovery rate under any dependence."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p, method="by"))


def none(p: Floats) -> Floats:
    """No adjustment: for one hypothesis that was named beforehand."""
    return np.array(p, dtype=float)


#: corrections that need p-values alone; "max-t" and "max-t-step-down" need the permutations themselves
FROM_P: dict[str, Callable[[Floats], Floats]] = {
    "bonferroni": bonferroni,
    "holm": holm,
    "bh": benjamini_hochberg,
    "by": benjamini_yekutieli,
    "none": none,
}
CORRECTIONS = ("max-t", "max-t-step-down", *FROM_P)


def adjust(p: Floats, correction: str) -> Floats:
    """p-values adjusted by a correction that needs nothing else; raises KeyError for any other name."""
    return FROM_P[correction](np.asarray(p, dtype=float))
