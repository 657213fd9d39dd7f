"""On planted pairs the right answer is known: what do the tests find, and is what they find planted?

    python benchmarks/power.py [--repeats 20] [--out benchmarks/results]

Every pair is measured once, on a pool of held-out questions of its task and of the skills that both models have (the
control). Each repeat draws n of either. Tests: sign-flip of magnitudes, the cross-fitted direction, and task against
control for every measure; adjusted by max-T over all heads and MLPs. Reported, as means over repeats: the share of
planted modules found, the share of findings that are planted (over repeats that found any), how many were found, and
the area under the ROC curve when modules are simply ordered by the measure's mean (0.5 is chance).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from tables import save

from mechtransplant.pair import Pair, load_pair
from mechtransplant.shifts import measure_shifts, shift_vectors
from mechtransplant.shifts.vectors import halves
from mechtransplant.significance import label_permutation, shift_matrix, sign_flip
from mechtransplant.tasks import Task, load_task
from mechtransplant.weights import list_pairs

POOL, PROMPTS = 640, (16, 64, 256)
MEASURES = ("magnitude", "distance", "own", "inherited")
CONTROL_SKILLS = ("addition", "reverse", "sort", "copy", "max")
LEVEL, PERMUTATIONS = 0.05, 1999


def control_task(n: int) -> Task:
    """Questions of the skills that both models have, an equal share of each."""
    each = [load_task(name, -(-n // len(CONTROL_SKILLS)), seed=3).examples for name in CONTROL_SKILLS]
    return Task("known-skills", tuple(e for group in zip(*each, strict=True) for e in group)[:n])


def auroc(scores: np.ndarray, planted: np.ndarray) -> float:
    """Probability that a planted module has a higher score than another one; ties count half."""
    inside, outside = scores[planted], scores[~planted]
    return float(((inside[:, None] > outside).mean() + (inside[:, None] >= outside).mean()) / 2)


def powers_of(name: str, repeats: int) -> list[dict[str, object]]:
    """Every test, measure and number of prompts on one pair."""
    pair: Pair = load_pair(name)
    task, other = load_task(str(pair.default_task), POOL, seed=3), control_task(POOL)
    shifts, control = (measure_shifts(pair, t, measures=MEASURES, positions="answer") for t in (task, other))
    vectors = shift_vectors(pair, task, positions="answer")
    values = {m: shift_matrix(shifts[shifts.measure == m]) for m in MEASURES}
    others = {m: shift_matrix(control[control.measure == m])[0] for m in MEASURES}
    modules = values["magnitude"][1]
    grams = np.stack([vectors.gram(m) for m in modules])
    planted = np.isin(modules, pair.planted)
    rows = []
    for n in PROMPTS:
        found: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
        for repeat in range(repeats):
            rng = np.random.default_rng([n, repeat])
            mine, theirs = (rng.choice(POOL, n, replace=False) for _ in range(2))
            seed = int(rng.integers(1 << 30))
            tests = {("magnitude", "sign-flip"): sign_flip(values["magnitude"][0][mine], PERMUTATIONS, seed)}
            fit, project = (mine[half] for half in halves(n, seed))
            towards = grams[:, project][:, :, fit].sum(2)
            length = np.sqrt(np.maximum(grams[:, fit][:, :, fit].sum((1, 2)), 0))[:, None]
            projections = (towards / np.where(length > 0, length, 1)).T
            tests["projection", "direction"] = sign_flip(projections, PERMUTATIONS, seed)
            for measure in MEASURES:
                tests[measure, "control"] = label_permutation(
                    values[measure][0][mine], others[measure][theirs], PERMUTATIONS, seed
                )
            for (measure, test), result in tests.items():
                chosen = result.p_max <= LEVEL
                if measure == "projection":
                    score = projections.mean(0)
                elif test == "control":
                    score = np.abs(result.statistic)
                else:
                    score = np.abs(values[measure][0][mine].mean(0))
                precision = float(planted[chosen].mean()) if chosen.any() else np.nan
                found.setdefault((measure, test), []).append(
                    (float(chosen[planted].mean()), precision, float(chosen.sum()), auroc(score, planted))
                )
            # no test: modules ordered by how large the measure is
            for measure in ("distance", "own", "inherited"):
                score = values[measure][0][mine].mean(0)
                found.setdefault((measure, "none"), []).append((np.nan, np.nan, np.nan, auroc(score, planted)))
        for (measure, test), each in found.items():
            columns = np.array(each)
            with np.errstate(invalid="ignore"):
                means = [float(np.nanmean(c)) if np.isfinite(c).any() else np.nan for c in columns.T]
            rows.append(
                {
                    "pair": name, "modules": len(modules), "planted": int(planted.sum()), "n": n, "measure": measure,
                    "test": test, "planted_found": means[0], "found_planted": means[1], "found": means[2],
                    "auroc": means[3], "auroc_sd": float(columns[:, 3].std()), "repeats": repeats,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "power.csv"
    rows = []
    for name in (n for n in list_pairs() if n.startswith("family/planted")):
        rows += powers_of(name, arguments.repeats)
        print(name, flush=True)
    frame = pd.DataFrame(rows)
    save(frame, path, "%.4g")
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
