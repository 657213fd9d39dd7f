"""Markdown tables of the benchmarks' page."""

from __future__ import annotations

import pandas as pd


def table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    rows = [f"| {' | '.join(map(str, frame.columns))} |", "|" + "---|" * len(frame.columns)]
    rows += [f"| {' | '.join(map(str, row))} |" for row in frame.itertuples(index=False)]
    return "\n".join(rows)
