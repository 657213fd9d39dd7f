"""On real models in which nothing differs by construction: do the tests find nothing?

    python benchmarks/real_null.py [--repeats 2000] [--out benchmarks/results] [--pairs family/generations …]

Two nulls on each pair, from shifts that were measured once:

* *labels swapped*: for every prompt a coin decides which model is called the source. A swap turns the sign of a
  prompt's shift in every module at once (the script checks this on the models themselves). Tested: the sign-flip of
  magnitudes and the cross-fitted direction.
* *one task in two*: the prompts of one task are divided at random into "task" and "control". Tested: magnitude,
  distance, own and inherited by label permutation.

Reported per repeat: whether any module was found at adjusted p ≤ 0.05 (family-wise error), and the share of modules
with p ≤ 0.05.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tables import save

from mechtransplant.pair import Pair, load_pair
from mechtransplant.shifts import measure_shifts, shift_vectors
from mechtransplant.shifts.vectors import halves
from mechtransplant.significance import label_permutation, shift_matrix, sign_flip
from mechtransplant.tasks import load_task

PROMPTS = {"family/generations": 64, "smollm2/generations": 64}
MEASURES = ("magnitude", "distance", "own", "inherited")
PERMUTATIONS, LEVEL = 999, 0.05


def check_swap(pair: Pair, shifts: pd.DataFrame, task: object, positions: str) -> float:
    """The largest deviation, over all heads and MLPs, of the exchanged pair's magnitudes from the negative ones."""
    exchanged = measure_shifts(pair.reversed(), task, measures="magnitude", positions=positions)  # type: ignore[arg-type]
    ours = shift_matrix(shifts[shifts.measure == "magnitude"])[0]
    return float(np.abs(shift_matrix(exchanged)[0] + ours).max())


def repeat_null(function, repeats: int, rng: np.random.Generator) -> dict[str, float]:
    """Family-wise error and share of small p-values over repeats of a random null."""
    any_found, small = 0, []
    for _ in range(repeats):
        found = function(rng)
        any_found += bool((found.p_max <= LEVEL).any())
        small.append(float((found.p <= LEVEL).mean()))
    return {"family_wise_error": any_found / repeats, "share_of_small_p": float(np.mean(small)), "repeats": repeats}


def nulls_of(name: str, repeats: int, seed: int = 0) -> list[dict[str, object]]:
    """Every null of one pair."""
    pair = load_pair(name)
    n = PROMPTS.get(name, 64)
    task = load_task(str(pair.default_task)).split(discover=n, choose=8, test=8, seed=seed).discover
    shifts = measure_shifts(pair, task, measures=MEASURES, positions="answer", progress=True)
    vectors = shift_vectors(pair, task, positions="answer", progress=True)
    swap = check_swap(pair, shifts, task, "answer")
    print(f"{name}: exchanging the models negates every magnitude to {swap:.1e}", flush=True)
    values = {m: shift_matrix(shifts[shifts.measure == m])[0] for m in MEASURES}
    rng = np.random.default_rng(seed)
    rows = []

    def note(null: str, measure: str, found: dict[str, float], modules: int) -> None:
        low, high = stats.binom.ppf([0.005, 0.995], repeats, LEVEL) / repeats
        base = {"pair": name, "null": null, "measure": measure, "n": n, "modules": modules}
        rows.append({**base, **found, "low": low, "high": high, "swap_deviation": swap})
        print(json.dumps(rows[-1]), flush=True)

    def swapped(rng: np.random.Generator):
        signs = rng.choice([-1.0, 1.0], (n, 1))
        return sign_flip(values["magnitude"] * signs, PERMUTATIONS, int(rng.integers(1 << 30)))

    note("labels swapped", "magnitude", repeat_null(swapped, repeats, rng), values["magnitude"].shape[1])

    grams = np.stack([vectors.gram(m) for m in vectors.modules])

    def swapped_directions(rng: np.random.Generator):
        """Projections from inner products alone: ⟨sᵢvᵢ, Σ_A sⱼvⱼ⟩ / ‖Σ_A sⱼvⱼ‖, A the half that fixes the direction."""
        signs = rng.choice([-1.0, 1.0], n)
        fit, project = halves(n, int(rng.integers(1 << 30)))
        towards = grams[:, :, fit] @ signs[fit]
        length = np.sqrt(np.maximum((towards[:, fit] * signs[fit]).sum(1), 0))[:, None]
        projections = towards[:, project] * signs[project] / np.where(length > 0, length, 1)
        return sign_flip(projections.T, PERMUTATIONS, int(rng.integers(1 << 30)))

    note("labels swapped", "projection", repeat_null(swapped_directions, repeats, rng), len(grams))
    for measure in MEASURES:

        def divided(rng: np.random.Generator, measure: str = measure):
            order = rng.permutation(n)
            one, other = values[measure][order[: n // 2]], values[measure][order[n // 2 :]]
            return label_permutation(one, other, PERMUTATIONS, int(rng.integers(1 << 30)))

        note("one task in two", measure, repeat_null(divided, repeats, rng), values[measure].shape[1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--pairs", nargs="*", default=list(PROMPTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "real_null.csv"
    kept = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["pair"])
    for name in arguments.pairs:
        if name not in set(kept.pair):
            rows = pd.DataFrame(nulls_of(name, arguments.repeats))
            kept = pd.concat([kept, rows], ignore_index=True) if len(kept) else rows
            save(kept, path, "%.6g")
    print(kept.drop(columns=["swap_deviation"]).to_string(index=False))


if __name__ == "__main__":
    main()
