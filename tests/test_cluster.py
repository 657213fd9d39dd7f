"""Jobs and runs on Ray: the serial numbers, processes that die, errors, and models that travel as arrays."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import toy_workers
from architectures import ARCHITECTURES, random_pair_of
from small_runs import small

from mechtransplant.engine import Ray, Recipe, Serial, WorkerError
from mechtransplant.engine.cluster import most_threads
from mechtransplant.errors import UsageError
from mechtransplant.experiment import run_experiment
from mechtransplant.experiment.cells import CellStore
from mechtransplant.experiment.config import parse_config
from mechtransplant.pair import LanguageModel, Pair, load_pair
from mechtransplant.pair.shipping import ship, unship

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'mechtransplant[ray]')")

SMALL = small(rule="weight_delta", k=[2, 8], random_sets=6, threads=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests, as a cluster that is there already."""
    before = os.environ.get("PYTHONPATH")
    os.environ |= {"PYTHONPATH": str(Path(__file__).parent), "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def two(cluster: None) -> Iterator[Ray]:
    engine = Ray(Recipe("toy_workers:make", {"power": 3}), 2)
    yield engine
    engine.close()


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def numbers(n: int) -> list[dict[str, Any]]:
    return [{"number": i} for i in range(n)]


def test_a_node_of_another_version_is_refused(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # what is sent along; the worker imports the version that is there
    monkeypatch.setattr("mechtransplant.engine.cluster.__version__", "0.0.0")
    engine = Ray(Recipe("toy_workers:make"), 1)
    try:
        with pytest.raises(UsageError, match=r"a node has mechtransplant .*, and the run 0\.0\.0: install one on all"):
            engine.run([{"number": 2}], lambda *_: None)
    finally:
        engine.close()


def test_every_job_is_done_once(two: Ray) -> None:
    for engine in (Serial(toy_workers.make(3)), two):
        found: dict[int, list[int]] = {}
        engine.run(numbers(20), lambda at, result, found=found: found.setdefault(at, []).append(result["value"]))
        assert found == {i: [i**3] for i in range(20)}
        engine.run([], lambda at, result: pytest.fail("there was no job"))


def test_processes_are_kept_and_have_their_threads(two: Ray) -> None:
    seen: list[dict[str, Any]] = []
    slow = [{"number": i, "what": "sleep", "seconds": 0.3} for i in range(4)]
    # the first that runs begins, and the other joins it
    for _ in range(40):
        two.run(slow, lambda at, result: seen.append(result))
        if len({r["pid"] for r in seen}) == 2:
            break
    two.run(slow, lambda at, result: seen.append(result))
    assert len({r["pid"] for r in seen}) == 2 and os.getpid() not in {r["pid"] for r in seen}
    assert {r["pid"] for r in seen[-4:]} == {r["pid"] for r in seen}
    assert {r["threads"] for r in seen} == {"1"}
    two.close()
    # a cluster that was there before is there afterwards
    assert ray.is_initialized()


def test_a_process_that_is_killed_is_replaced(two: Ray, tmp_path: Path) -> None:
    jobs = numbers(6)
    jobs[2] = {"number": 2, "what": "die", "mark": str(tmp_path / "mark")}
    found: dict[int, dict[str, Any]] = {}
    two.run(jobs, found.__setitem__)
    assert {at: r["value"] for at, r in found.items()} == {i: i**3 for i in range(6)} and (tmp_path / "mark").exists()
    # one that dies between two jobs
    os.kill(found[5]["pid"], signal.SIGKILL)
    two.run(jobs, lambda at, result: found.__setitem__(at, {"value": -result["value"]}))
    assert {at: r["value"] for at, r in found.items()} == {i: -(i**3) for i in range(6)}


def test_a_job_that_fails_is_tried_again_in_another_process(
    two: Ray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = numbers(6)
    jobs[2] = {"number": 2, "what": "error once", "mark": str(tmp_path / "mark")}
    found: dict[int, dict[str, Any]] = {}
    again = r"failed \(MemoryError: nothing is left here\) and is tried again in another process"
    with caplog.at_level("INFO", logger="mechtransplant"), pytest.warns(UserWarning, match=again):
        two.run(jobs, found.__setitem__)
    assert {at: r["value"] for at, r in found.items()} == {i: i**3 for i in range(6)}
    failed = int((tmp_path / "mark").read_text())
    assert found[2]["pid"] != failed and gone(failed)
    assert re.fullmatch(rf"jobs done by node: {socket.gethostname()} \d+", caplog.messages[-1])
    again = "failed .ZeroDivisionError: in the worker. and is tried again"
    with pytest.raises(WorkerError, match="ZeroDivisionError: in the worker"), pytest.warns(UserWarning, match=again):
        two.run([{"number": 1, "what": "error"}], found.__setitem__)


def test_a_job_that_kills_every_process_ends_the_run(two: Ray, tmp_path: Path) -> None:
    job = {"number": 1, "what": "die", "always": True, "mark": str(tmp_path / "mark")}
    with pytest.raises(WorkerError, match="died 3 times on one job"):
        two.run([job], lambda at, result: None)


def test_a_jobs_own_error_is_raised_here(two: Ray) -> None:
    found: list[int] = []
    jobs = [{"number": 1}, {"number": 2, "what": "usage"}, {"number": 3, "what": "sleep", "seconds": 30}]
    with pytest.raises(UsageError, match="make another"):
        two.run(jobs, lambda at, result: found.append(at))
    assert set(found) <= {0}
    two.run(numbers(2), lambda at, result: found.append(at))
    assert found[-2:] in ([0, 1], [1, 0])


def test_recipes_ship_what_is_large_and_say_what_fails(two: Ray) -> None:
    # its idle processes hold the two cores
    two.close()
    found: list[Any] = []
    engine = Ray(Recipe("toy_workers:adding", {"factor": 2}, shipped=np.arange(5)), 1)
    engine.run([{"number": 1}], lambda at, result: found.append(result["value"]))
    assert found == [21]
    engine.close()
    for name, error, message in (
        ("refuse", UsageError, "no worker can be made here"),
        ("nothing", WorkerError, "AttributeError"),
    ):
        with pytest.raises(error, match=message), warnings.catch_warnings(record=True):
            Ray(Recipe(f"toy_workers:{name}"), 1).run(numbers(3), lambda at, result: None)
    with pytest.raises(UsageError, match=r"asks its node for 64 CPU, and the largest has 2 CPU and 0 GPU: use fewer"):
        Ray(Recipe("toy_workers:make"), 1, threads=64).run(numbers(1), lambda at, result: None)


def test_fewer_processes_than_asked_for_do_all_the_jobs(two: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three processes with one core each a cluster with two cores has room for two."""
    two.close()
    monkeypatch.setattr("mechtransplant.engine.cluster.PATIENCE", 0.2)
    three = Ray(Recipe("toy_workers:make"), 3)
    found: dict[int, dict[str, Any]] = {}
    with pytest.warns(UserWarning, match=r"of 3 processes with 1 CPU each have not started after 0.2 s"):
        three.run([{"number": i, "what": "sleep", "seconds": 0.5} for i in range(6)], found.__setitem__)
    assert {at: r["value"] for at, r in found.items()} == {i: i**2 for i in range(6)}
    assert len({r["pid"] for r in found.values()}) == 2
    # nor does the one without room wait on when the engine is closed: another engine's processes find it
    three.close()
    two.run(numbers(2), found.__setitem__)
    two.close()


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "threads"),
    [
        ([{"CPU": 16.0}] * 4, 4, 0, 16),
        ([{"CPU": 16.0}] * 4, 16, 0, 4),
        ([{"CPU": 16.0}] * 2, 3, 0, 8),
        ([{"CPU": 2.0}, {"CPU": 16.0}], 2, 0, 8),
        ([{"CPU": 16.0, "GPU": 1.0}, {"CPU": 64.0}], 1, 1, 16),
        ([{"CPU": 16.0, "GPU": 2.0}] * 2, 4, 1, 8),
        ([{"CPU": 2.0}], 5, 0, 1),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 9, 0, 1),
        ([{"CPU": 64.0, "GPU": 1.0}], 2, 1, 64),
        ([{}], 1, 0, 1),
    ],
)
def test_threads_are_the_most_with_which_all_find_room(
    nodes: list[dict[str, float]], workers: int, gpus: float, threads: int
) -> None:
    assert most_threads(nodes, workers, gpus) == threads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shipped_model_is_the_model_to_the_bit(dtype: str) -> None:
    pair = load_pair("family/generations", dtype=dtype)
    for model in (pair.source, pair.target):
        copy = unship(ship(model))
        assert copy.fingerprint == model.fingerprint
        buffers = dict(copy.hf.named_buffers())
        assert all((buffers[name] == b).all() for name, b in model.hf.named_buffers())
        with_grafts = next(copy.hf.parameters())
        with_grafts.data.zero_()
        assert next(model.hf.parameters()).abs().sum() > 0, "the copy shares the model's memory"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_travels(architecture: str, generations: Pair) -> None:
    pair = random_pair_of(architecture, generations.target.tokenizer)
    there = unship(ship(pair.target))
    assert there.fingerprint == pair.target.fingerprint
    ids = torch.arange(3, 12)[None]
    assert torch.equal(there.hf(ids).logits, pair.target.hf(ids).logits)


def test_tied_weights_are_tied_there(random_model: Callable[..., LanguageModel]) -> None:
    for tied in (True, False):
        model = random_model(0, tie_word_embeddings=tied)
        there = unship(ship(model))
        assert there.fingerprint == model.fingerprint
        assert (there.hf.lm_head.weight is there.hf.get_input_embeddings().weight) == tied


def test_a_run_has_the_serial_numbers_to_the_bit(cluster: None, tmp_path: Path) -> None:
    config = parse_config(SMALL)
    serial = run_experiment(config, tmp_path / "serial" / "small", progress=False)
    spread = run_experiment(config, tmp_path / "ray" / "small", progress=False, engine="ray", workers=2)
    cells = [CellStore(r.folder / "cells.jsonl").cells for r in (serial, spread)]
    assert cells[0] == cells[1]
    pd.testing.assert_frame_equal(serial.results, spread.results)
    for name in ("summary.md", "outcome.json", "rules.csv", "side_effects.csv"):
        assert (serial.folder / name).read_bytes() == (spread.folder / name).read_bytes()
    starts = json.loads((spread.folder / "environment.json").read_text())["starts"]
    assert starts[-1]["engine"] == "ray" and starts[-1]["workers"] == 2


def test_a_users_own_task_and_a_turned_pair_reach_every_process(cluster: None, tmp_path: Path) -> None:
    questions = tmp_path / "own.jsonl"
    lines = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(10, 30) for b in range(10, 16)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    own = parse_config(
        SMALL
        | {
            "pair": {"source": "repo:family/first", "target": "repo:family/second"},
            "direction": "better",
            "task": str(questions),
            "side_effects": None,
            "controls": ["reverse", "self"],
            "random_sets": 2,
            "curve_sets": 0,
            "k": [2],
        }
    )
    serial = run_experiment(own, tmp_path / "a" / "small", progress=False)
    spread = run_experiment(own, tmp_path / "b" / "small", progress=False, engine="ray", workers=2)
    pd.testing.assert_frame_equal(serial.results, spread.results)


@pytest.mark.parametrize("engine", ["serial", "processes"])
def test_an_address_belongs_to_ray(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"an address is a Ray cluster's, and the engine is {engine}"):
        run_experiment(parse_config(SMALL), tmp_path / "out", engine=engine, address="auto")
    assert not (tmp_path / "out").exists()


def test_no_cluster_at_an_address_is_one_line(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", NOBODY, str(tmp_path)], capture_output=True, text=True, timeout=120
    ).stdout.strip()
    assert "no Ray at '127.0.0.1:9'" in said and "ray start --head" in said and len(said.splitlines()) == 1


#: in a process of its own: this one has a cluster
NOBODY = """
from mechtransplant.engine import Ray, Recipe
from mechtransplant.errors import UsageError
try:
    Ray(Recipe("toy_workers:make"), 1, address="127.0.0.1:9").run([{"number": 1}], print)
except UsageError as error:
    print(error)
"""


def test_without_ray_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'mechtransplant\[ray\]'"):
        Ray(Recipe("toy_workers:make"), 1)
