"""How concentrated the shift is in few modules: Gini index, effective number, top-k share, Lorenz curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError
from mechtransplant.localization.resampling import check_k, check_resampling, jackknife, refuse_overlap
from mechtransplant.significance.table import one_measure, shift_matrix

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def shares(shifts: pd.DataFrame, measure: str | None = None) -> tuple[Floats, list[str]]:
    """Every module's share of a prompt's whole shift (absolute values), shape (prompts, modules), and the modules.

    A prompt without any shift has no shares and is left out. Raises UsageError where none has any, or values are
    missing.
    """
    chosen = one_measure(shifts, measure)
    refuse_overlap(chosen.kind if "kind" in chosen else ())
    values, modules = shift_matrix(chosen)
    if np.isnan(values).any():
        raise UsageError("some modules lack values on some prompts: shares need every module on every prompt")
    sizes = np.abs(values)
    totals = sizes.sum(1, keepdims=True)
    if not (totals > 0).any():
        raise UsageError("no module shifts on any prompt: there is nothing to localise")
    kept = totals[:, 0] > 0
    return sizes[kept] / totals[kept], modules


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

    check_resampling(level, seed, permutations=permutations)
    each, modules = shares(shifts, measure)
    check_k(k, len(modules))
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
        corrected, low, high = np.clip(jackknife(value, function(without), level), *bounds)
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


def lorenz_curve(
    shifts: pd.DataFrame, measure: str | None = None, permutations: int = 999, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """The Lorenz curve of localisation: modules from the largest mean share down, and what they hold together.

    Returns:
        columns rank, module, share, cumulative, null, null_low, null_high (of the cumulative share under the null of
        :func:`concentration`).
    """
    import pandas as pd

    check_resampling(level, seed, permutations=permutations)
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
