"""Do the tests keep what they promise? Error rates on data sets in which nothing differs, or a known part does.

    python benchmarks/calibration.py [--sets 2000] [--out benchmarks/results]

Every data set has correlated modules (a factor that all share, and one per group of ten). Shapes of the shifts:
gaussian; heavy (Student's t with 3 degrees of freedom, the scale of a prompt shared by its modules); skewed (centred
exponential). A cell of the table is one test, shape and number of prompts. Written cells are kept: started again, it
goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
from scipy import stats
from tables import note

from mechtransplant.localization import concentration, consistency, effective_number, gini, top_share
from mechtransplant.shifts.vectors import halves, projected
from mechtransplant.significance import (
    adjust,
    label_permutation,
    one_sample_effects,
    sign_flip,
    two_sample_effects,
)

MODULES, AFFECTED, EFFECT = 60, 12, 1.0
PROMPTS = (8, 16, 32, 64, 128, 256)
SHAPES = ("gaussian", "heavy", "skewed")
PERMUTATIONS = 999
LEVEL = 0.05
Floats = np.ndarray


def draws(rng: np.random.Generator, shape: str, prompts: int, modules: int = MODULES) -> Floats:
    """Shifts with mean 0, shape (prompts, modules): a third of the variance is shared by all, a third by tens."""

    def noise(columns: int) -> Floats:
        if shape == "skewed":
            return rng.exponential(size=(prompts, columns)) - 1
        return rng.normal(size=(prompts, columns))

    groups = -(-modules // 10)
    x = noise(1) + np.repeat(noise(groups), 10, axis=1)[:, :modules] + noise(modules)
    if shape == "heavy":
        x /= np.sqrt(rng.chisquare(3, size=(prompts, 1)) / 3)
    return x / np.sqrt(3)


# --- what is tested: (name, function of a generator, shape, prompts and an effect on the first modules → Permuted) ---


def by_sign_flip(rng: np.random.Generator, shape: str, prompts: int, effect: Floats):
    return sign_flip(draws(rng, shape, prompts) + effect, PERMUTATIONS, int(rng.integers(1 << 30)))


def by_control(rng: np.random.Generator, shape: str, prompts: int, effect: Floats):
    """Task and control prompts from one distribution, as many of each."""
    task, control = draws(rng, shape, prompts) + effect * np.sqrt(2), draws(rng, shape, prompts)
    return label_permutation(task, control, PERMUTATIONS, int(rng.integers(1 << 30)))


def by_matched(rng: np.random.Generator, shape: str, prompts: int, effect: Floats):
    """Pairs of a task and a control prompt that share half of their variance."""
    shared = draws(rng, shape, prompts)
    task, control = shared + draws(rng, shape, prompts) + effect * np.sqrt(2), shared + draws(rng, shape, prompts)
    return sign_flip(task - control, PERMUTATIONS, int(rng.integers(1 << 30)))


def by_direction(rng: np.random.Generator, shape: str, prompts: int, effect: Floats, width: int = 8):
    """Vectors of eight numbers; a module's direction is fixed by half of the prompts and tested on the other half."""
    each = np.stack([draws(rng, shape, prompts) for _ in range(width)], axis=2)
    each[:, :, 0] += effect * np.sqrt(2)
    fit, project = halves(prompts, int(rng.integers(1 << 30)))
    values = np.stack([projected(each[:, m], fit, project) for m in range(MODULES)], axis=1)
    return sign_flip(values[project], PERMUTATIONS, int(rng.integers(1 << 30)))


TESTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    # name → (function, shapes for which it is valid)
    "sign-flip": (by_sign_flip, ("gaussian", "heavy")),
    "control": (by_control, SHAPES),
    "matched": (by_matched, SHAPES),
    "direction": (by_direction, ("gaussian", "heavy")),
}


def error_rates(test: str, shape: str, prompts: int, sets: int) -> list[dict[str, object]]:
    """Family-wise error of every correction under the null, uniformity of p, false-discovery rates beside effects."""
    function, valid = TESTS[test]
    rng = np.random.default_rng([list(TESTS).index(test), SHAPES.index(shape), prompts])
    wrong = {name: 0 for name in ("max-t", "max-t-step-down", "holm", "bh", "by")}
    first = np.empty(sets)
    proportions: dict[str, list[float]] = {"bh": [], "by": []}
    found: dict[str, list[float]] = {"bh": [], "by": [], "max-t": []}
    effect = np.zeros(MODULES)
    # one in each group of ten, and then again
    effect[np.r_[0:MODULES:10, 5:MODULES:10]] = EFFECT
    affected = effect > 0
    for at in range(sets):
        null = function(rng, shape, prompts, np.zeros(MODULES))
        # p moves in steps of one permutation; within a step it is spread evenly, or no test of uniformity could hold
        steps = null.permutations + (not null.exact)
        first[at] = null.p[at % MODULES] - rng.random() / steps
        adjusted = {"max-t": null.p_max, "max-t-step-down": null.p_step_down}
        adjusted |= {name: adjust(null.p, name) for name in ("holm", "bh", "by")}
        for name, p in adjusted.items():
            wrong[name] += bool((p <= LEVEL).any())
        mixed = function(rng, shape, prompts, effect)
        for name in ("bh", "by"):
            chosen = adjust(mixed.p, name) <= LEVEL
            proportions[name].append(float((chosen & ~affected).sum() / max(chosen.sum(), 1)))
            found[name].append(float(chosen[affected].mean()))
        found["max-t"].append(float((mixed.p_max <= LEVEL)[affected].mean()))
    low, high = stats.binom.ppf([0.005, 0.995], sets, LEVEL) / sets
    base = {"test": test, "shape": shape, "prompts": prompts, "sets": sets, "valid": shape in valid}
    rows = [
        {
            **base, "rate": "family-wise error", "correction": name, "value": count / sets, "nominal": LEVEL,
            "low": low, "high": high, "power": np.mean(found[name]) if name == "max-t" else np.nan,
        }
        for name, count in wrong.items()
    ]  # fmt: skip
    for name, values in proportions.items():
        error = float(np.std(values) / np.sqrt(sets))
        rows.append(
            {
                **base, "rate": "false-discovery rate", "correction": name, "value": float(np.mean(values)),
                "nominal": LEVEL * (1 - affected.mean()), "low": 0.0, "high": LEVEL + 2.576 * error,
                "power": float(np.mean(found[name])),
            }
        )  # fmt: skip
    uniform = stats.kstest(first, "uniform")
    rows.append(
        {
            **base, "rate": "uniform p (KS)", "correction": "none", "value": float(uniform.pvalue), "nominal": np.nan,
            "low": 0.01, "high": 1.0, "power": np.nan,
        }
    )  # fmt: skip
    return rows


def coverage(shape: str, prompts: int, sets: int) -> list[dict[str, object]]:
    """How often the 95 % intervals hold the truth: the mean (0.5 here), Cohen's d, and the difference of two groups."""
    rng = np.random.default_rng([9, SHAPES.index(shape), prompts])
    # one module a set: sets are what is counted
    hits = {"mean": 0.0, "size": 0.0, "difference": 0.0}
    reference = draws(np.random.default_rng(1), shape, 400_000, 1)
    size = 0.5 / reference.std()
    per = 50
    for at in range(sets // per):
        one = np.hstack([draws(rng, shape, prompts, 1) for _ in range(per)]) + 0.5
        found = one_sample_effects(one, resamples=1000, seed=at)
        hits["mean"] += ((found.low <= 0.5) & (found.high >= 0.5)).sum()
        hits["size"] += ((found.size_low <= size) & (found.size_high >= size)).sum()
        other = np.hstack([draws(rng, shape, prompts, 1) for _ in range(per)])
        found = two_sample_effects(one, other, resamples=1000, seed=at)
        hits["difference"] += ((found.low <= 0.5) & (found.high >= 0.5)).sum()
    total = sets // per * per
    return [
        {"interval": name, "shape": shape, "prompts": prompts, "sets": total, "coverage": count / total}
        for name, count in hits.items()
    ]


def localization_coverage(shape: str, prompts: int, sets: int) -> list[dict[str, object]]:
    """How often the 95 % intervals of alignment and of concentration hold the truth (30 modules; vectors of 16)."""
    rng = np.random.default_rng([8, SHAPES.index(shape), prompts])
    sizes = np.random.default_rng(1).gamma(1.0, size=30)

    def shifts(n: int) -> Floats:
        return sizes * np.abs(draws(rng, shape, n, 30))

    many = shifts(200_000)
    mean = (many / many.sum(1, keepdims=True)).mean(0)
    truth = {"gini": gini(mean), "effective_number": effective_number(mean), "top_k_share": top_share(mean, 3)}
    hits = dict.fromkeys(truth, 0)
    aligned = []
    for at in range(sets):
        frame = pd.DataFrame(
            {
                "module": np.tile([f"m{i}" for i in range(30)], prompts),
                "prompt": np.repeat(np.arange(prompts), 30),
                "measure": "own",
                "value": shifts(prompts).ravel(),
            }
        )
        table = concentration(frame, k=3, permutations=1, seed=at).set_index("statistic")
        for name, value in truth.items():
            hits[name] += bool(table.low[name] <= value <= table.high[name])
        vectors = Vectors(draws(rng, shape, prompts, 16) + 0.3)
        aligned.append(consistency(frame[frame.module == "m0"].assign(measure="magnitude"), vectors, flips=1))
    each = pd.concat(aligned)
    inside = (each.alignment_low <= each.alignment.mean()) & (each.alignment.mean() <= each.alignment_high)
    counts = {**hits, "alignment": int(inside.sum())}
    return [
        {"interval": name, "shape": shape, "prompts": prompts, "sets": sets, "coverage": count / sets}
        for name, count in counts.items()
    ]


@dataclass
class Vectors:
    """One module's shift vectors, as :func:`consistency` reads them."""

    vectors: Floats
    modules: tuple[str, ...] = ("m0",)

    def gram(self, module: str) -> Floats:
        return self.vectors @ self.vectors.T

    def alignment(self, module: str) -> Floats:
        others = self.vectors.sum(0) - self.vectors
        lengths = np.linalg.norm(self.vectors, axis=1) * np.linalg.norm(others, axis=1)
        return (self.vectors * others).sum(1) / lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rates_at, coverage_at = (arguments.out / f"calibration_{name}.csv" for name in ("rates", "coverage"))
    sets = arguments.sets
    jobs = [(t, s, n) for n in PROMPTS for t in TESTS for s in SHAPES]
    _resume(rates_at, jobs, ("test", "shape", "prompts"), sets, lambda *job: error_rates(*job, sets))
    _resume(
        coverage_at,
        [(s, n) for n in PROMPTS for s in SHAPES],
        ("shape", "prompts"),
        sets,
        lambda *job: coverage(*job, sets) + localization_coverage(*job, sets // 4),
    )
    print(summary(pd.read_csv(rates_at), pd.read_csv(coverage_at)))


def _resume(path: Path, jobs: list, keys: tuple[str, ...], sets: int, compute: Callable) -> None:
    done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(keys))
    if len(done) and sets not in set(done.sets):
        raise SystemExit(f"{path} holds cells of other numbers of sets: remove it, or choose another --out")
    finished = set(done[list(keys)].itertuples(index=False, name=None))
    for job in jobs:
        if job in finished:
            continue
        print(*job, flush=True)
        rows = pd.DataFrame(compute(*job))
        rows.to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.6g")
        note(path)


def summary(rates: pd.DataFrame, covered: pd.DataFrame) -> str:
    """Which cells are outside what is promised, and the known failures."""
    lines = []
    for rate in ("family-wise error", "false-discovery rate", "uniform p (KS)"):
        rows = rates[(rates.rate == rate) & rates.valid]
        if rate == "family-wise error":
            # Holm, BH and BY may be below: they are bounds
            exact = rows.correction.isin(["max-t", "max-t-step-down"])
            out = rows[(rows.value > rows.high) | (exact & (rows.value < rows.low))]
        else:
            out = rows[(rows.value > rows.high) | (rows.value < rows.low)]
        lines.append(f"{rate}: {len(out)} of {len(rows)} valid cells outside their bounds")
        if len(out):
            lines.append(out[["test", "shape", "prompts", "correction", "value", "low", "high"]].to_string(index=False))
    broken = rates[(rates.rate == "family-wise error") & ~rates.valid & (rates.correction == "max-t")]
    lines.append("known failures, family-wise error by max-T at 0.05:")
    lines.append(broken.pivot(index=["test", "shape"], columns="prompts", values="value").to_string())
    lines.append("coverage of 95 % intervals:")
    lines.append(covered.pivot(index=["interval", "shape"], columns="prompts", values="coverage").to_string())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
