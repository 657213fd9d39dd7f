"""Write the results table in README.md from the committed runs.

    python scripts/update_readme.py [--check]

The lines between the two markers come from runs/*/rules.csv and results.parquet, and from nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from mechtransplant.evaluation.outcome import FEW

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("family-generations", "family-instruct", "smollm2-generations", "smollm2-instruct")
BEGIN, END = "<!-- results: scripts/update_readme.py -->\n", "<!-- end of results -->\n"


#: rules that search sets of modules: the ceiling, not a training-free rule
SEARCHES = ("greedy", "mask")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def shown(folder: Path) -> list[str]:
    """The rules in the table: the headline (the paper's), the best other one that was controlled, and greedy search.

    Accuracy on `choose` at each rule's own K decides, then log-probability there: what is reported decides nothing.
    Controlled are the rules that the config names for random sets of their own, before anything is measured.
    """
    rules, results = pd.read_csv(folder / "rules.csv"), pd.read_parquet(folder / "results.parquet")
    rules = rules[rules.budget == rules.budget.max()]
    choose = results[(results.split == "choose") & (results.role == "graft") & (results.budget == results.budget.max())]
    merged = rules[["rule", "k", "strength"]].merge(choose, on=["rule", "k", "strength"])
    order = merged.sort_values(["accuracy", "log_probability"], ascending=False)
    first = str(rules.rule.iloc[0])
    controlled = set(rules[rules.random_n.notna()].rule)
    free = [r for r in order.rule if r in controlled and r not in (*SEARCHES, "random", first)]
    return [first, *free[:1], *[r for r in order.rule if r == "greedy"]]


def few(row: Any) -> str:
    """A warning where TIR divides by a handful of right answers."""
    right = round(row.target * row.n)
    return f" ({right} right)" if right < FEW else ""


def recovery(row: Any) -> str:
    return f"{row.recovery:.0f} % [{row.recovery_low:.0f}, {row.recovery_high:.0f}]"


def depth(results: pd.DataFrame, rule: str) -> str:
    """How strictly a rule's random sets are matched in depth."""
    mine = results[(results.role == "random") & (results["rule"] == rule) & results["set"].str.startswith("set")]
    return ", ".join(dict.fromkeys(mine.depth_matched))


def spread(row: Any, results: pd.DataFrame) -> str:
    """What a rule's random sets reach, and how strictly they are matched in depth."""
    ends = f"{percent(row.random_low)} – {percent(row.random_high)}"
    return f"{percent(row.random_median)} ({ends}), {depth(results, row['rule'])}"


def same_projections(folder: Path, rule: str, k: int) -> str:
    """The rank among random sets of the same projections, which another run of the same name has.

    At the strength that the graft has, and at the one that suited three of them best on `choose`.
    """
    other = folder.with_name(f"{folder.name}-projections")
    if not (other / "outcome.json").exists():
        return "–"
    table = pd.read_csv(other / "rules.csv")
    table = table[(table.budget == table.budget.max()) & table.random_n.notna()]
    mine = table[(table["rule"] == rule) & (table.k == k)]
    if mine.empty:
        return "–"
    row = mine.iloc[0]
    reached = spread(row, pd.read_parquet(other / "results.parquet"))
    said = f"{reached}: {row.random_beaten:.0f} of {row.random_n:.0f}"
    if pd.isna(row.tuned_n) or row.tuned_strength == row.strength:
        return said
    ends = f"{percent(row.tuned_low)} – {percent(row.tuned_high)}"
    moved = f"{percent(row.tuned_median)} ({ends}): {row.tuned_beaten:.0f} of {row.tuned_n:.0f}"
    return f"{said}; at strength {row.tuned_strength:g} {moved}"


def rows(folder: Path) -> list[str]:
    """One run as rows of the table."""
    table = pd.read_csv(folder / "rules.csv").set_index("rule", drop=False)
    table = table[table.budget == table.budget.max()]
    results = pd.read_parquet(folder / "results.parquet")
    everything = int(results[results.role == "all"].k.iloc[0])
    found = []
    for at, rule in enumerate(shown(folder)):
        row = table.loc[rule]
        controlled = not pd.isna(row.random_n)
        cells: list[Any] = [
            f"[{folder.name}](runs/{folder.name}/summary.md)" if at == 0 else "",
            f"`{rule}`",
            *[percent(row[role]) for role in ("target", "source", "after")],
            f"{row.k} of {everything}",
            spread(row, results) if controlled else "–",
            f"{row.random_beaten:.0f} of {row.random_n:.0f} (p = {row.random_p_value:.2g})" if controlled else "–",
            same_projections(folder, rule, row.k) if controlled else "–",
            f"{row.curve_p_max:.2g}" if not pd.isna(row.curve_p_max) else "–",
            "undefined" if pd.isna(row.tir) else f"{row.tir:.2f}" + few(row),
            "withheld" if pd.isna(row.recovery) else recovery(row),
            row.n,
        ]
        found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def table() -> str:
    """The table of every committed run."""
    found = [ROOT / "runs" / name for name in RUNS]
    columns = ["run", "rule", "target", "source", "grafted", "K", "random at K: median (range), depth"]
    columns += ["random sets beaten"]
    columns += ["of the same projections: median (range), depth: beaten; at the strength that suits them, if another"]
    columns += ["p of the K-curve", "TIR", "Recovery", "n"]
    head = f"| {' | '.join(columns)} |"
    lines = [
        head,
        "|" + "---|" * len(columns),
        *(line for f in found for line in rows(f)),
    ]
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


if __name__ == "__main__":
    main()
