"""The benchmarks' rows: measured in turns, kept in CSV files, noted where they come from, written as tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
#: beside the results: from when, of which commit and from which machine each file's last rows are
MADE = "made.json"


def commit() -> str:
    """The commit of the code, with + where it is changed (results do not count)."""
    found = []
    for command in (
        ["rev-parse", "--short=7", "HEAD"],
        ["status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/README.md"],
    ):
        try:
            asked = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return "no git"
        if asked.returncode:
            return "no repository"
        found.append(asked.stdout.strip())
    return found[0] + "+" * bool(found[1])


#: as the code was read, not as it is when a benchmark ends
COMMIT = commit()


def save(rows: pd.DataFrame, path: Path, float_format: str | None = None) -> None:
    """Write results, and note where they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False, float_format=float_format)
    note(path)


def note(path: Path) -> None:
    """Note in the folder's made.json when, with which code and where a file of results was measured."""
    notes = path.parent / MADE
    made = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    made[path.name] = {"date": time.strftime("%Y-%m-%d"), "commit": COMMIT, **machine()}
    notes.write_text(json.dumps(dict(sorted(made.items())), indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """The processor, its cores, and the libraries that a benchmark's seconds depend on most."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    # what does not use them need not load them
    torch = sys.modules.get("torch")
    gpu = {"gpu": torch.cuda.get_device_name()} if torch is not None and torch.cuda.is_available() else {}
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count(), **gpu, **versions}


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
        save(pd.DataFrame(rows), path)


def table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    rows = [f"| {' | '.join(map(str, frame.columns))} |", "|" + "---|" * len(frame.columns)]
    rows += [f"| {' | '.join(map(str, row))} |" for row in frame.itertuples(index=False)]
    return "\n".join(rows)
