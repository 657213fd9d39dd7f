"""What the paper claims, and what a run of its method says about each claim.

The rules below were written before any run of the study was started. Each gives one verdict a run: +1 the claim holds,
−1 its opposite does, 0 undecided; a claim holds (or does not) on a pair where all splits say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechtransplant.experiment import runs_table
from mechtransplant.significance import paired_difference_interval, recovery_interval

#: a rise of perplexity on neutral text, and a loss of accuracy on another task, that are called harm
HARM, LOSS = 0.01, 0.05
WITHHELD = "the source is not surely better than the target, so Recovery is withheld"


@dataclass(frozen=True)
class Evidence:
    """A run's verdict on a claim, and the numbers that it rests on."""

    verdict: int
    said: str


class Study:
    """One finished run of the paper's rule."""

    def __init__(self, folder: Path) -> None:
        self.row: dict[str, Any] = runs_table([folder]).iloc[0].to_dict()
        results = pd.read_parquet(folder / "results.parquet")
        self.test = results[(results.split == "test") & (results.budget == results.budget.max())]
        self.candidates = int(self.row["candidates"])

    @property
    def gap(self) -> bool:
        """Whether the source is surely better than the target."""
        return paired_difference_interval(self.bits("target"), self.bits("source"))[0] > 0

    def random(self) -> Any:
        """Accuracies of the random sets that are matched to the reported graft."""
        rows = self.test[(self.test.role == "random") & (self.test["rule"] == self.row["rule"])]
        return rows[rows["set"].str.startswith("set") & (rows.k == self.row["k"])].accuracy.to_numpy()

    def bits(self, role: str, **where: Any) -> Any:
        """Verdicts, one a question, of the first row with a role (and with the run's rule, where one is asked)."""
        rows = self.test[self.test.role == role]
        for key, value in where.items():
            rows = rows[rows[key] == value]
        return np.array([c == "1" for c in rows.correct.iloc[0]])


def improves(study: Study) -> Evidence:
    row = study.row
    low, high = row["difference_low"], row["difference_high"]
    said = (
        f"{100 * row['difference']:+.1f} points [{100 * low:.1f}, {100 * high:.1f}], McNemar p = {row['p_mcnemar']:.1g}"
    )
    return Evidence(int(low > 0) - int(high < 0), said)


def finds(study: Study) -> Evidence:
    # as numbers of right answers: a table of fewer digits must break no tie
    sets, row = np.rint(study.random() * study.row["n"]), {"after": round(study.row["after"] * study.row["n"])}
    # both tails of one permutation test, ties on the side of "no difference"
    above = (1 + np.sum(sets >= row["after"])) / (len(sets) + 1)
    below = (1 + np.sum(sets <= row["after"])) / (len(sets) + 1)
    beaten, beaten_by = np.sum(sets < row["after"]), np.sum(sets > row["after"])
    said = f"beats {beaten} of {len(sets)} random sets and is beaten by {beaten_by}, p = {above:.2g}"
    return Evidence(int(above <= 0.05) - int(below <= 0.05), said)


def specific(study: Study) -> Evidence:
    row = study.row
    ours = study.bits("graft", rule=row["rule"], k=row["k"], strength=row["strength"])
    other = study.bits("unrelated", rule=row["rule"])
    low, high = paired_difference_interval(other, ours)
    said = f"{100 * (ours.mean() - other.mean()):+.1f} points [{100 * low:.1f}, {100 * high:.1f}] over the modules "
    said += "of the unrelated task"
    if not pd.isna(row.get("unrelated_shared")):
        said += f", of which {row['unrelated_shared']:.0f} are the same (random sets {row['random_shared']:g})"
    return Evidence(int(low > 0) - int(high < 0), said)


def reaches(study: Study) -> Evidence:
    row = study.row
    if not study.gap:
        return Evidence(0, WITHHELD)
    low, high = row["recovery_low"], row["recovery_high"]
    return Evidence(int(low >= 100) - int(high < 100), f"Recovery {row['recovery']:.0f} % [{low:.0f}, {high:.0f}]")


def few(study: Study) -> Evidence:
    row = study.row
    if not study.gap:
        return Evidence(0, WITHHELD)
    k = max(1, round(study.candidates / 8))
    grafted = study.bits("graft", rule=row["rule"], k=k)
    target, source = study.bits("target"), study.bits("source")
    low, high = recovery_interval(target, source, grafted)
    recovery = 100 * (grafted.mean() - target.mean()) / (source.mean() - target.mean())
    said = f"with {k} of {study.candidates}: Recovery {recovery:.0f} % [{low:.0f}, {high:.0f}]"
    return Evidence(int(low >= 50) - int(high < 50), said)


def inner(study: Study) -> Evidence:
    row = study.row
    ours = study.bits("graft", rule=row["rule"], k=row["k"], strength=row["strength"])
    everything = study.bits("all")
    low, high = paired_difference_interval(everything, ours)
    said = f"{100 * (ours.mean() - everything.mean()):+.1f} points [{100 * low:.1f}, {100 * high:.1f}] over all "
    return Evidence(int(low > 0) - int(high < 0), said + f"{study.candidates}")


def preserves(study: Study) -> Evidence:
    row = study.row
    low, high = row["perplexity_change_low"], row["perplexity_change_high"]
    lost, kept = row["worst_change_low"], row["worst_change_high"]
    said = f"perplexity {100 * row['perplexity_change']:+.1f} % [{100 * low:.1f}, {100 * high:.1f}], "
    said += f"{row['worst_task']} {100 * row['worst_change']:+.1f} points [{100 * lost:.1f}, {100 * kept:.1f}]"
    harmed = low > HARM or kept < 0
    return Evidence(int(high <= HARM and lost >= -LOSS) - int(harmed), said)


#: claim → (where the paper makes it, what decides, the rule)
CLAIMS: dict[str, tuple[str, Callable[[Study], Evidence]]] = {
    "A graft without training improves the target": ("the difference's 95 % interval against 0", improves),
    "LAE finds the modules that carry it": ("rank among 100 matched random sets, 5 % at either end", finds),
    "They are specific to the workload": ("against the modules that LAE finds on another task", specific),
    "A graft can reach the source (Recovery 100 % and more)": ("Recovery's 95 % interval against 100 %", reaches),
    "Few modules suffice": ("Recovery with the eighth of the candidates that LAE ranks first, against 50 %", few),
    "An inner K is better than all": ("the difference to all candidates, against 0", inner),
    "The target's character is preserved": (
        "holds: perplexity's interval up to +1 % and the worst other task's from −5 points; does not: surely more than "
        "+1 %, or any sure loss on that task",
        preserves,
    ),
}


def verdict(found: list[Evidence], splits: int = 3) -> str:
    """What several splits say together."""
    votes = {e.verdict for e in found}
    if len(found) < splits:
        return f"{len(found)} of {splits} splits"
    if votes == {1}:
        return "holds"
    if votes == {-1}:
        return "does not hold"
    said = {1: "holds", -1: "does not", 0: "undecided"}
    counts = [f"{said[v]} {sum(e.verdict == v for e in found)}×" for v in (1, 0, -1) if v in votes]
    return "undecided" if votes == {0} else f"undecided ({', '.join(counts)})"
