"""How well scores find a known set: AUROC, average precision and precision at K (numpy and scipy only)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def _checked(scores: Any, planted: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    s, y = np.asarray(scores, dtype=float), np.asarray(planted, dtype=bool)
    if s.shape != y.shape or s.ndim != 1 or not np.isfinite(s).all():
        raise ValueError(f"expected finite scores and one bool each, got shapes {s.shape} and {y.shape}")
    if not y.any() or y.all():
        raise ValueError("some modules must be planted and some not")
    return s, y


def auroc(scores: Any, planted: Any) -> float:
    """The probability that a planted module scores above another, ties counted half (Mann and Whitney, 1947)."""
    from scipy.stats import rankdata

    s, y = _checked(scores, planted)
    positives = int(y.sum())
    u = rankdata(s)[y].sum() - positives * (positives + 1) / 2
    return float(u / (positives * (len(y) - positives)))


def average_precision(scores: Any, planted: Any) -> float:
    """Σ over distinct scores, highest first, of precision there times the recall gained: equal scores count at once."""
    s, y = _checked(scores, planted)
    order = np.argsort(-s, kind="stable")
    found = np.cumsum(y[order])
    last = np.append(np.diff(s[order]) != 0, True)
    found, taken = found[last], np.flatnonzero(last) + 1
    gained = np.diff(np.concatenate([[0], found])) / y.sum()
    return float((gained * found / taken).sum())


def precision_at(scores: Any, planted: Any, k: int | None = None) -> float:
    """The share of planted modules among the K highest scores (K: as many as are planted); ties at the edge count by
    what a random pick among them would give."""
    s, y = _checked(scores, planted)
    k = int(y.sum()) if k is None else k
    edge = np.sort(s)[::-1][k - 1]
    above, at = s > edge, s == edge
    return float((y[above].sum() + y[at].mean() * (k - above.sum())) / k)
