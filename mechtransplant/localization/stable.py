"""How stable the modules with the largest shifts are under resampling of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError
from mechtransplant.localization.resampling import check_k, check_resampling, refuse_overlap
from mechtransplant.selection import remember
from mechtransplant.significance import wilson_interval
from mechtransplant.significance.table import one_measure, shift_matrix

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
#: with fewer prompts there are no two halves to compare
FEWEST_TO_HALVE = 4


@dataclass(frozen=True)
class Stability:
    """How stable the K modules with the largest mean absolute shift are under resampling of prompts.

    ``frequency``: one row a module: module, rank (on all prompts), frequency (share of resamples that select it), low,
    high (Wilson's interval of the resampling). ``jaccard``: mean overlap |A ∩ B| / |A ∪ B| of the sets from two
    disjoint random halves of the prompts, ``low``–``high`` its central 95 % over splits, ``null`` what two random sets
    would give.
    """

    k: int
    frequency: pd.DataFrame
    jaccard: float
    low: float
    high: float
    null: float

    def __str__(self) -> str:
        sure = int((self.frequency.frequency >= 0.95).sum())
        return (
            f"top {self.k} of {len(self.frequency)} modules: {sure} are selected in at least 95 % of resamples; two "
            f"halves agree with Jaccard {self.jaccard:.2f} ({self.low:.2f} – {self.high:.2f}; chance {self.null:.2f})"
        )


def topk_stability(
    shifts: pd.DataFrame, k: int = 8, measure: str | None = None, resamples: int = 1_000, seed: int = 0
) -> Stability:
    """Selection frequency under the bootstrap, and Jaccard overlap of split halves, of the top K by mean |shift|.

    Raises UsageError for k outside 1 to the number of modules that shift at all, or fewer than four prompts.
    """
    import pandas as pd

    check_resampling(0.95, seed, resamples=resamples)
    chosen = one_measure(shifts, measure)
    refuse_overlap(chosen.kind if "kind" in chosen else ())
    values, modules = shift_matrix(chosen)
    check_k(k, len(modules))
    n, m = values.shape
    if n < FEWEST_TO_HALVE or np.isnan(values).any():
        raise UsageError(f"stability needs at least four prompts and every module on each, got {n} prompts")
    sizes = np.abs(values)
    shifting = int((sizes > 0).any(0).sum())
    if shifting < k:
        raise UsageError(
            f"only {shifting} of {m} modules shift at all, so there are no top {k}: ask for k ≤ {shifting}"
        )
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    counts = _members(weights @ sizes, k, rng).sum(0)
    halves = np.argsort(rng.random((resamples, n)), axis=1) < n // 2
    one, other = _members(halves @ sizes, k, rng), _members((~halves) @ sizes, k, rng)
    common = (one & other).sum(1)
    overlap = common / (2 * k - common)
    order = np.argsort(-sizes.mean(0), kind="stable")
    intervals = [wilson_interval(int(counts[i]), resamples) for i in order]
    frame = pd.DataFrame(
        {
            "module": [modules[i] for i in order],
            "rank": np.arange(1, m + 1),
            "frequency": counts[order] / resamples,
            "low": [low for low, _ in intervals],
            "high": [high for _, high in intervals],
        }
    )
    low, high = np.quantile(overlap, [0.025, 0.975])
    frame = remember(frame, shifts)
    return Stability(k, frame, float(overlap.mean()), float(low), float(high), _chance_overlap(k, m))


def _members(scores: Floats, k: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which modules are among the k largest of each row; ties are broken by lot, or they would look stable."""
    order = np.lexsort((rng.random(scores.shape), -scores), axis=1)[:, :k]
    members = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(members, order, True, axis=1)
    return members


def _chance_overlap(k: int, m: int) -> float:
    """Expected Jaccard overlap of two independent random sets of k out of m."""
    from scipy.stats import hypergeom

    common = np.arange(k + 1)
    return float((hypergeom.pmf(common, m, k, k) * common / (2 * k - common)).sum())
