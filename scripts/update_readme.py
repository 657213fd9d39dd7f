"""Write the results table and picture in README.md from the committed runs.

    python scripts/update_readme.py [--check]

The lines between the two markers come from runs/*/results.parquet and outcome.json, and from nothing else.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("family-generations", "family-instruct", "smollm2-generations", "smollm2-instruct")
BEGIN, END = "<!-- results: scripts/update_readme.py -->\n", "<!-- end of results -->\n"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def row(folder: Path) -> str:
    """One run as a row of the table."""
    saved = json.loads((folder / "outcome.json").read_text())
    budget, outcome = max(saved.items(), key=lambda item: int(item[0]))
    results = pd.read_parquet(folder / "results.parquet")
    test = results[(results.split == "test") & (results.budget == int(budget))]
    everything = int(test[test.role == "all"].k.iloc[0])
    k = len(outcome["modules"])
    controls = test[(test.role == "random") & (test.k == k) & (test.strength == outcome["strength"])]
    random = controls.accuracy
    beaten = int((random < outcome["after_accuracy"]).sum())
    tir = "undefined" if outcome["tir"] is None else f"{outcome['tir']:.2f}"
    recovery = "withheld" if outcome["recovery"] is None else f"{outcome['recovery']:.0f} %"
    cells: list[Any] = [
        f"[{folder.name}](runs/{folder.name}/summary.md)",
        *[percent(outcome[f"{role}_accuracy"]) for role in ("target", "source", "after")],
        f"{k} of {everything} ({100 * k / everything:.0f} %)",
        f"{percent(random.median())} ({percent(random.min())} – {percent(random.max())})",
        f"{beaten} of {len(random)}",
        tir,
        recovery,
        outcome["n"],
    ]
    return f"| {' | '.join(map(str, cells))} |"


def table() -> str:
    """The table of every committed run."""
    found = [ROOT / "runs" / name for name in RUNS if (ROOT / "runs" / name / "outcome.json").exists()]
    columns = "run, target, source, grafted, K, random at K: median (range), random sets beaten, TIR, Recovery, n"
    head = f"| {columns.replace(', ', ' | ')} |"
    lines = [head, "|" + "---|" * 10, *map(row, found)]
    return "\n" + "\n".join(lines) + "\n\n"


def updated(text: str) -> str:
    """README with the table as the runs have it now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if updated(text) == text else "README.md is not what the runs say: python scripts/update_readme.py")
    path.write_text(updated(text), encoding="utf-8")
    shutil.copy(ROOT / "runs" / RUNS[0] / "figures" / "k_curve.png", ROOT / "figures" / "k_curve.png")
    shifts = ROOT / "runs" / "smollm2-shifts" / "figures" / "heatmap_magnitude.png"
    shutil.copy(shifts, ROOT / "figures" / "shift_heatmap_smollm2.png")
    effects = ROOT / "runs" / "family-effects" / "figures" / "patch_versus_graft.png"
    shutil.copy(effects, ROOT / "figures" / "patch_versus_graft.png")


if __name__ == "__main__":
    main()
