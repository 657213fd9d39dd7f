"""The benchmarks' rows: measured in turns, kept in a CSV file, and written as Markdown tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd


def in_turns(
    path: Path,
    repeats: int,
    functions: Mapping[str, Callable[[], Any]],
    pair: str,
    described: Callable[[str, float, dict[str, Any]], dict[str, Any]],
) -> None:
    """Call every function once a repeat, one after another, and add a row each to ``path`` when a repeat is whole.

    ``described`` gets a function's name, its seconds, and what this repeat's functions have returned so far by their
    names; what it returns joins the row. Repeats that the file has are not measured again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    for repeat in range(len({row["repeat"] for row in rows}), repeats):
        found: dict[str, Any] = {}
        new = []
        for name, function in functions.items():
            started = time.perf_counter()
            found[name] = function()
            seconds = time.perf_counter() - started
            row = {"pair": pair, "repeat": repeat, "what": name, "seconds": round(seconds, 3)}
            new.append({**row, **described(name, seconds, found)})
            print(new[-1], flush=True)
        rows += new
        pd.DataFrame(rows).to_csv(path, index=False)


def table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    rows = [f"| {' | '.join(map(str, frame.columns))} |", "|" + "---|" * len(frame.columns)]
    rows += [f"| {' | '.join(map(str, row))} |" for row in frame.itertuples(index=False)]
    return "\n".join(rows)
