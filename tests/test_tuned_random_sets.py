"""Random sets at the strength that suits them, beside random sets at the graft's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import small

from mechtransplant.errors import UsageError
from mechtransplant.experiment import recheck, run_experiment, runs_table
from mechtransplant.experiment.config import RunConfig, parse_config
from mechtransplant.experiment.run import Run


def config(**changes: Any) -> RunConfig:
    lean: dict[str, Any] = {
        "rule": "weight_delta", "k": [9], "strengths": [0.3], "random_sets": 5, "curve_sets": 0, "controls": ["all"],
        "random_strengths": [0.2, 1.0, 2.0], "choose_by": "log_probability", "side_effects": None,
    }  # fmt: skip
    return parse_config(small(**{**lean, **changes}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_experiment(config(), tmp_path_factory.mktemp("tuned") / "run", progress=False)


def test_the_strength_that_suits_three_of_them_on_choose_is_taken(run: Any) -> None:
    rows = run.results[run.results.role == "random"]
    choose, test = rows[rows.split == "choose"], rows[rows.split == "test"]
    assert list(choose["set"].unique()) == ["tuned-0", "tuned-1", "tuned-2"]
    means = choose.groupby("strength").log_probability.mean()
    assert sorted(means.index) == [0.2, 0.3, 1.0, 2.0]
    best = means.idxmax()
    # the graft's strength was chosen to be a bad one
    assert best != 0.3
    own, tuned = test[test["set"].str.startswith("set")], test[test["set"].str.startswith("tuned")]
    assert set(own.strength) == {0.3} and set(tuned.strength) == {best} and len(own) == len(tuned) == 5
    assert tuned.log_probability.mean() > own.log_probability.mean()


def test_the_table_and_the_page_say_both(run: Any) -> None:
    test = run.results[(run.results.split == "test") & (run.results.role == "random")]
    tuned = test[test["set"].str.startswith("tuned")]
    row = runs_table([run.folder]).iloc[0]
    assert row.tuned_n == 5 and row.tuned_strength == tuned.strength.iloc[0]
    assert row.tuned_median == pytest.approx(np.median(tuned.accuracy))
    assert row.tuned_beaten == (tuned.accuracy < row.after).sum()
    own = test[test["set"].str.startswith("set")].accuracy
    assert row.random_median == pytest.approx(np.median(own)) and row.random_n == 5
    said = f"which suits random sets best on `choose`, it beats {row.tuned_beaten:.0f} of 5"
    assert (
        f"At strength {row.tuned_strength:g}, {said}" in run.summary
        and "the same random sets at strength" in run.summary
    )
    assert recheck(run.folder, cells=99).same.all()


def test_where_nothing_differs_rounding_beats_none_of_them(tmp_path: Path) -> None:
    # every head of this pair is the same in both models
    same = config(pair="family/planted-mlps", task="sort", kind="head")
    row = run_experiment(same, tmp_path / "same", progress=False).rules.iloc[0]
    assert row.log_probability_change == pytest.approx(0, abs=1e-6)
    assert row.tuned_beaten_log_probability == 0 and row.tuned_p_value_log_probability == 1


def test_where_the_grafts_strength_suits_them_nothing_more_is_computed(run: Any, tmp_path: Path) -> None:
    best = float(runs_table([run.folder]).tuned_strength.iloc[0])
    same = run_experiment(config(strengths=[best]), tmp_path / "same", progress=False, reuse=run.folder)
    row = runs_table([same.folder]).iloc[0]
    assert row.strength == row.tuned_strength and row.random_beaten == row.tuned_beaten
    assert (
        "its strength suits random sets best as well" in same.summary
        and "the same random sets at strength" not in same.summary
    )
    plain = run_experiment(config(random_strengths=[]), tmp_path / "plain", progress=False, reuse=run.folder)
    assert "tuned_n" not in runs_table([plain.folder]) and "suits random sets" not in plain.summary
    assert "Random sets have its strength, 0.3, which was chosen for it: `random_strengths`" in plain.summary


def test_the_estimate_counts_them(run: Any, tmp_path: Path) -> None:
    before = Run(config(), tmp_path / "other", progress=False).estimate()
    computed = len((run.folder / "cells.jsonl").read_bytes().splitlines())
    assert computed <= before.total <= computed + 2


def test_strengths_are_numbers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="random_strengths"):
        parse_config(small(random_strengths=["strong"]))
    for changes in ({"random_sets": 2}, {"controlled": []}):
        with pytest.raises(UsageError, match="random_strengths: they are tried on 3 random sets"):
            Run(config(**changes), tmp_path / "none", progress=False)
    # everything grafted has no random sets
    everything = run_experiment(config(k=[28]), tmp_path / "all", progress=False)
    assert "tuned_n" not in runs_table([everything.folder])
