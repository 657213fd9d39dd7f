"""Where a value, or a whole curve, stands among controls: ranks and permutation p-values (numpy only)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.significance.accuracy import rank_p_value

Floats = NDArray[np.float64]

#: mean log-probabilities that are no further apart than this are ties: rounding tells them apart
SAME_NATS = 1e-5
#: the same of a curve's area and of its largest height
_ROUNDING = 1e-12


@dataclass(frozen=True)
class RankAmong:
    """A value among n controls: how many it beats and ties, and p = (1 + how many reach it) / (1 + n), one-sided.

    ``median``, ``low`` and ``high`` are the controls' median and range.
    """

    value: float
    n: int
    beaten: int
    tied: int
    p_value: float
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        ties = f" (ties {self.tied})" if self.tied else ""
        return f"beats {self.beaten} of {self.n}{ties}, p = {self.p_value:.3g}"


def rank_among(value: float, controls: Sequence[float] | Floats, tolerance: float = 0.0) -> RankAmong:
    """Where a value stands among controls; raises ValueError without any, or for a number that is not finite.

    ``tolerance``: what is no further apart is a tie (``SAME_NATS`` for mean log-probabilities).
    """
    others = np.asarray(controls, dtype=float)
    if others.size == 0 or not np.isfinite([value, *others]).all():
        raise ValueError("a rank needs at least one control and finite numbers")
    return RankAmong(
        float(value),
        len(others),
        int((others < value - tolerance).sum()),
        int((np.abs(others - value) <= tolerance).sum()),
        rank_p_value(value - tolerance, others),
        float(np.median(others)),
        float(others.min()),
        float(others.max()),
    )


@dataclass(frozen=True)
class CurveRank:
    """A K-curve among the curves of n random rankings.

    ``area``: the mean height of the curve over the share of modules grafted; ``area_rank`` its rank. ``largest`` is
    max over K of (height − mean) / sd, mean and sd over all curves at that K; ``p_value`` counts the controls whose own
    maximum reaches it, so it holds for the whole curve whichever K is looked at (max-statistic; one-sided).
    """

    area: float
    area_rank: RankAmong
    largest: float
    at_k: int
    n: int
    p_value: float


def curve_area(shares: Sequence[float] | Floats, heights: Any) -> Any:
    """The mean height over shares from the first to the last (trapezoids); heights (…, K) for several curves."""
    x, y = np.asarray(shares, dtype=float), np.asarray(heights, dtype=float)
    if x.ndim != 1 or y.shape[-1] != len(x) or len(x) < 2 or (np.diff(x) <= 0).any():
        raise ValueError("an area needs at least two ascending shares, and one height at each")
    return np.trapezoid(y, x, axis=-1) / (x[-1] - x[0])


def curve_rank(
    ks: Sequence[int], heights: Sequence[float], controls: Any, candidates: int, ends: tuple[float, float]
) -> CurveRank:
    """A curve among controls.

    Args:
        ks: ascending, below the number of candidates; ``heights`` (K,) and ``controls`` (n, K) are accuracies there.
        ends: the accuracy with nothing and with everything grafted, which all curves share.
    """
    own, others = np.asarray(heights, dtype=float), np.asarray(controls, dtype=float)
    if others.ndim != 2 or not len(others) or others.shape[1] != len(own) or len(own) != len(ks):
        raise ValueError(f"expected controls of shape (n, {len(ks)}), got {others.shape}")
    both = np.vstack([own, others])
    shares = np.array([0, *ks, candidates]) / candidates
    fixed = [np.full((len(both), 1), end) for end in ends]
    areas = curve_area(shares, np.hstack([fixed[0], both, fixed[1]]))
    # the curve itself is among those that give mean and sd: under the null it is one of them
    sd = both.std(0, ddof=1)
    heights_in_sd = np.divide(both - both.mean(0), sd, out=np.zeros_like(both), where=sd > 0)
    largest = heights_in_sd.max(1)
    return CurveRank(
        float(areas[0]),
        rank_among(float(areas[0]), areas[1:], _ROUNDING),
        float(largest[0]),
        int(ks[int(heights_in_sd[0].argmax())]),
        len(others),
        float((1 + (largest[1:] >= largest[0] - _ROUNDING).sum()) / (1 + len(others))),
    )
