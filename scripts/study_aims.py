"""What the study aims at past the paper, one condition after another, and which of them a finished run meets.

The conditions were set with the task, before any run: on one pair of each setting TIR ≥ 2.5 where the source leaves
room for it, Recovery ≥ 100 %, better than 99 of 100 random sets, at most 15 % of the parameters, at most 1 % harm to
perplexity on neutral text. A run meets one by its value on ``test``; what its interval allows stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

TIR, RECOVERY, BEATEN, SHARE, HARM = 2.5, 100.0, 0.99, 0.15, 0.01


@dataclass(frozen=True)
class Met:
    """Whether a run meets a condition, or None where the pair leaves no room for it; the numbers; and a reservation."""

    met: bool | None
    said: str
    but: str = ""

    def __str__(self) -> str:
        return f"{ {True: 'yes', False: 'no', None: 'no room'}[self.met] }: {self.said}"


def ratio(row: dict[str, Any]) -> Met:
    said = f"{row['tir']:.2f} [{row['tir_low']:.2f}, {row['tir_high']:.2f}]"
    room = row["source"] / row["target"]
    if row["tir"] >= TIR or room >= TIR:
        return Met(bool(row["tir"] >= TIR), said)
    return Met(None, f"{said}, the source itself has {room:.2f}", "TIR, which has no room")


def recovery(row: dict[str, Any]) -> Met:
    if pd.isna(row["recovery"]):
        return Met(False, "withheld")
    said = f"{row['recovery']:.1f} % [{row['recovery_low']:.1f}, {row['recovery_high']:.1f}]"
    return Met(bool(row["recovery"] >= RECOVERY), said)


def beaten(row: dict[str, Any]) -> Met:
    for controls, name in (("random", "random sets"), ("weights", "draws of its changes")):
        n = row.get(f"{controls}_n")
        if n is not None and not pd.isna(n) and n:
            count = int(row[f"{controls}_beaten"])
            return Met(count >= BEATEN * n, f"{count} of {n:.0f} {name}")
    return Met(False, "no control")


def share(row: dict[str, Any]) -> Met:
    changed = row.get("changed_share")
    carried = row["parameter_share"] if changed is None or pd.isna(changed) else changed
    touched = row["parameter_share"]
    but = "" if touched <= SHARE else "the layers it touches"
    return Met(bool(carried <= SHARE), f"{100 * carried:.1f} % carried, {100 * touched:.1f} % touched", but)


def harm(row: dict[str, Any]) -> Met:
    low, high = (100 * row[f"perplexity_change_{end}"] for end in ("low", "high"))
    said = f"{100 * row['perplexity_change']:+.1f} % [{low:.1f}, {high:.1f}]"
    return Met(bool(row["perplexity_change"] <= HARM), said + (", behind a gate" if row["gate"] else ""))


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
    missed = sum(m.met is False for m in found)
    if missed:
        return f"no ({missed} of {len(found)} missed)"
    return ", but for ".join(["yes", *(m.but for m in found if m.but)])
