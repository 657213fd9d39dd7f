"""Where a run's cells are computed: seconds of the same run on every engine, and whether the tables are the same bytes.

    python benchmarks/engines.py [--pair smollm2/generations] [--repeats 3] [--out benchmarks/results]

A run of some thirty cells, most of them random sets; each start is a process in a new folder, and engines take turns.
"Serial" with one thread has what a worker has; with two it has all of this machine that two workers have. Every
measurement is added to the CSV file, so that a killed benchmark continues.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from kills import TABLES, finished
from tables import save

ROOT = Path(__file__).resolve().parent.parent
CONFIG: dict[str, Any] = {
    "name": "engines", "rule": "weight_delta", "k": [8, 32], "random_sets": 20, "curve_sets": 1, "batch_size": 16,
    "split": {"discover": 8, "choose": 16, "test": 32}, "side_effects": None, "controls": ["bottom"],
}  # fmt: skip
#: a run without side effects has no table of them
USED = tuple(t for t in TABLES if t != "side_effects.csv")
#: (engine, threads of each process)
ENGINES = (("serial", 1), ("serial", 2), ("processes", 1), ("ray", 1))


def run(pair: str, engine: str, threads: int, folder: Path) -> dict[str, float]:
    """Seconds of a run: to the first cell that the engine finished, and to the end."""
    config = folder.parent / "config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "pair": pair, "threads": threads}))
    command = [sys.executable, "-m", "mechtransplant.cli", "run", str(config), "--out", str(folder), "--engine", engine]
    command += ["--workers", "2"] if engine != "serial" else []
    started = time.perf_counter()
    first = None
    with (folder.parent / "said.txt").open("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            time.sleep(0.1)
            if first is None and finished(folder):
                first = time.perf_counter() - started
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{engine}: {said.read().strip().splitlines()[-1]}")
    return {"first_cell": round(first or seconds, 2), "seconds": round(seconds, 2), "cells": len(finished(folder))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2/generations")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "engines.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    for repeat in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as temporary:
            first: Path | None = None
            for engine, threads in ENGINES:
                folder = Path(temporary) / f"{engine}-{threads}" / "run"
                folder.parent.mkdir()
                known = {"pair": arguments.pair, "repeat": repeat, "engine": engine, "threads": threads}
                if any(all(r[k] == v for k, v in known.items()) for r in rows):
                    continue
                measured = run(arguments.pair, engine, threads, folder)
                same: object = ""
                if threads == 1:
                    # compared with serial, where this start measured it too
                    first = first or (folder if engine == "serial" else None)
                    if first is not None:
                        same = all((folder / t).read_bytes() == (first / t).read_bytes() for t in USED)
                rows.append({**known, **measured, "tables_equal": same})
                print(rows[-1], flush=True)
                save(pd.DataFrame(rows), path)


if __name__ == "__main__":
    main()
