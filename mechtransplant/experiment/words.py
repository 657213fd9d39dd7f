"""Numbers and tables in words: what the Markdown pages of an experiment are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mechtransplant.evaluation import Outcome
from mechtransplant.grafting import Operator
from mechtransplant.grafting.low_rank import LowRank


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %"


def range_of(values: Any) -> str:
    """Median (lowest – highest)."""
    return f"{percent(values.median())} ({percent(values.min())} – {percent(values.max())})"


RATIOS = ("TIR", "Recovery")


def row_of(cells: Sequence[Any]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head_of(columns: Sequence[str]) -> list[str]:
    return [row_of(columns), row_of(["---"] * len(columns))]


def ratios(outcome: Outcome) -> list[str]:
    """TIR and Recovery as text."""
    return [
        "undefined" if outcome.tir is None else f"{outcome.tir:.3f}",
        "withheld" if outcome.recovery is None else f"{outcome.recovery:.1f} %",
    ]


def interval_of(pair: tuple[float, float] | None, unit: str = " %", scale: float = 100) -> str:
    if pair is None:
        return "–"
    low, high = ("∞" if end == math.inf else "−∞" if end == -math.inf else f"{scale * end + 0.0:.3g}" for end in pair)
    return f"[{low}, {high}]{unit}"


def points(share: float) -> str:
    """A change of a share in percentage points; nothing is +0.0."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def counted_in_words(operator: Operator) -> str:
    """What grafts do with the numbers that a limit to their size counts: change them, or take them for directions."""
    return "have directions that take" if isinstance(operator, LowRank) else "change"


def moved_in_words(row: Mapping[Any, Any]) -> list[str]:
    """How long a graft's change of the weights is, and its random counterparts', from a row of ``rules.csv``."""

    def way(name: str) -> str | None:
        share = row.get(f"{name}distance_share")
        return None if share is None or math.isnan(share) else percent(share)

    own = way("")
    if own is None:
        return []
    names = {"random_": "random sets", "tuned_": "random sets at their own strength", "weights_": "random draws"}
    beside = [f"{name} {way(key)}" for key, name in names.items() if way(key) is not None]
    said = f" ({', '.join(beside)})" if beside else ""
    return [f"- its change of the weights is {own} as long as the whole difference between target and source{said}"]


def kept_in_words(operator: Operator, share: float) -> str:
    """What an operator keeps of its modules, and how many numbers that is, of those in linear layers."""
    if isinstance(operator, LowRank):
        which = "drawn at random" if operator.draw is not None else "the largest"
        return (
            f"of every module's change it keeps {operator.rank} directions, {which}: all of its numbers change, along "
            f"directions that take as many numbers to write down as {percent(share)} of those in linear layers"
        )
    which = "the largest changes of every module" if operator.name == "ties" else "changes drawn at random"
    return f"it keeps {which}: {percent(share)} of the numbers in linear layers change"
