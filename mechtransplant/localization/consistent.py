"""How consistently a module shifts over prompts: alignment of its shift vectors, and the share of one sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError, check_count, check_level, check_seed
from mechtransplant.localization.resampling import FEWEST, jackknife
from mechtransplant.selection import remember
from mechtransplant.significance import wilson_interval
from mechtransplant.significance.table import one_measure, refuse_norms, shift_matrix

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


class Vectors(Protocol):
    """What :func:`consistency` needs of shift vectors (``shifts.ShiftVectors``)."""

    @property
    def modules(self) -> list[str]: ...

    def alignment(self, module: str) -> Floats: ...

    def gram(self, module: str) -> Floats: ...


def consistency(
    shifts: pd.DataFrame,
    vectors: Vectors | None = None,
    measure: str = "magnitude",
    level: float = 0.95,
    flips: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """How consistently every module shifts over prompts.

    Args:
        shifts: a frame with a signed measure.
        vectors: shift vectors of the same prompts (:func:`shift_vectors`); without them there is no alignment.
        measure: the signed measure whose signs are counted.
        flips: random sign-flips of whole vectors that make the alignment's null.

    Returns:
        one row a module: module, n, size (mean of the measure), sign_share (share of the prompts that have the more
        frequent sign; a prompt whose value is 0 has none), sign_low, sign_high (Wilson's interval), sign_null (what
        even chances would give), sign_p (exact binomial, of the prompts that have a sign); with vectors also alignment
        (mean cosine with the mean of the other prompts), alignment_low, alignment_high (jackknife over prompts, because
        every cosine depends on all of them), alignment_null (mean under sign-flips), alignment_p (one-sided).
        Alignment is NaN where a module does not shift at all.

    Raises:
        UsageError: a measure that has no sign, vectors of other prompts or modules.
    """
    import pandas as pd

    check_level(level)
    check_seed(seed)
    check_count("flips", flips)
    chosen = one_measure(shifts, measure)
    refuse_norms(chosen, "counting the signs")
    values, modules = shift_matrix(chosen)
    rows: list[dict[str, Any]] = [{"module": m, **_sign_share(values[:, i], level)} for i, m in enumerate(modules)]
    if vectors is not None:
        if not (hasattr(vectors, "modules") and hasattr(vectors, "gram")):
            raise UsageError(f"vectors must come from shift_vectors(pair, task), got {type(vectors).__name__}")
        known = set(vectors.modules)
        lacking = [m for m in modules if m not in known]
        if lacking:
            raise UsageError(f"the vectors lack {len(lacking)} modules (first {lacking[0]}): measure the same kinds")
        rng = np.random.default_rng(seed)
        for row in rows:
            found = vectors.alignment(row["module"])
            if len(found) != len(values):
                raise UsageError(
                    f"the vectors have {len(found)} prompts and the shifts {len(values)}: measure the same task"
                )
            row.update(_alignment(found, vectors.gram(row["module"]), level, flips, rng))
    return remember(pd.DataFrame(rows), shifts)


def _sign_share(values: Floats, level: float) -> dict[str, float]:
    from scipy.stats import binom, binomtest

    values = values[np.isfinite(values)]
    positive, negative = int((values > 0).sum()), int((values < 0).sum())
    signed, more, n = positive + negative, max(positive, negative), len(values)
    if signed == 0:
        unknown = dict.fromkeys(("sign_share", "sign_low", "sign_high", "sign_null"), np.nan)
        return {"n": n, "size": 0.0, **unknown, "sign_p": 1.0}
    low, high = wilson_interval(more, n, level)
    counts = np.arange(signed + 1)
    return {
        "n": n,
        "size": float(values.mean()),
        "sign_share": more / n,
        "sign_low": low,
        "sign_high": high,
        "sign_null": float((np.maximum(counts, signed - counts) * binom.pmf(counts, signed, 0.5)).sum() / n),
        "sign_p": float(binomtest(positive, signed, 0.5).pvalue),
    }


def _alignment(found: Floats, gram: Floats, level: float, flips: int, rng: np.random.Generator) -> dict[str, float]:
    usable = np.isfinite(found)
    if usable.sum() < 2:
        nothing = ("alignment", "alignment_low", "alignment_high", "alignment_null")
        return dict.fromkeys(nothing, np.nan) | {"alignment_p": 1.0}
    value = float(found[usable].mean())
    low, high = _jackknife_interval(value, gram[np.ix_(usable, usable)], level)
    null = flipped_alignments(gram, flips, rng)
    return {
        "alignment": value,
        "alignment_low": low,
        "alignment_high": high,
        "alignment_null": float(null.mean()),
        "alignment_p": float((1 + (null >= value - 1e-12).sum()) / (1 + len(null))),
    }


def _jackknife_interval(value: float, gram: Floats, level: float) -> tuple[float, float]:
    """The jackknife interval of the mean alignment, from the inner products of the prompts' vectors.

    Leaving out prompt j changes the cosine of every other prompt, so all of them are computed again.
    """
    n = len(gram)
    rows, squares, total = gram.sum(1), np.diag(gram), gram.sum()
    # [i, j]: prompt i's vector with the sum of all but i and j
    with_others = rows[:, None] - squares[:, None] - gram
    others = total - 2 * rows[:, None] - 2 * rows[None, :] + squares[:, None] + squares[None, :] + 2 * gram
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = with_others / np.sqrt(squares[:, None] * np.maximum(others, 0))
    cosine[(others <= 1e-12 * squares.sum()) | np.eye(n, dtype=bool)] = np.nan
    usable = np.isfinite(cosine).any(0)
    if usable.sum() < FEWEST:
        return np.nan, np.nan
    _, low, high = jackknife(value, np.nanmean(cosine[:, usable], axis=0), level)
    # around the value itself: that a cosine with fewer others is a little smaller is no bias of this many
    return max(-1.0, value - (high - low) / 2), min(1.0, value + (high - low) / 2)


def flipped_alignments(gram: Floats, flips: int, rng: np.random.Generator) -> Floats:
    """Mean alignment after random sign-flips of whole vectors, from their inner products (prompts, prompts): (flips,).

    What is left of alignment when vectors are as long and as similar as they are, and point to either side.
    """
    signs = 1.0 - 2.0 * rng.integers(0, 2, (len(gram), flips))
    squares = np.diag(gram)[:, None]
    with_all = signs * (gram @ signs)
    total = with_all.sum(0)
    others = np.maximum(total - 2 * with_all + squares, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (with_all - squares) / np.sqrt(squares * others)
    lost = (squares == 0) | (others <= 1e-12 * squares.sum())
    cosine = np.where(lost, np.nan, np.clip(cosine, -1, 1))
    usable = np.isfinite(cosine).any(0)
    means = np.zeros(flips)
    means[usable] = np.nanmean(cosine[:, usable], axis=0)
    return means
