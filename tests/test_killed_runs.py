"""Runs that are killed without warning, at whatever moment: they continue, and nothing finished is computed again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from small_runs import small

from mechtransplant.experiment import Run, run_experiment
from mechtransplant.experiment.config import parse_config

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")

SMALL = small(rule="weight_delta", k=[2, 8], random_sets=12, curve_sets=8, threads=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_experiment(parse_config(SMALL), tmp_path_factory.mktemp("whole") / "small", progress=False)


def start(folder: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    config = folder.parent / "c.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    command = [sys.executable, "-m", "mechtransplant.cli", "run", str(config), "--out", str(folder)]
    return subprocess.Popen(
        [*command, "--engine", "processes", "--workers", str(workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def lines(folder: Path) -> list[bytes]:
    path = folder / "cells.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def wait_for(folder: Path, cells: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(lines(folder)) < cells:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


def is_whole(folder: Path, whole: Any, finished: list[bytes]) -> None:
    """The folder's tables are the uninterrupted run's, what was finished is there as it was, and once."""
    assert lines(folder)[: len(finished)] == finished
    keys = [json.loads(line)["key"] for line in lines(folder)]
    assert len(keys) == len(set(keys)) == len(lines(whole.folder))
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), whole.results)
    for name in ("summary.md", "rules.csv", "outcome.json", "side_effects.csv"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_run_whose_process_is_killed_twice(tmp_path: Path, whole: Any) -> None:
    folder = tmp_path / "small"
    for workers, cells in ((2, 3), (1, 14)):
        process = start(folder, workers)
        wait_for(folder, cells, process)
        process.kill()
        process.wait()
    torn = lines(folder)
    finished = torn if torn[-1].endswith(b"\n") else torn[:-1]
    run = Run(parse_config(SMALL), folder, progress=False)
    run.execute()
    is_whole(folder, whole, finished)
    assert run.store.computed == len(run.store.cells) - len(finished)


def test_a_run_whose_workers_are_killed_goes_on(tmp_path: Path, whole: Any) -> None:
    folder = tmp_path / "small"
    process = start(folder, 2)
    for cells in (4, 16):
        wait_for(folder, cells, process)
        workers = [pid for pid in children(process.pid) if "engine.worker" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert workers
        os.kill(workers[0], signal.SIGKILL)
    assert process.wait(120) == 0, process.stderr and process.stderr.read()
    is_whole(folder, whole, [])


def test_two_starts_in_one_folder(tmp_path: Path, whole: Any) -> None:
    folder = tmp_path / "small"
    first = start(folder)
    wait_for(folder, 1, first)
    second = start(folder)
    assert second.wait(120) == 2 and second.stderr is not None
    said = second.stderr.read().decode()
    assert "another process is running in" in said and len(said.strip().splitlines()) == 1
    assert first.wait(120) == 0
    is_whole(folder, whole, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted, which needs root")
def test_a_full_disk_loses_the_cell_in_flight_alone(tmp_path: Path, whole: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # half of the cells, and a page each for the files that come before them
    size = sum(len(line) for line in lines(whole.folder)) // 2 + 3 * 4096
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096}", "tmpfs", str(disk)]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        process = start(disk / "small")
        assert process.wait(120) == 2 and process.stderr is not None
        said = process.stderr.read().decode()
        assert "No space left on device" in said and len(said.strip().splitlines()) == 1
        finished = [line for line in lines(disk / "small") if line.endswith(b"\n")]
        assert finished
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run = Run(parse_config(SMALL), disk / "small", progress=False)
        run.execute()
        is_whole(disk / "small", whole, finished)
        assert run.store.computed == len(run.store.cells) - len(finished)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
