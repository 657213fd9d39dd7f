"""Engines: every job once, the same results, and what becomes of errors, deaths and interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_workers

from mechtransplant.engine import Processes, Recipe, Serial, WorkerError
from mechtransplant.errors import UsageError

RECIPE = Recipe("toy_workers:make", {"power": 3})


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    engine = Processes(RECIPE, 2, threads=1)
    yield engine
    engine.close()


def numbers(n: int) -> list[dict[str, Any]]:
    return [{"number": i} for i in range(n)]


def alive(pid: int) -> bool:
    # a zombie has no memory map
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "Z (zombie)" not in status.read_text()


def test_every_job_is_done_once_by_either_engine(two: Processes) -> None:
    for engine in (Serial(toy_workers.make(3)), two):
        found: dict[int, list[int]] = {}
        engine.run(numbers(20), lambda at, result, found=found: found.setdefault(at, []).append(result["value"]))
        assert found == {i: [i**3] for i in range(20)}
        engine.run([], lambda at, result: pytest.fail("there was no job"))


def test_processes_are_kept_and_have_their_threads(two: Processes) -> None:
    seen: list[dict[str, Any]] = []
    slow = [{"number": i, "what": "sleep", "seconds": 0.2} for i in range(4)]
    for _ in range(2):
        two.run(slow, lambda at, result: seen.append(result))
    assert len({r["pid"] for r in seen}) == 2 and os.getpid() not in {r["pid"] for r in seen}
    assert {r["threads"] for r in seen} == {"1"}
    assert Processes(RECIPE, 1000).threads == 1
    two.close()
    assert not any(alive(r["pid"]) for r in seen)


def test_noise_does_not_come_between_results(two: Processes) -> None:
    found: list[int] = []
    two.run([{"number": 2, "what": "print"}], lambda at, result: found.append(result["value"]))
    assert found == [8]


def test_a_worker_that_is_killed_is_replaced(two: Processes, tmp_path: Path) -> None:
    jobs = numbers(6)
    jobs[2] = {"number": 2, "what": "die", "mark": str(tmp_path / "mark")}
    found: dict[int, int] = {}
    two.run(jobs, lambda at, result: found.__setitem__(at, result["value"]))
    assert found == {i: i**3 for i in range(6)} and (tmp_path / "mark").exists()
    # one that dies between two jobs, with a line on its way that nobody reads: no one took the dead one's place where
    # the other did all that was left
    alive_now = next(one.process for one in reversed(two._started) if one.process.poll() is None)
    os.kill(alive_now.pid, signal.SIGKILL)
    two.run(jobs, lambda at, result: found.__setitem__(at, -result["value"]))
    assert found == {i: -(i**3) for i in range(6)}
    two.close()


def test_a_job_that_fails_is_tried_again_in_another_process(two: Processes, tmp_path: Path) -> None:
    jobs = numbers(6)
    jobs[2] = {"number": 2, "what": "error once", "mark": str(tmp_path / "mark")}
    found: dict[int, dict[str, Any]] = {}
    with pytest.warns(UserWarning, match=r"failed \(MemoryError: nothing is left here\) and is tried again in another"):
        two.run(jobs, found.__setitem__)
    assert {at: r["value"] for at, r in found.items()} == {i: i**3 for i in range(6)}
    failed = int((tmp_path / "mark").read_text())
    assert found[2]["pid"] != failed and not alive(failed)


def test_a_job_that_kills_every_worker_ends_the_run(two: Processes, tmp_path: Path) -> None:
    job = {"number": 1, "what": "die", "always": True, "mark": str(tmp_path / "mark")}
    with pytest.raises(WorkerError, match="died 3 times on one job"):
        two.run([job], lambda at, result: None)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [("usage", UsageError, "make another"), ("error", WorkerError, "ZeroDivisionError: in the worker")],
)
def test_a_jobs_own_error_is_raised_here(two: Processes, what: str, error: Any, message: str) -> None:
    found: list[int] = []
    jobs = [{"number": 1}, {"number": 2, "what": what}, {"number": 3, "what": "sleep", "seconds": 30}]
    started = time.monotonic()
    with pytest.raises(error, match=message), warnings.catch_warnings(record=True) as said:
        two.run(jobs, lambda at, result: found.append(at))
    # what is wrong with the input is not tried twice
    assert len(said) == (what == "error")
    assert time.monotonic() - started < 20, "it waited for a job whose result nobody wants"
    assert set(found) <= {0} and not two._started
    two.run(numbers(2), lambda at, result: found.append(at))


def test_an_error_where_results_are_taken_ends_the_processes(two: Processes) -> None:
    def full(at: int, result: dict[str, Any]) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        two.run(numbers(8), full)
    assert not two._started


def test_a_recipe_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    for recipe, error, message in (
        (Recipe("toy_workers:refuse"), UsageError, "no worker can be made here"),
        (Recipe("toy_workers:nothing"), WorkerError, "AttributeError"),
    ):
        engine = Processes(recipe, 2, threads=1)
        with pytest.raises(error, match=message), warnings.catch_warnings(record=True):
            engine.run(numbers(3), lambda at, result: None)
        assert not engine._started
    with pytest.raises(UsageError, match="workers must be a whole number of at least 1"):
        Processes(RECIPE, 0)


def test_a_process_that_was_being_started_is_ended_too(two: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    real, both, ends = Processes._start, threading.Barrier(2), threading.Lock()

    def start(self: Processes) -> Any:
        both.wait()
        if ends.acquire(blocking=False):
            raise UsageError("the first of two")
        # the other has failed by now, and the engine has ended what it had
        time.sleep(0.3)
        return real(self)

    monkeypatch.setattr(Processes, "_start", start)
    with pytest.raises(UsageError, match="the first of two"):
        two.run(numbers(4), lambda at, result: None)
    assert not two._started


def test_a_process_that_cannot_make_its_worker_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    engine = Processes(Recipe("toy_workers:full_once", {"mark": str(tmp_path / "mark")}), 1, threads=1)
    found: list[dict[str, Any]] = []
    with pytest.warns(UserWarning, match="failed .MemoryError: too large. and is tried again"):
        engine.run(numbers(2), lambda at, result: found.append(result))
    failed = int((tmp_path / "mark").read_text())
    assert sorted(r["value"] for r in found) == [0, 1] and not alive(failed)
    engine.close()


def test_deaths_and_failures_are_counted_apart(two: Processes, tmp_path: Path) -> None:
    """A job that ends its process, and then fails, is tried a third time."""
    marks = [str(tmp_path / name) for name in ("died", "failed")]
    found: list[int] = []
    with pytest.warns(UserWarning, match="tried again"):
        two.run([{"number": 2, "what": "both", "marks": marks}], lambda at, result: found.append(result["value"]))
    assert found == [8]


def test_no_worker_outlives_the_process_that_asked(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from mechtransplant.engine import Processes, Recipe\n"
        "engine = Processes(Recipe('toy_workers:make'), 1, threads=1)\n"
        "jobs = [{'number': 1}, {'number': 2, 'what': 'sleep', 'seconds': 60}]\n"
        "engine.run(jobs, lambda at, result: print(result['pid'], flush=True))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
