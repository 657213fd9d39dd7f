"""Grafts that keep the largest changes of every module, beside those that keep as many at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_runs import small

import mechtransplant as mt
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.experiment import recheck, run_experiment, runs_table
from mechtransplant.experiment.config import RunConfig, parse_config
from mechtransplant.experiment.run import Run
from mechtransplant.figures import run_rows
from mechtransplant.grafting import Graft

TIES = {"name": "ties", "density": 0.15}


def config(**changes: Any) -> RunConfig:
    lean: dict[str, Any] = {
        "rule": "weight_delta", "k": [28], "strengths": [1.0, 1.5], "random_sets": 0, "curve_sets": 0,
        "controls": ["all"], "operator": TIES, "random_weights": 3, "parameters": 0.15, "side_effects": None,
    }  # fmt: skip
    return parse_config(small(**{**lean, **changes}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_experiment(config(), tmp_path_factory.mktemp("weights") / "run", progress=False)


def test_a_graft_counts_the_numbers_that_it_changes() -> None:
    pair = mt.load_pair("family/generations")
    modules = pair.modules("linear")
    before = {name: p.detach().clone() for name, p in pair.target_parameters.items()}
    whole = Graft(modules)
    assert whole.changed_count(pair) == whole.parameter_count(pair)
    for operator in (TIES, {"name": "dare", "density": 0.15}):
        graft = Graft(modules, operator=operator)
        with graft.applied(pair):
            changed = sum(int((p != before[name]).sum()) for name, p in pair.target_parameters.items())
        assert graft.parameter_count(pair) == whole.parameter_count(pair)
        assert changed == pytest.approx(graft.changed_count(pair), rel=0.02)
        assert graft.changed_count(pair) == pytest.approx(0.15 * whole.parameter_count(pair), rel=0.001)
    pair.base = pair.target
    assert Graft(modules, operator=TIES).changed_count(pair) == whole.parameter_count(pair)


def test_draws_differ_and_their_strength_is_chosen_on_choose(run: Any) -> None:
    rows = run.results[run.results.role == "random_weights"]
    choose, test = rows[rows.split == "choose"], rows[rows.split == "test"]
    assert list(choose.strength) == [1.0, 1.5] and set(choose["set"]) == {"weights-0"}
    best = choose.sort_values("accuracy", ascending=False, kind="stable").strength.iloc[0]
    assert set(test.strength) == {best} and list(test["set"]) == ["weights-1", "weights-2", "weights-3"]
    assert test.log_probability.nunique() == 3
    pair = mt.load_pair("family/generations")
    splits = mt.load_task("addition").split(discover=16, choose=24, test=48, seed=0)
    drawn = {"name": "dare", "density": 0.15, "rescale": "density", "seed": 42 + 2}
    with Graft(pair.modules("linear"), best, operator=drawn).applied(pair):
        found = evaluate(pair.target, splits.test, batch_size=64)
    row = test.iloc[1]
    assert row.correct == "".join("1" if c else "0" for c in found.correct)
    assert found.log_probability is not None
    assert row.log_probability == pytest.approx(found.log_probability.mean(), abs=1e-6)


def test_the_page_and_the_table_say_where_the_graft_stands(run: Any) -> None:
    test = run.results[run.results.split == "test"]
    graft, drawn = test[test.role == "graft"].iloc[0], test[test.role == "random_weights"].accuracy
    beaten = int((drawn < graft.accuracy).sum())
    table = runs_table([run.folder])
    row = table.iloc[0]
    assert (row.k, row.candidates, row.weights_n, row.weights_beaten) == (28, 28, 3, beaten)
    assert row.weights_median == pytest.approx(np.median(drawn)) and np.isnan(row.random_n)
    assert row.changed_share == pytest.approx(0.15, abs=1e-3) and row.parameter_share == 1
    assert f"It beats {beaten} of 3 grafts of the same modules that change as many numbers" in run.summary
    assert "3 draws at strength" in run.summary and "changes the largest differences alone: 15.0" in run.summary
    assert "never chosen" not in run.summary
    _, (left, _) = run_rows(table)
    assert any("random weights" in str(h.get_label()) for h in left.get_legend_handles_labels()[0])


def test_a_draw_is_the_same_when_it_is_computed_again(run: Any) -> None:
    again = recheck(run.folder, cells=99)
    assert (again.role == "random_weights").sum() == 5 and again.same.all()


def test_the_estimate_counts_them(run: Any, tmp_path: Any) -> None:
    before = Run(config(), tmp_path / "other", progress=False).estimate()
    computed = len((run.folder / "cells.jsonl").read_bytes().splitlines())
    assert computed <= before.total <= computed + 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"operator": "replace"}, "the operator replace does not keep the largest changes"),
        ({"operator": {"name": "dare", "density": 0.15}}, "the operator dare does not keep"),
        ({"controlled": []}, "no rule has controls"),
        (
            {"pair": {"source": "repo:family/first", "target": "repo:family/second", "base": "repo:family/first"}},
            "with an ancestor",
        ),
        ({"operator": {"name": "ties", "density": 0.2}}, "changes more than 15.0% of them"),
    ],
)
def test_what_has_no_random_weights_is_refused(changes: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=said):
        run_experiment(config(**changes), tmp_path / "wrong", progress=False)
