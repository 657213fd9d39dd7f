"""First-order scores against the exact effect of each module: how alike they rank, and what each costs.

    python benchmarks/screens.py [--pairs family/generations …] [--out benchmarks/results]

Costs are process time in one process and thread, each rule timed on the same questions one after the other, three times
on the family and once on SmolLM2; the ratio is that of medians. All rules rank on the `discover` split; nothing is
reported on it but how the rules agree with each other.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tables import save

from mechtransplant.pair import load_pair
from mechtransplant.ranking import rank_modules
from mechtransplant.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
RULES = ("gradient", "integrated_gradient", "activation_gradient")
#: (pair, kinds, questions, repeats)
PROBLEMS = (
    ("family/generations", ("linear",), 64, 3),
    ("family/instruct", ("linear",), 64, 3),
    ("family/planted-heads-drifted", ("head", "mlp"), 64, 3),
    ("family/planted-mlps-drifted", ("head", "mlp"), 64, 3),
    ("family/planted-mixed-drifted", ("head", "mlp"), 64, 3),
    ("smollm2/generations", ("linear",), 16, 1),
    ("smollm2/generations", ("head", "mlp"), 16, 1),
    ("smollm2/instruct", ("linear",), 16, 1),
)
BATCH = 16


def compared(pair_name: str, kinds: tuple[str, ...], questions: int, repeats: int) -> pd.DataFrame:
    """One row a first-order rule: Spearman with single_swap, agreement of the top tenth, and the cost ratio."""
    pair = load_pair(pair_name)
    task = load_task(str(pair.default_task)).split(questions, 1, 1).discover
    kind = kinds[0] if len(kinds) == 1 else kinds
    seconds: dict[str, list[float]] = {}
    scores: dict[str, pd.Series] = {}
    for _ in range(repeats):
        for rule in ("single_swap", *RULES):
            started = time.process_time()
            found = rank_modules(pair, task, rule, kind, batch_size=BATCH)
            seconds.setdefault(rule, []).append(time.process_time() - started)
            scores[rule] = found.set_index(found.module.astype(str)).score
    exact = scores["single_swap"]
    tenth = max(1, len(exact) // 10)
    rows = []
    for rule in RULES:
        mine = scores[rule].reindex(exact.index)
        rho = stats.spearmanr(mine, exact)
        rows.append(
            {
                "pair": pair_name,
                "kinds": "+".join(kinds),
                "modules": len(exact),
                "questions": questions,
                "rule": rule,
                "spearman": rho.statistic,
                "top_tenth_shared": len(set(mine.nlargest(tenth).index) & set(exact.nlargest(tenth).index)) / tenth,
                "seconds": np.median(seconds[rule]),
                "single_swap_seconds": np.median(seconds["single_swap"]),
                "times_cheaper": np.median(seconds["single_swap"]) / np.median(seconds[rule]),
            }
        )
        print({k: (round(v, 3) if isinstance(v, float) else v) for k, v in rows[-1].items()}, flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", help="only these pairs; the others' rows are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "screens.csv"
    done = pd.read_csv(path) if path.exists() else pd.DataFrame()
    for name, kinds, questions, repeats in PROBLEMS:
        if options.pairs and name not in options.pairs:
            continue
        rows = compared(name, kinds, questions, repeats)
        if len(done):
            done = done[(done.pair != name) | (done.kinds != "+".join(kinds))]
        done = pd.concat([done, rows], ignore_index=True)
        # after every problem: a run that is cut short keeps what it has
        save(done, path, "%.6g")


if __name__ == "__main__":
    main()
