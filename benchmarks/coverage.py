"""How often do 95 % intervals of paired accuracies hold the truth? Several methods, on simulated answers.

    python benchmarks/coverage.py [--sets 2000] [--out benchmarks/results]

Target, source and grafted model answer the same n questions. A question has a difficulty that all three share, as far
as ``OVERLAP`` says (one-factor Gaussian copula), which gives the probabilities of the eight outcomes; a data set is one
multinomial draw. Quantities: difference (after − target), gap (source − target), TIR (after / target; only data sets
in which the target has a right answer), Recovery (only data sets in which the method's own interval of the gap does
not cover 0, as Recovery is withheld otherwise; ``reported`` is their share). TIR's upper end can be unbounded.

Methods: percentile bootstrap; BCa (Efron 1987); Dirichlet (Bayesian bootstrap with a prior of 1/8 a cell); bootstrap of
counts to each of which 1/4 was added; MOVER (Newcombe's 1998 method 10 for differences; its Wilson limits combined for
the ratio and its limits of differences for Recovery, as Donner and Zou 2012 combine them); Fieller with a t quantile;
and the score intervals of ``mechtransplant.significance.paired``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
from scipy import stats
from tables import save

from mechtransplant.significance.paired import (
    AFTER,
    ONE,
    OUTCOMES,
    SOURCE,
    TARGET,
    difference_intervals,
    ratio_intervals,
    recovery_intervals,
)

SIZES = (25, 50, 100, 256, 512)
TARGETS, SOURCES = (0.02, 0.1, 0.35, 0.65), (0.75, 0.99)
#: how far the graft goes from the target's accuracy to the source's
RECOVERED = (0.0, 0.5, 0.9)
#: correlation of the models' answers, before they are cut into right and wrong
OVERLAP = (0.2, 0.95)
LEVEL = 0.95
SEED = 20
#: with (resamples + 1) · 2.5 % a whole number, the percentiles are order statistics
RESAMPLES = 199
PRIOR, ADDED = 1 / 8, 1 / 4
#: settings with fewer data sets that report a quantity are left out of the summary
FEW = 100
#: the methods that the package uses
CHOSEN = {
    "difference": "score",
    "gap": "score",
    "TIR": "score, corrected",
    "Recovery": "score",
}

Floats = np.ndarray
Intervals = tuple[Floats, Floats]
Z = float(stats.norm.ppf((1 + LEVEL) / 2))
#: quantity → weights u, v of θ = (u·p)/(v·p), and the angles between which arctan θ lies
QUANTITIES: dict[str, tuple[Floats, Floats, tuple[float, float]]] = {
    "difference": (AFTER - TARGET, ONE, (-np.pi / 4, np.pi / 4)),
    "gap": (SOURCE - TARGET, ONE, (-np.pi / 4, np.pi / 4)),
    "TIR": (AFTER, TARGET, (0.0, np.pi / 2)),
    "Recovery": (AFTER - TARGET, SOURCE - TARGET, (-np.pi / 2, np.pi / 2)),
}


def probabilities(accuracies: tuple[float, float, float], overlap: float) -> Floats:
    """Of the eight outcomes, for three accuracies and the correlation of what makes questions hard."""
    factor = np.linspace(-8, 8, 4001)
    weight = stats.norm.pdf(factor)
    right = [stats.norm.cdf((stats.norm.ppf(p) - np.sqrt(overlap) * factor) / np.sqrt(1 - overlap)) for p in accuracies]
    cells = np.array(
        [
            (weight * np.prod([r if yes else 1 - r for r, yes in zip(right, row, strict=True)], axis=0)).sum()
            for row in OUTCOMES
        ]
    )
    return cells / cells.sum()


# --- bootstraps: the values of every quantity in every resample -----------------------------------------------------


def resampled(draws: Floats) -> dict[str, Floats]:
    """Each quantity of resampled counts, shape (tables, resamples, 8); NaN where Recovery is 0/0 or x/0."""
    target, source, after = (draws @ column for column in (TARGET, SOURCE, AFTER))
    total = draws[0, 0].sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(target > 0, after / target, np.inf)
        recovery = np.where(source != target, (after - target) / (source - target), np.nan)
    return {
        "difference": (after - target) / total,
        "gap": (source - target) / total,
        "TIR": ratio,
        "Recovery": recovery,
    }


def quantiles(values: Floats, low: Floats | float, high: Floats | float) -> Intervals:
    """Order statistics of each row, of those that are not NaN (which sort last); the whole line where all are."""
    values = np.sort(values, axis=1)
    known = (~np.isnan(values)).sum(1)
    rows = np.arange(len(values))

    def at(share: Floats | float) -> Floats:
        rank = np.rint(np.asarray(share) * (known + 1)).astype(int) - 1
        return values[rows, np.clip(rank, 0, np.maximum(known - 1, 0))]

    first, last = at(low), at(high)
    return np.where(known == 0, -np.inf, first), np.where(known == 0, np.inf, last)


def percentile(values: Floats) -> Intervals:
    return quantiles(values, (1 - LEVEL) / 2, (1 + LEVEL) / 2)


def bca(values: Floats, counts: Floats, top: Floats, bottom: Floats) -> Intervals:
    """Bias-corrected and accelerated; the acceleration by the jackknife, which leaves out one question of each kind."""
    a, b = (counts @ top)[:, None], (counts @ bottom)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = a / b
        left = np.where(counts > 0, (a - top) / (b - bottom), np.nan)
        usable = np.isfinite(left) * counts
        left = np.where(usable > 0, left, 0)
        deviation = np.where(usable > 0, (usable * left).sum(1, keepdims=True) / usable.sum(1, keepdims=True) - left, 0)
        skew, spread = (usable * deviation**3).sum(1), (usable * deviation**2).sum(1)
        acceleration = np.where(spread > 0, skew / (6 * spread**1.5), 0)
        known = (~np.isnan(values)).sum(1)
        below = ((values < estimate).sum(1) + (values == estimate).sum(1) / 2 + 0.5) / (known + 1)
        bias = stats.norm.ppf(below)
        ends = [stats.norm.cdf(bias + (bias + z) / np.maximum(1 - acceleration * (bias + z), 1e-3)) for z in (-Z, Z)]
    low, high = (np.where(np.isfinite(e), e, (1 + s * LEVEL) / 2) for e, s in zip(ends, (-1, 1), strict=True))
    return quantiles(values, low, high)


# --- intervals by inverting a test ----------------------------------------------------------------------------------


def inverted(
    accepted: Callable[[Floats, Floats], Floats], counts: Floats, top: Floats, bottom: Floats, span: tuple[float, float]
) -> Intervals:
    """The ends between which every θ = tan(angle) is accepted; unbounded where the end of the span is."""
    u, v = counts @ top, counts @ bottom
    start = np.clip(np.arctan2(np.sign(v + (v == 0)) * u, np.abs(v)), *span)
    ends = []
    for limit in span:
        inside, outside = start.copy(), np.full(len(counts), limit)
        inside = np.where(accepted(np.cos(outside), np.sin(outside)), outside, inside)
        for _ in range(40):
            middle = (inside + outside) / 2
            good = accepted(np.cos(middle), np.sin(middle))
            inside, outside = np.where(good, middle, inside), np.where(good, outside, middle)
        ends.append(np.where(np.abs(inside) == np.pi / 2, np.copysign(np.inf, inside), np.tan(inside)))
    return ends[0], ends[1]


def wilson(successes: Floats, n: float) -> Intervals:
    middle = (successes + Z**2 / 2) / (n + Z**2)
    half = Z * np.sqrt(successes * (n - successes) / n + Z**2 / 4) / (n + Z**2)
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def phi(counts: Floats, first: Floats, second: Floats) -> Floats:
    """Correlation of two models' answers, as Newcombe's method 10 corrects it."""
    n = counts.sum(1)
    a, b = counts @ (first * second), counts @ (first * (1 - second))
    c, d = counts @ ((1 - first) * second), counts @ ((1 - first) * (1 - second))
    product = a * d - b * c
    product = np.where(product > 0, np.maximum(product - n / 2, 0), product)
    scale = np.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    return np.where(scale > 0, product / np.where(scale > 0, scale, 1), 0)


def newcombe(counts: Floats, before: Floats, after: Floats) -> Intervals:
    """Newcombe's method 10 for after − before."""
    n = counts.sum(1)
    p, q = counts @ after / n, counts @ before / n
    (p_low, p_high), (q_low, q_high) = wilson(n * p, n), wilson(n * q, n)
    r = phi(counts, before, after)
    below = (p - p_low) ** 2 - 2 * r * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (p_high - p) ** 2 - 2 * r * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    return p - q - np.sqrt(np.maximum(below, 0)), p - q + np.sqrt(np.maximum(above, 0))


def mover(counts: Floats, quantity: str) -> Intervals:
    """For a ratio X / Y: every θ for which the MOVER interval of X − θY, from those of X and of Y, covers 0."""
    if quantity in ("difference", "gap"):
        return newcombe(counts, TARGET, AFTER if quantity == "difference" else SOURCE)
    top, bottom, span = QUANTITIES[quantity]
    n = counts.sum(1)
    x, y = counts @ top / n, counts @ bottom / n
    if quantity == "TIR":
        (x_low, x_high), (y_low, y_high) = wilson(n * x, n), wilson(n * y, n)
        r = phi(counts, TARGET, AFTER)
    else:
        (x_low, x_high), (y_low, y_high) = newcombe(counts, TARGET, AFTER), newcombe(counts, TARGET, SOURCE)
        spread = np.sqrt((counts @ top**2 / n - x**2) * (counts @ bottom**2 / n - y**2))
        r = np.where(spread > 0, (counts @ (top * bottom) / n - x * y) / np.where(spread > 0, spread, 1), 0)

    def accepted(cos: Floats, sin: Floats) -> Floats:
        # the contrast cos · x − sin · y; a negative weight exchanges the ends
        mean = cos * x - sin * y
        below = cos * (x - x_low), -sin * np.where(sin > 0, y_high - y, y - y_low)
        above = cos * (x_high - x), -sin * np.where(sin > 0, y - y_low, y_high - y)
        down = below[0] ** 2 + below[1] ** 2 + 2 * r * below[0] * below[1]
        up = above[0] ** 2 + above[1] ** 2 + 2 * r * above[0] * above[1]
        return np.where(mean > 0, mean**2 <= down, mean**2 <= up)

    return inverted(accepted, counts, top, bottom, span)


def fieller(counts: Floats, quantity: str) -> Intervals:
    """Every θ whose contrast has a mean within t standard errors of 0 (for a difference: Student's interval)."""
    top, bottom, span = QUANTITIES[quantity]
    n = counts.sum(1)
    x, y = counts @ top / n, counts @ bottom / n
    xx, xy, yy = (counts @ product / n for product in (top**2, top * bottom, bottom**2))
    critical = stats.t.ppf((1 + LEVEL) / 2, n - 1) ** 2 / (n - 1)

    def accepted(cos: Floats, sin: Floats) -> Floats:
        mean = cos * x - sin * y
        return mean**2 <= critical * (cos**2 * xx - 2 * cos * sin * xy + sin**2 * yy - mean**2)

    return inverted(accepted, counts, top, bottom, span)


def once(compute: Callable[[Floats], Intervals], counts: Floats, first: Floats, second: Floats) -> Intervals:
    """Intervals that depend on two models alone, computed once for equal 2 × 2 tables."""
    pairs = counts @ np.stack([first * second, first * (1 - second), (1 - first) * second], axis=1)
    _, at, each = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    low, high = compute(counts[at])
    return low[each.ravel()], high[each.ravel()]


def all_intervals(counts: Floats, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Intervals]]]:
    """Each method with its interval of each quantity, for tables of one n, shape (tables, 8)."""
    n = int(counts[0].sum())
    shares = counts / n
    values = resampled(rng.multinomial(n, shares[:, None, :], size=(len(counts), RESAMPLES)).astype(np.float64))
    yield "percentile bootstrap", {q: percentile(values[q]) for q in QUANTITIES}
    yield "BCa bootstrap", {q: bca(values[q], counts, u, v) for q, (u, v, _) in QUANTITIES.items()}
    drawn = rng.standard_gamma((counts + PRIOR)[:, None, :], size=(len(counts), RESAMPLES, 8))
    values = resampled(drawn / drawn.sum(2, keepdims=True))
    yield "Dirichlet, prior 1/8", {q: percentile(values[q]) for q in QUANTITIES}
    shares = (counts + ADDED) / (n + 8 * ADDED)
    values = resampled(rng.multinomial(n, shares[:, None, :], size=(len(counts), RESAMPLES)).astype(np.float64))
    yield "bootstrap, 1/4 added", {q: percentile(values[q]) for q in QUANTITIES}
    yield "MOVER-Wilson", {q: mover(counts, q) for q in QUANTITIES}
    yield "Fieller, t", {q: fieller(counts, q) for q in QUANTITIES}
    yield (
        "score",
        {
            "difference": once(lambda c: difference_intervals(c, TARGET, AFTER, LEVEL), counts, TARGET, AFTER),
            "gap": once(lambda c: difference_intervals(c, TARGET, SOURCE, LEVEL), counts, TARGET, SOURCE),
            "TIR": once(lambda c: ratio_intervals(c, LEVEL, corrected=False), counts, TARGET, AFTER),
            "Recovery": recovery_intervals(counts, LEVEL),
        },
    )
    yield "score, corrected", {"TIR": once(lambda c: ratio_intervals(c, LEVEL), counts, TARGET, AFTER)}


def setting(n: int, accuracies: tuple[float, float, float], overlap: float, sets: int, seed: list[int]) -> list[dict]:
    """Rows of one setting: for each quantity and method coverage and width over the data sets that report it."""
    rng = np.random.default_rng(seed)
    p = probabilities(accuracies, overlap)
    drawn = rng.multinomial(n, p, size=sets).astype(float)
    # equal tables have equal intervals
    counts, each = np.unique(drawn, axis=0, return_inverse=True)
    each = each.ravel()
    rows = []
    for method, intervals in all_intervals(counts, rng):
        for quantity, (low, high) in intervals.items():
            top, bottom, _ = QUANTITIES[quantity]
            truth = float(p @ top / (p @ bottom))
            if quantity == "TIR":
                used = drawn @ TARGET > 0
            elif quantity == "Recovery":
                gap_low, gap_high = intervals["gap"]
                used = ~((gap_low <= 0) & (gap_high >= 0))[each]
            else:
                used = np.ones(sets, bool)
            first, last = low[each][used], high[each][used]
            # an end that is the truth but for rounding holds it
            hit = (first <= truth + 1e-9) & (truth - 1e-9 <= last)
            width = (last - first) * (100 if quantity == "Recovery" else 1)
            bounded = np.isfinite(width)
            reported = int(used.sum())
            rows.append(
                {
                    "quantity": quantity, "method": method, "n": n, "target": accuracies[0], "source": accuracies[1],
                    "after": accuracies[2], "overlap": overlap, "reported": reported / sets, "sets": reported,
                    "coverage": hit.mean() if reported else np.nan,
                    "lowest": stats.binom.ppf(0.005, reported, LEVEL) / max(reported, 1),
                    "mean_width": width[bounded].mean() if bounded.any() else np.nan,
                    "median_width": np.median(width) if reported else np.nan,
                    "unbounded": 1 - bounded.mean() if reported else np.nan,
                }
            )  # fmt: skip
    return rows


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """For each quantity, method and n, over the settings: mean and worst coverage, how many are below their band."""
    # settings that hardly any data set reports say nothing of their own
    rows = rows[rows.sets >= FEW]
    named = rows.assign(
        below=rows.coverage < rows.lowest,
        setting=[
            f"target {r.target:.0%}, source {r.source:.0%}, after {r.after:.1%}, overlap {r.overlap:g}"
            for r in rows.itertuples()
        ],
    )
    table = []
    for (quantity, method, n), here in named.groupby(["quantity", "method", "n"], sort=False):
        worst = here.loc[here.coverage.idxmin()]
        table.append(
            {
                "quantity": quantity, "method": method, "chosen": method == CHOSEN[quantity], "n": n,
                "settings": len(here), "coverage": here.coverage.mean(), "worst": worst.coverage,
                "worst_setting": worst.setting, "worst_sets": worst.sets, "below": int(here.below.sum()),
                "band": here.lowest.max(), "reported": here.reported.mean(),
                "mean_width": here.mean_width.median(), "median_width": here.median_width.median(),
                "unbounded": here.unbounded.mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(table)


def write(rows: pd.DataFrame, sets: int, out: Path) -> pd.DataFrame:
    """The summary of every method, the settings of the chosen ones, and how they were made."""
    found = summary(rows)
    save(found, out / "coverage.csv", "%.4g")
    chosen = rows[rows.method == rows.quantity.map(CHOSEN)]
    save(chosen, out / "coverage_settings.csv", "%.4g")
    about = {
        "command": "python benchmarks/coverage.py",
        "sets": sets,
        "seed": SEED,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "few": FEW,
        "sizes": SIZES,
        "targets": TARGETS,
        "sources": SOURCES,
        "recovered": RECOVERED,
        "overlap": OVERLAP,
        "chosen": CHOSEN,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "pandas")},
    }
    (out / "coverage.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in SIZES:
        print(f"n = {n}", flush=True)
        for at, (t, s, f, overlap) in enumerate(itertools.product(TARGETS, SOURCES, RECOVERED, OVERLAP)):
            accuracies = (t, s, round(t + f * (s - t), 4))
            rows += setting(n, accuracies, overlap, arguments.sets, [SEED, n, at])
    found = write(pd.DataFrame(rows), arguments.sets, arguments.out)
    print(found.drop(columns="worst_setting").round(3).to_string(index=False))


if __name__ == "__main__":
    main()
