"""What the study aims at past the paper, one condition after another, and which of them a finished run meets.

The numbers were set before the study: on one pair of each setting TIR ≥ 2.5 where the source leaves room for it,
Recovery ≥ 100 %, better than 99 of 100 random sets, at most 15 % of the parameters, at most 1 % harm to perplexity on
neutral text. How a row is judged was written when the first six runs were known: by its value on ``test``, against the
control that it does worst against, and with every reservation named beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

RUNS = Path(__file__).resolve().parent.parent / "runs"
TIR, RECOVERY, BEATEN, SHARE, HARM = 2.5, 100.0, 0.99, 0.15, 0.01
#: of the adapters of the study's pairs
LORA_RANK = 16
#: columns of ``runs_table`` that begin so → what is compared, where it is the strongest control
CONTROLS = {
    "random": "random sets at the graft's strength",
    "tuned": "random sets at a strength of their own",
    "refitted": "random sets with strengths fitted to them",
}


@dataclass(frozen=True)
class Met:
    """Whether a run meets a condition, or None where the pair leaves no room for it; the numbers; and a reservation."""

    met: bool | None
    said: str
    but: str = ""

    def __str__(self) -> str:
        return f"{ {True: 'met', False: 'not met', None: 'no room'}[self.met] }: {self.said}"


def missing(value: Any) -> bool:
    """Whether a row lacks a number."""
    return value is None or bool(pd.isna(value))


def ratio(row: dict[str, Any]) -> Met:
    if missing(row["tir"]):
        return Met(None, "undefined, the target has nothing right")
    said = f"{row['tir']:.2f} [{row['tir_low']:.2f}, {row['tir_high']:.2f}]"
    room = row["source"] / row["target"]
    if row["tir"] >= TIR or room >= TIR:
        return Met(bool(row["tir"] >= TIR), said)
    return Met(None, f"{said}, the source itself has {room:.2f}")


def recovery(row: dict[str, Any]) -> Met:
    if missing(row["recovery"]):
        return Met(False, "withheld")
    low, high = row["recovery_low"], row["recovery_high"]
    right = " against ".join(f"{row[which] * row['n']:.0f}" for which in ("after", "source"))
    said = f"{row['recovery']:.1f} % [{low:.1f}, {high:.1f}], {right} right"
    if low < RECOVERY < high:
        said += ", not told apart"
    but = f"the interval of Recovery begins at {low:.0f} %" if low < RECOVERY <= row["recovery"] else ""
    return Met(bool(row["recovery"] >= RECOVERY), said, but)


def beaten(row: dict[str, Any]) -> Met:
    """Against the control that it does worst against; a tie counts as not beaten."""
    found = []
    for controls, name in CONTROLS.items():
        n = row.get(f"{controls}_n")
        if not missing(n) and n:
            found.append((row[f"{controls}_beaten"] / n, f"{row[f'{controls}_beaten']:.0f} of {n:.0f} {name}"))
    if found:
        worst, said = min(found)
        but = [] if len(found) > 1 else ["the random sets have the graft's strength, which was chosen for the graft"]
        other = row.get("unrelated_beaten")
        if not missing(other) and other >= BEATEN * row["random_n"]:
            same = row.get("unrelated_shared")
            same = "" if missing(same) else f", {same:.0f} of {row['k']:.0f} the same,"
            but.append(f"what the rule picks on another task{same} beats {other:.0f} of {row['random_n']:.0f} as well")
        return Met(worst >= BEATEN, said, "; ".join(but))
    n = row.get("weights_n")
    if missing(n) or not n:
        return Met(False, "no control")
    what = "directions" if str(row.get("operator", "")).startswith("low_rank") else "numbers"
    said = f"{row['weights_beaten']:.0f} of {n:.0f} draws of as many {what} of the same layers"
    but = f"of all layers there are no random sets: draws of {what} stand in"
    ways = [row.get("distance_share"), row.get("weights_distance_share")]
    if not any(map(missing, ways)):
        but += ", whose change of the weights is {1:.0%} as long as all of it, the graft's {0:.0%}".format(*ways)
    return Met(row["weights_beaten"] >= BEATEN * n, said, but)


def share(row: dict[str, Any]) -> Met:
    changed, touched = row.get("changed_share"), row["parameter_share"]
    carried = touched if missing(changed) else changed
    said = f"{100 * carried:.1f} % stored, {100 * touched:.1f} % altered"
    but = [] if touched <= SHARE else [f"it alters {touched:.0%} of the parameters"]
    rank = re.fullmatch(r"low_rank of rank (\d+)", str(row.get("operator", "")))
    whole = LORA_RANK / int(rank[1]) * carried if rank else 1.0
    if whole <= SHARE:
        but.append(f"the whole difference in these layers stores {whole:.1%}, so the limit rules nothing out")
    return Met(bool(carried <= SHARE), said, "; ".join(but))


def harm(row: dict[str, Any]) -> Met:
    low, high = (100 * row[f"perplexity_change_{end}"] for end in ("low", "high"))
    said, but = f"{100 * row['perplexity_change']:+.1f} % [{low:.1f}, {high:.1f}]", []
    if row["gate"]:
        page = (RUNS / str(row["run"]) / "summary.md").read_text(encoding="utf-8")
        opened = re.search(r"the gate is open for (\d+) of (\d+) texts", page)
        assert opened is not None, f"{row['run']}: its page does not say for how many texts the gate is open"
        said += f", gate open for {opened[1]} of {opened[2]} texts"
        shut = int(opened[2]) - int(opened[1])
        but.append(f"for {shut} of {opened[2]} neutral texts the graft is not in place, which says nothing of its harm")
    if row["worst_change_high"] < 0:
        but.append(f"it loses on {row['worst_task']}")
    return Met(bool(row["perplexity_change"] <= HARM), said, "; ".join(but))


#: condition → what decides
AIMS: dict[str, Callable[[dict[str, Any]], Met]] = {
    f"TIR ≥ {TIR:g}": ratio,
    f"Recovery ≥ {RECOVERY:g} %": recovery,
    f"better than {100 * BEATEN:.0f} of 100": beaten,
    f"≤ {100 * SHARE:g} % of the parameters": share,
    f"perplexity ≤ +{100 * HARM:g} %": harm,
}


def conditions(row: dict[str, Any]) -> list[Met]:
    """Every condition of the aim, for a row of ``runs_table``."""
    return [judge(row) for judge in AIMS.values()]


def reached(found: list[Met]) -> str:
    """What all conditions say together."""
    missed, unjudged = (sum(m.met is what for m in found) for what in (False, None))
    if missed:
        return f"{missed} of {len(found)} not met"
    said = "all met" if not unjudged else f"all met but {unjudged}, which cannot be judged"
    # one who quotes the cell alone quotes this too
    return said if reservations(found) == "–" else f"{said}, with reservations"


def reservations(found: list[Met]) -> str:
    """What stands against conditions that are met, or weakens their controls, and harm beside that of the condition."""
    return "; ".join(m.but for m in found if m.but) or "–"
