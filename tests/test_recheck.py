"""A run's evaluations, computed again, are what its folder says; what was changed there is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import small
from typer.testing import CliRunner

import mechtransplant as mt
from mechtransplant.cli import app
from mechtransplant.errors import UsageError
from mechtransplant.experiment import parse_config, run_experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = {"rule": "weight_delta", "k": [3], "random_sets": 2, "curve_sets": 0, "gate": {"texts": 8, "tokens": 8}}
    return run_experiment(parse_config(small(**given)), tmp_path_factory.mktemp("recheck") / "run", False).folder


def test_everything_again_is_the_same(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    found = mt.recheck(finished, cells=1000)
    assert set(found.role) >= {"target", "source", "graft", "random", "bottom", "reverse", "self", "all"}
    assert found.same.all() and (found.accuracy == found.again).all() and (found.differ == 0).all()
    assert (found.nats < 1e-5).all()
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}, "it only reads"
    few = [mt.recheck(finished, cells=2, seed=seed) for seed in (1, 1, 2)]
    assert len(few[0]) == 2 and few[0].equals(few[1]) and not few[0].equals(few[2])


def test_a_run_that_turned_its_pair(tmp_path: Path) -> None:
    given = {"rule": "weight_delta", "k": [3], "random_sets": 1, "curve_sets": 0, "side_effects": None}
    given |= {"direction": "better", "pair": {"source": "repo:family/second", "target": "repo:family/first"}}
    folder = run_experiment(parse_config(small(**given)), tmp_path / "run", False).folder
    assert json.loads((folder / "environment.json").read_text())["weights"]
    found = mt.recheck(folder, cells=1000)
    assert found.same.all() and {"target", "source", "graft"} <= set(found.role)


def changed(finished: Path, to: Path, change: Any) -> Path:
    folder = Path(shutil.copytree(finished, to))
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    (folder / "cells.jsonl").write_text("".join(json.dumps(change(c)) + "\n" for c in cells))
    return folder


def test_what_was_changed_is_found(finished: Path, tmp_path: Path) -> None:
    def flip(cell: dict[str, Any]) -> dict[str, Any]:
        for found in cell.get("budgets", {}).values():
            if cell["role"] == "graft":
                found["correct"] = found["correct"].translate(str.maketrans("01", "10"))
            elif cell["role"] == "bottom":
                found["log_probability"][3] += 1e-4
        return cell

    folder = changed(finished, tmp_path / "run", flip)
    found = mt.recheck(folder, cells=1000)
    assert set(found[~found.same].role) == {"graft", "bottom"}
    assert (
        found[found.role == "graft"].differ == found[found.role == "graft"].split.map({"choose": 24, "test": 48})
    ).all()
    assert found[found.role == "bottom"].nats.iloc[0] == pytest.approx(1e-4, rel=0.01)
    said = CliRunner().invoke(app, ["recheck", str(folder), "--cells", "1000"])
    assert said.exit_code == 1 and f"of {len(found)} have the same verdicts" in said.output
    said = CliRunner().invoke(app, ["recheck", str(finished), "--cells", "2"])
    assert said.exit_code == 0 and "2 of 2 have the same verdicts, 2 also" in said.output


def test_what_is_no_run_or_another(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        mt.recheck(tmp_path)
    folder = Path(shutil.copytree(finished, tmp_path / "other"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("batch_size: 64", "batch_size: 8"))
    with pytest.raises(UsageError, match="does not make its cell"):
        mt.recheck(folder)
    (folder / "cells.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds no evaluation yet"):
        mt.recheck(folder)
