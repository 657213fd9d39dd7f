"""Grafts that keep the largest changes of every module, beside those that keep as many at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import small

import mechtransplant as mt
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.experiment import ScreenConfig, recheck, report_screen, run_experiment, runs_table
from mechtransplant.experiment.config import RunConfig, parse_config
from mechtransplant.experiment.random_weights import RandomNumbers, random_weights
from mechtransplant.experiment.run import Run
from mechtransplant.explorer.cells import MeasuredRun
from mechtransplant.figures import run_rows
from mechtransplant.grafting import Graft

TIES = {"name": "ties", "density": 0.15}


def config(**changes: Any) -> RunConfig:
    lean: dict[str, Any] = {
        "rule": "weight_delta", "k": [28], "strengths": [1.0, 1.5], "random_sets": 0, "curve_sets": 0,
        "controls": ["all", "bottom", "unrelated"], "operator": TIES, "random_weights": 3, "parameters": 0.16,
        "side_effects": None,
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

    def counted(graft: Graft) -> int:
        with graft.applied(pair):
            changed = sum(int((p != before[name]).sum()) for name, p in pair.target_parameters.items())
        assert changed == graft.changed_count(pair) and graft.parameter_count(pair) == whole.parameter_count(pair)
        return changed

    for operator in (TIES, {"name": "dare", "density": 0.15}):
        assert counted(Graft(modules, operator=operator)) == pytest.approx(0.15 * whole.parameter_count(pair), rel=0.02)
    # changes that are equally large are all kept
    with torch.no_grad():
        for name, p in pair.source_parameters.items():
            p.copy_(before[name] + (p - before[name]).sign())
    assert counted(Graft(modules, operator=TIES)) > 0.9 * whole.parameter_count(pair)
    assert Graft(modules, 0.0, operator=TIES).changed_count(pair) == 0


def test_draws_differ_and_their_strength_is_chosen_on_choose(run: Any) -> None:
    rows = run.results[run.results.role == "random_weights"]
    choose, test = rows[rows.split == "choose"], rows[rows.split == "test"]
    scales = [0.15, 0.15**0.5, 1.0]
    assert list(choose.strength) == pytest.approx([s * scale for scale in scales for s in (1.0, 1.5)], rel=1e-3)
    assert set(choose["set"]) == {"weights-0"}
    best = choose.sort_values(["accuracy", "strength"], ascending=[False, True]).strength.iloc[0]
    assert set(test.strength) == {best} and list(test["set"]) == ["weights-1", "weights-2", "weights-3"]
    assert test.log_probability.nunique() == 3
    pair = mt.load_pair("family/generations")
    splits = mt.load_task("addition").split(discover=16, choose=24, test=48, seed=0)
    modules = pair.modules("linear")
    density = Graft(modules, operator=TIES).changed_count(pair) / Graft(modules).parameter_count(pair)
    assert density == pytest.approx(0.15, abs=1e-3)
    cells = [json.loads(line) for line in (run.folder / "cells.jsonl").read_text().splitlines()]
    drawn = [cell["operator"] for cell in cells if cell.get("operator")][-2]
    assert drawn == {"name": "dare", "density": drawn["density"], "rescale": "density", "seed": 42 + 2}
    # a share of the numbers that differ at all
    assert drawn["density"] == pytest.approx(density, abs=2e-3)
    with Graft(modules, best, operator=drawn).applied(pair):
        found = evaluate(pair.target, splits.test, batch_size=64)
    row = test.iloc[1]
    assert row.correct == "".join("1" if c else "0" for c in found.correct)
    assert found.log_probability is not None
    assert row.log_probability == pytest.approx(found.log_probability.mean(), abs=1e-6)


def test_the_explorer_shows_the_graft_and_no_draw(run: Any) -> None:
    test = run.results[run.results.split == "test"]
    graft, drawn = test[test.role == "graft"].iloc[0], test[test.role == "random_weights"]
    sets = MeasuredRun(run.folder)._sets
    key = ("test", frozenset(run.graft.modules), float(graft.strength), int(graft.budget), False)
    assert "".join("1" if c else "0" for c in sets[key]) == graft.correct
    if drawn.strength.iloc[0] != graft.strength:
        assert (*key[:2], float(drawn.strength.iloc[0]), *key[3:]) not in sets


def test_rules_of_few_modules_in_several_processes(run: Any, tmp_path: Path) -> None:
    some = {
        "rule": ["weight_delta", "depth"], "k": [4, 9], "operator": {"name": "ties", "density": 0.5},
        "random_weights": 2, "random_sets": 3, "parameters": None, "budgets": [2, 6],
    }  # fmt: skip
    plain = run_experiment(config(**some), tmp_path / "plain", progress=False)
    shared = run_experiment(config(**some), tmp_path / "shared", progress=False, engine="processes", workers=2)
    rows = plain.results[(plain.results.role == "random_weights") & (plain.results.split == "test")]
    assert {rule: len(found) for rule, found in rows.groupby("rule")} == {"weight_delta": 4, "depth": 4}
    pd.testing.assert_frame_equal(plain.results, shared.results)
    row = runs_table([plain.folder]).iloc[1]
    assert (
        row.weights_n == 2
        and row.random_n == 3
        and row.changed_share == pytest.approx(row.parameter_share / 2, rel=0.01)
    )


def test_a_screen_that_counts_changes_takes_more_modules(tmp_path: Path) -> None:
    same: dict[str, Any] = {
        "pair": "family/generations", "task": "addition", "split": {"discover": 16, "choose": 24, "test": 48},
        "rules": ["weight_delta"], "operators": ["replace", TIES], "shares": [0.15], "texts": 0,
    }  # fmt: skip
    sizes = {}
    for counted in ("modules", "changes"):
        page = report_screen(ScreenConfig(**same, counted=counted), tmp_path / counted, progress=False)
        table = pd.read_csv(tmp_path / counted / "screen.csv")
        sizes[counted] = list(table.k)
        assert (table.parameters <= 0.15).all() and ("that a graft changes" in page) == (counted == "changes")
    assert sizes["modules"][0] == sizes["modules"][1] == sizes["changes"][0] < sizes["changes"][1] == 28
    assert table.parameters.iloc[1] == pytest.approx(0.15, abs=1e-3)


def test_the_page_and_the_table_say_where_the_graft_stands(run: Any) -> None:
    test = run.results[run.results.split == "test"]
    graft, drawn = test[test.role == "graft"].iloc[0], test[test.role == "random_weights"].accuracy
    beaten = int((drawn < graft.accuracy).sum())
    table = runs_table([run.folder])
    row = table.iloc[0]
    assert (row.k, row.candidates, row.weights_n, row.weights_beaten) == (28, 28, 3, beaten)
    assert row.weights_median == pytest.approx(np.median(drawn)) and np.isnan(row.random_n)
    assert row.changed_share == pytest.approx(0.15, abs=1e-3) and row.parameter_share == 1
    nats = test[test.role == "random_weights"].log_probability
    better = int((nats < graft.log_probability).sum())
    assert row.weights_beaten_log_probability == better
    assert row.weights_p_value_log_probability == pytest.approx((4 - better) / 4)
    assert f"and by log-probability {better} (p = " in run.summary
    assert f"It beats {beaten} of 3 grafts of the same modules that change as many numbers" in run.summary
    assert "3 draws at strength" in run.summary and "it keeps the largest changes of every module: 15.0" in run.summary
    assert "never chosen" not in run.summary and "would be the same graft" in run.summary
    assert not set(run.results.role) & {"bottom", "unrelated"}
    _, (left, _) = run_rows(table)
    assert any("as many changes at random" in str(h.get_label()) for h in left.get_legend_handles_labels()[0])


def test_a_draw_is_the_same_when_it_is_computed_again(run: Any) -> None:
    again = recheck(run.folder, cells=99)
    assert (again.role == "random_weights").sum() == 9 and again.same.all()


def test_the_estimate_counts_them(run: Any, tmp_path: Any) -> None:
    before = Run(config(), tmp_path / "other", progress=False).estimate()
    computed = len((run.folder / "cells.jsonl").read_bytes().splitlines())
    assert computed <= before.total <= computed + 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"operator": "replace"}, "the operator replace does not keep the largest changes"),
        ({"operator": {"name": "dare", "density": 0.15}}, "the operator dare does not keep"),
        ({"operator": {"name": "ties", "density": 1}}, "TIES at density 1 keeps every change"),
        ({"operator": {"name": "ties", "normalize": True}}, "with normalize it ignores"),
        ({"controlled": []}, "no rule has controls"),
        (
            {"pair": {"source": "repo:family/first", "target": "repo:family/second", "base": "repo:family/first"}},
            "with an ancestor",
        ),
        ({"operator": {"name": "ties", "density": 0.2}}, "change more than 16.0% of the parameters"),
    ],
)
def test_what_has_no_random_weights_is_refused(changes: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=said):
        run_experiment(config(**changes), tmp_path / "wrong", progress=False)


def test_draws_are_a_control_of_their_own(run: Any) -> None:
    assert "no random sets were compared" not in run.summary and "It beats " in run.summary
    saved = next(iter(json.loads((run.folder / "outcome.json").read_text()).values()))
    assert [note for note in saved["notes"] if "random" in note] == [
        "no random set of modules exists: compared are grafts of the same modules that change as many numbers, drawn "
        "at random"
    ]


def test_few_changes_leave_nothing_to_draw() -> None:
    pair = mt.load_pair("family/generations")
    modules = pair.modules("linear")
    found = random_weights("weight_delta", modules, "never", TIES, pair)
    assert isinstance(found, RandomNumbers) and found.density == pytest.approx(0.15, abs=2e-3)
    with torch.no_grad():
        for name, p in pair.source_parameters.items():
            p[1:] = pair.target_parameters[name][1:]
    with pytest.raises(UsageError, match=r"keeps all .* changes of weight_delta's modules"):
        random_weights("weight_delta", modules, "never", TIES, pair)


def test_a_screen_counts_changes_of_modules_that_share_none() -> None:
    for wrong in ({"kv": "group"}, {"kinds": [["linear", "mlp"]]}):
        with pytest.raises(ValueError, match="counted by module"):
            ScreenConfig.model_validate({"pair": "family/generations", "counted": "changes", **wrong})
