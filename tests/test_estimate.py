"""What a run says that it will cost, beside what it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import small

from mechtransplant.experiment import Run
from mechtransplant.experiment.config import parse_config
from mechtransplant.experiment.worker import EngineChoice
from mechtransplant.progress import in_words

SMALL = small(rule="weight_delta", k=[2, 8], controls=["bottom", "reverse", "self"], random_sets=6, curve_sets=4)


def test_the_estimate_counts_the_cells_that_a_run_computes(tmp_path: Path) -> None:
    run = Run(parse_config(SMALL), tmp_path / "small", progress=False)
    before = run.estimate()
    assert not (tmp_path / "small").exists() and before.finished == 0 and before.seconds > 0
    run.execute()
    computed = len(run.store.cells)
    # a control may be a set that was computed already: never more than was said, and not many fewer
    assert computed <= before.total <= 1.1 * computed + 2
    after = run.estimate()
    assert after.finished == computed and after.remaining_seconds <= 0.1 * after.total * 300 * after.seconds
    shared = Run(
        parse_config(SMALL), tmp_path / "small", progress=False, engine=EngineChoice("processes", 4)
    ).estimate()
    assert shared.total == before.total and "shared by 4 workers" in str(shared) and "workers" not in str(before)
    assert f"{before.total:,} cells" in str(before) and f"{computed:,} of them finished" in str(after)
    again = Run(parse_config(SMALL), tmp_path / "again", progress=False, reuse=tmp_path / "small").estimate()
    assert f"shares with the {computed:,} cells of the run to reuse" in str(again) and "reuse" not in str(after)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (84, "84 s"),
        (150, "2.5 min"),
        (5000, "1.4 h"),
        (10_800, "3 h"),
        (90_000, "25 h"),
        (9e5, "10 days"),
    ],
)
def test_times_in_words(seconds: float, said: str) -> None:
    assert in_words(seconds) == said


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    command = [
        sys.executable,
        "-m",
        "mechtransplant.cli",
        "run",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "cells, about" in done.stdout and not (tmp_path / "out").exists()
