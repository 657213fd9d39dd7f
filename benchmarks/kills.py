"""A run that is killed (kill -9) at random moments and started again: is it the run that nobody disturbed?

    python benchmarks/kills.py [--kills 20] [--engines serial processes ray] [--out benchmarks/results]

A small run on family/generations is killed with all its processes, or (every third time) one of its workers alone: at
moments that are spread at random over all its cells, and the last two times while it writes its tables and figures; one
kill in four comes before that, while models are loaded. After the last kill it runs to its end. Compared are the bytes
of every table, and the cells: each is in the file once, and what was finished before a kill is there afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tables import save

ROOT = Path(__file__).resolve().parent.parent
CONFIG: dict[str, Any] = {
    "name": "small", "pair": "family/generations", "task": "addition", "rule": "weight_delta", "k": [2, 4, 8],
    "random_sets": 400, "curve_sets": 100, "split": {"discover": 32, "choose": 64, "test": 256}, "threads": 1,
    "side_effects": {"questions": 32, "texts": 8, "tokens": 8, "random": 5},
}  # fmt: skip
#: in the environment of all that is started here: another run's processes must not be killed
MARK = f"mechtransplant-kills-{os.getpid()}"
#: seconds at most from a start to a kill while models are loaded, from a cell to a kill, from the last cell to one
LOADING, AFTER, WRITING = 8.0, 0.5, 4.0
TABLES = ("outcome.json", "rules.csv", "side_effects.csv", "summary.md", "ranking.csv")


def start(folder: Path, engine: str) -> subprocess.Popen[bytes]:
    """A start of the run, in a session of its own."""
    config = folder.parent / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "mechtransplant.cli", "run", str(config), "--out", str(folder), "--engine", engine]
    command += ["--workers", "2"] if engine != "serial" else []
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "KILLS": MARK},
    )


def finished(folder: Path) -> list[bytes]:
    """The whole lines of the run's cells."""
    path = folder / "cells.jsonl"
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []


def workers() -> list[int]:
    """The processes of this benchmark's engines, whoever their parent is now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or MARK.encode() not in (entry / "environ").read_bytes():
                continue
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"engine.worker" in command or command.startswith(b"ray::_Process"):
            found.append(int(entry.name))
    return found


def disturbed(folder: Path, engine: str, kills: int, cells: int, rng: random.Random) -> list[dict[str, Any]]:
    """Start and kill, then run to the end: one row a kill. ``cells``: how many the run has."""
    rows: list[dict[str, Any]] = []
    targets = sorted(rng.randrange(cells) for _ in range(kills - 2)) + [cells, cells]
    process = start(folder, engine)
    while len(rows) < kills:
        before, target = finished(folder), targets[len(rows)]
        loading = target < cells and rng.random() < 0.25
        if not loading:
            patience, began = time.monotonic() + 600, time.time()
            # what this start itself has done: a new cell, or, after the last one, the first table
            while process.poll() is None and time.monotonic() < patience:
                table = folder / "results.parquet"
                if target == cells and table.exists() and table.stat().st_mtime > began:
                    break
                if target < cells and len(finished(folder)) > max(target, len(before)):
                    break
                time.sleep(0.02)
        time.sleep(rng.uniform(0, LOADING if loading else WRITING if target == cells else AFTER))
        over = process.poll() is not None
        alone = engine != "serial" and len(rows) % 3 == 2 and bool(workers()) and not over
        if alone:
            os.kill(rng.choice(workers()), signal.SIGKILL)
        else:
            process.kill()
            process.wait()
            for pid in workers():
                os.kill(pid, signal.SIGKILL)
        now = finished(folder)
        rows.append(
            {
                "engine": engine,
                "kill": len(rows) + 1,
                "killed": "nothing: it was over" if over else "a worker" if alone else "the run",
                "when": "loading" if loading else "writing" if target == cells else "computing",
                "cells_finished": len(now),
                "kept": now[: len(before)] == before,
            }
        )
        print(rows[-1], flush=True)
        if not alone:
            process = start(folder, engine)
    if process.wait() != 0:
        raise SystemExit(f"the last start of {engine} ended with {process.returncode}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--engines", nargs="+", default=["serial", "processes", "ray"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole" / "run"
        whole.parent.mkdir()
        started = time.perf_counter()
        if start(whole, "serial").wait():
            raise SystemExit("the run that nobody disturbs failed")
        alone = time.perf_counter() - started
        rows, verdicts = [], []
        for engine in arguments.engines:
            folder = Path(temporary) / engine / "run"
            folder.parent.mkdir()
            rows += disturbed(folder, engine, arguments.kills, len(finished(whole)), rng)
            keys = [json.loads(line)["key"] for line in finished(folder)]
            verdicts.append(
                {
                    "engine": engine,
                    "kills": sum(r["engine"] == engine and r["killed"] != "nothing: it was over" for r in rows),
                    "cells": len(keys),
                    "cells_twice": len(keys) - len(set(keys)),
                    "cells_of_the_undisturbed": len(finished(whole)),
                    "cells_kept": all(r["kept"] for r in rows if r["engine"] == engine),
                    "tables_equal": all((folder / t).read_bytes() == (whole / t).read_bytes() for t in TABLES)
                    and pd.read_parquet(folder / "results.parquet").equals(pd.read_parquet(whole / "results.parquet")),
                    "undisturbed_seconds": round(alone, 1),
                }
            )
            print(verdicts[-1], flush=True)
    save(pd.DataFrame(rows), arguments.out / "kills.csv")
    save(pd.DataFrame(verdicts), arguments.out / "kills_verdicts.csv")


if __name__ == "__main__":
    main()
