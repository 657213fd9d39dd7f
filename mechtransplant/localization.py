"""How consistent shifts are over prompts, and how concentrated in few modules; each with an interval and a null.

*Consistent*: a module shifts the same way on every prompt (alignment of vectors, share of one sign). *Localised*: few
modules hold most of the shift (Gini index, effective number, top-k share), and the same ones on every prompt
(stability of the top K). Everything takes tidy shift frames; prompts are the unit that is resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError, check_count, check_level, check_seed
from mechtransplant.significance import wilson_interval
from mechtransplant.significance.table import one_measure, refuse_norms, shift_matrix

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
#: with fewer prompts there is no interval
FEWEST = 5
#: with fewer prompts there are no two halves to compare
FEWEST_TO_HALVE = 4


class Vectors(Protocol):
    """What :func:`consistency` needs of shift vectors (``shifts.ShiftVectors``)."""

    @property
    def modules(self) -> list[str]: ...

    def alignment(self, module: str) -> Floats: ...

    def gram(self, module: str) -> Floats: ...


# --- consistent --------------------------------------------------------------------------------------------------


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
        lacking = [m for m in modules if m not in vectors.modules]
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
    return pd.DataFrame(rows)


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
    _, low, high = _jackknife(value, np.nanmean(cosine[:, usable], axis=0), level)
    # around the value itself: that a cosine with fewer others is a little smaller is no bias of this many
    return max(-1.0, value - (high - low) / 2), min(1.0, value + (high - low) / 2)


def _jackknife(value: float, without: Floats, level: float) -> tuple[float, float, float]:
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


# --- localised ---------------------------------------------------------------------------------------------------


def shares(shifts: pd.DataFrame, measure: str | None = None) -> tuple[Floats, list[str]]:
    """Every module's share of a prompt's whole shift (absolute values), shape (prompts, modules), and the modules.

    A prompt without any shift has no shares and is left out. Raises UsageError where none has any, or values are
    missing.
    """
    chosen = one_measure(shifts, measure)
    _refuse_overlap(chosen)
    values, modules = shift_matrix(chosen)
    if np.isnan(values).any():
        raise UsageError("some modules lack values on some prompts: shares need every module on every prompt")
    sizes = np.abs(values)
    totals = sizes.sum(1, keepdims=True)
    if not (totals > 0).any():
        raise UsageError("no module shifts on any prompt: there is nothing to localise")
    kept = totals[:, 0] > 0
    return sizes[kept] / totals[kept], modules


def _refuse_overlap(shifts: pd.DataFrame) -> None:
    """Raise UsageError where a module is part of another one: its shift would count twice."""
    kinds = set(shifts.kind) if "kind" in shifts.columns else set()
    if {"head", "attn"} <= kinds or ("linear" in kinds and len(kinds) > 1):
        raise UsageError(
            f"{', '.join(sorted(kinds))} overlap, so a shift would count twice: choose kinds that do not (head and "
            "mlp, attn and mlp, or linear alone)"
        )


def gini(shares: Floats) -> Floats:
    """Gini index over the last axis: 0 for equal shares, 1 − 1/m when one of m modules has all."""
    ordered = np.sort(shares, axis=-1)
    m = ordered.shape[-1]
    weights = 2 * np.arange(1, m + 1) - m - 1
    return np.asarray((ordered * weights).sum(-1) / (m * ordered.sum(-1)))


def effective_number(shares: Floats) -> Floats:
    """exp of the entropy over the last axis: the number of equal modules that would be as spread out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log(shares), 0.0)
    return np.asarray(np.exp(-terms.sum(-1)))


def top_share(shares: Floats, k: int) -> Floats:
    """The sum of the k largest shares over the last axis."""
    return np.asarray(np.sort(shares, axis=-1)[..., -k:].sum(-1))


def concentration(
    shifts: pd.DataFrame,
    measure: str | None = None,
    k: int = 8,
    level: float = 0.95,
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """How concentrated the shift is in few modules: of the modules' mean shares over prompts.

    The null permutes shares over modules within every prompt: each prompt stays as concentrated as it is, and only
    that they agree on *which* modules is lost. p is one-sided: more concentrated than the null.

    Few prompts make any shares look more concentrated than they are. ``corrected`` takes the jackknife's estimate of
    that bias away, and low–high is the jackknife interval around it, so that it may lie to one side of ``value``.

    Returns:
        rows gini, effective_number and top_k_share, with columns statistic, value, corrected, low, high, null,
        null_low, null_high, p, modules, n (prompts), k.

    Raises:
        UsageError: k outside 1 to the number of modules, missing values, nothing shifts.
    """
    import pandas as pd

    _check_resampling(level, seed, permutations=permutations)
    each, modules = shares(shifts, measure)
    _check_k(k, len(modules))
    null = _permuted_means(each, permutations, np.random.default_rng(seed))
    without = (each.sum(0) - each) / max(len(each) - 1, 1)
    rows = []
    tail = (1 - level) / 2
    for name, function, sign in (
        ("gini", gini, 1),
        ("effective_number", effective_number, -1),
        ("top_k_share", lambda s: top_share(s, k), 1),
    ):
        value = float(function(each.mean(0)[None])[0])
        chance = function(null)
        bounds = {"gini": (0, 1), "effective_number": (1, len(modules)), "top_k_share": (k / len(modules), 1)}[name]
        corrected, low, high = np.clip(_jackknife(value, function(without), level), *bounds)
        null_low, null_high = np.quantile(chance, [tail, 1 - tail])
        reached = (sign * chance >= sign * value - 1e-12).sum()
        rows.append(
            {
                "statistic": name,
                "value": value,
                "corrected": float(corrected),
                "low": float(low),
                "high": float(high),
                "null": float(chance.mean()),
                "null_low": float(null_low),
                "null_high": float(null_high),
                "p": float((1 + reached) / (1 + permutations)),
                "modules": len(modules),
                "n": len(each),
                "k": k,
            }
        )
    return pd.DataFrame(rows)


def _permuted_means(each: Floats, permutations: int, rng: np.random.Generator) -> Floats:
    """Mean shares after permuting them over modules within every prompt, shape (permutations, modules)."""
    return np.stack([rng.permuted(each, axis=1).mean(0) for _ in range(permutations)])


def _check_k(k: int, modules: int) -> None:
    check_count("k", k, most=modules)


def _check_resampling(level: float, seed: int, **counts: int) -> None:
    check_level(level)
    check_seed(seed)
    for name, value in counts.items():
        check_count(name, value)


def lorenz_curve(
    shifts: pd.DataFrame, measure: str | None = None, permutations: int = 999, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """The Lorenz curve of localisation: modules from the largest mean share down, and what they hold together.

    Returns:
        columns rank, module, share, cumulative, null, null_low, null_high (of the cumulative share under the null of
        :func:`concentration`).
    """
    import pandas as pd

    _check_resampling(level, seed, permutations=permutations)
    each, modules = shares(shifts, measure)
    mean = each.mean(0)
    order = np.argsort(-mean, kind="stable")
    null = np.cumsum(-np.sort(-_permuted_means(each, permutations, np.random.default_rng(seed)), axis=1), axis=1)
    low, high = np.quantile(null, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame(
        {
            "rank": np.arange(1, len(modules) + 1),
            "module": [modules[i] for i in order],
            "share": mean[order],
            "cumulative": np.cumsum(mean[order]),
            "null": null.mean(0),
            "null_low": low,
            "null_high": high,
        }
    )


# --- stable ------------------------------------------------------------------------------------------------------


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

    _check_resampling(0.95, seed, resamples=resamples)
    chosen = one_measure(shifts, measure)
    _refuse_overlap(chosen)
    values, modules = shift_matrix(chosen)
    _check_k(k, len(modules))
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
