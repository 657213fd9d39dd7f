"""Strengths that are fitted one a module, the rule that prunes while it fits, and runs whose grafts have them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_runs import small

import mechtransplant as mt
from mechtransplant.controls import deal, random_matched
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import gold_scores
from mechtransplant.experiment import run_experiment, runs_table
from mechtransplant.experiment.config import RunConfig, parse_config
from mechtransplant.explorer import MeasuredRun
from mechtransplant.export import finished_run
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair
from mechtransplant.ranking import fit_strengths, rank_modules
from mechtransplant.ranking.steps import keeping
from mechtransplant.ranking.strengths import Climb, _fitting
from mechtransplant.tasks import Splits, Task

FAST = {"rounds": 6, "steps": 2, "settle": 6, "sample": 16}


@pytest.fixture(scope="module")
def splits(addition: Task) -> Splits:
    return addition.split(32, 32, 64)


def worth(pair: Pair, split: Task, modules: Any, strength: Any = 1.0) -> float:
    with Graft(list(modules), strength).applied(pair):
        return float(gold_scores(pair.target, split)[1].mean())


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_it_climbs_the_derivative(generations: Pair, splits: Splits) -> None:
    modules = ["L0.q_proj", "L2.mlp", "L3H1"]
    climb = Climb(generations, splits.discover, modules, len(splits.discover), 0.1, 16, 0)
    climb.values = np.array([0.7, 1.4, 0.5])
    found = climb._gradient(list(range(len(splits.discover))))
    for at in range(3):
        ends = []
        for step in (-0.005, 0.005):
            strengths = climb.values.copy()
            strengths[at] += step
            ends.append(worth(generations, splits.discover, modules, list(strengths)))
        np.testing.assert_allclose(found[at], (ends[1] - ends[0]) / 0.01, rtol=0.03, atol=2e-3)


def test_fitted_strengths_are_better_than_one_for_all(generations: Pair, splits: Splits) -> None:
    top = list(rank_modules(generations, splits.discover, "gradient").module[:6])
    fitted = mt.fit_strengths(generations, splits.discover, top, seed=1)
    assert list(fitted.index) == top and fitted.between(0.01, 5).all() and fitted.nunique() == len(top)
    best = max(worth(generations, splits.choose, top, s) for s in (0.5, 1, 1.5, 2, 3))
    assert worth(generations, splits.choose, top, fitted) > best
    again = fit_strengths(generations, splits.discover, top, seed=1)
    pd.testing.assert_series_equal(fitted, again)
    assert Graft(fitted.index, fitted).strengths == tuple(fitted)


def test_questions_that_strengths_were_fitted_to_cannot_report(unchanged: Pair, splits: Splits) -> None:
    pair = unchanged
    # named by hand, so that nothing else selected them
    fitted = fit_strengths(pair, splits.choose, ["L1.up_proj", "L3.o_proj"], steps=2)
    before, source = mt.evaluate(pair.target, splits.choose), mt.evaluate(pair.source, splits.choose)
    with Graft(fitted.index, fitted).applied(pair):
        after = mt.evaluate(pair.target, splits.choose)
    with pytest.raises(UsageError, match="select"):
        mt.compare(before, source, after)


def test_pruning_keeps_so_many_within_a_share(generations: Pair, splits: Splits) -> None:
    everything = Graft(generations.modules("linear")).parameter_count(generations)
    found = rank_modules(generations, splits.discover, "pruned", k=8, share=0.3)
    top = found.module[:8]
    assert Graft(list(top)).parameter_count(generations) <= 0.3 * everything
    assert found.strength[:8].between(0.01, 5).all() and (found["rank"] == range(1, 29)).all()
    for rule in ("gradient", "per_parameter"):
        others = rank_modules(generations, splits.discover, rule).module[:8]
        plain = max(worth(generations, splits.choose, others, s) for s in (1, 1.5, 2))
        assert worth(generations, splits.choose, top, list(found.strength[:8])) > plain
    free = rank_modules(generations, splits.discover, "pruned", k=8, **FAST)
    assert Graft(list(free.module[:8])).parameter_count(generations) > 0.3 * everything
    # without a K down to one, each with what it had when it was dropped
    path = rank_modules(generations, splits.discover, "pruned", ("head", "mlp"), **FAST)
    assert len(path) == 36 and (path.strength > 0).all()


def test_steps_that_were_done_are_not_done_again(generations: Pair, splits: Splits) -> None:
    known: dict[str, Any] = {}
    computed = 0

    def keep(what: dict[str, Any], compute: Any) -> dict[str, Any]:
        nonlocal computed
        key = json.dumps(what)
        if key not in known:
            computed += 1
            known[key] = compute()
        return known[key]

    frames = []
    for _ in range(2):
        with keeping(keep):
            frames.append(rank_modules(generations, splits.discover, "pruned", k=4, **FAST))
    assert computed == FAST["rounds"] * FAST["steps"] + FAST["settle"]
    pd.testing.assert_frame_equal(*frames)


@pytest.mark.parametrize("seed", range(20))
def test_what_stays_fits_and_is_as_many(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, value = rng.integers(1, 9, 8), rng.random(8)
    alive, count = rng.random(8) < 0.8, int(rng.integers(1, 6))
    count = min(count, int(alive.sum()))
    limit = float(rng.integers(5, 30))
    stay = _fitting(value, alive, sizes, count, limit)
    sets = [list(c) for c in combinations(np.flatnonzero(alive), count)]
    possible = [c for c in sets if sizes[c].sum() <= limit]
    assert stay.sum() == count and not (stay & ~alive).any()
    if possible:
        assert sizes[stay].sum() <= limit
        # the most valuable module that any fitting set has is in it
        assert stay[max(np.unique(np.concatenate(possible)), key=lambda i: value[i])]


def test_wrong_input(generations: Pair, splits: Splits) -> None:
    with pytest.raises(UsageError, match=r"questions that do not report: pass task\.split\(…\)\.discover"):
        fit_strengths(generations, splits.test, ["L0.mlp"])
    with pytest.raises(UsageError, match="no modules were named"):
        fit_strengths(generations, splits.discover, [])
    with pytest.raises(UsageError, match="rate must be above 0"):
        fit_strengths(generations, splits.discover, ["L0.mlp"], rate=0)
    with pytest.raises(UsageError, match="steps must be a whole number"):
        fit_strengths(generations, splits.discover, ["L0.mlp"], steps=0)
    with pytest.raises(UsageError, match=r"share: no 5 modules have together at most 0\.001"):
        rank_modules(generations, splits.discover, "pruned", k=5, share=0.001)
    with pytest.raises(UsageError, match="k = 29 is above the 28 modules"):
        rank_modules(generations, splits.discover, "pruned", k=29)
    with pytest.raises(UsageError, match="heads that share K and V"):
        rank_modules(generations, splits.discover, "pruned", "head", kv="group")
    with pytest.raises(UsageError, match="strengths are dealt to a set that is matched"):
        deal(generations, ["L0.q_proj"], [1.0], [("L0.up_proj",)])


def test_a_score_for_every_number(generations: Pair, splits: Splits) -> None:
    for of, task in (("gradient", splits.discover), ("weight_delta", None)):
        plain = rank_modules(generations, task, of).set_index("module").score
        found = rank_modules(generations, task, "per_parameter", of=of).set_index("module").score
        for module in generations.modules("linear"):
            size = Graft([module]).parameter_count(generations)
            np.testing.assert_allclose(found[module], plain[module] / size, rtol=1e-6)
    heads = rank_modules(generations, splits.discover, "per_parameter", "head", kv="group")
    alone = rank_modules(generations, splits.discover, "gradient", "head", kv="group").set_index("module").score
    first = heads.iloc[0]
    size = Graft([first.module], kv="group").parameter_count(generations)
    np.testing.assert_allclose(first.score, alone[first.module] / size, rtol=1e-6)


# --- runs -------------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> RunConfig:
    own = {"rule": "pruned", "rule_options": {**FAST, "share": 0.5}, "k": [4, 6], "refitted_sets": 2}
    return parse_config(small(**{**own, "curve_sets": 1, **changes}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_experiment(config(), tmp_path_factory.mktemp("strengths") / "run", progress=False)


def test_a_run_grafts_what_was_fitted(finished: Any, generations: Pair, splits: Splits) -> None:
    k = len(finished.graft)
    ranking = pd.read_csv(finished.folder / "rankings" / f"pruned-{k}.csv")
    assert finished.graft.strengths == tuple(ranking.strength[:k]) and len(set(finished.graft.strengths)) == k
    row = finished.results.query("split == 'test' and role == 'graft'").set_index("k").loc[k]
    with finished.graft.applied(generations):
        # the run's own test questions
        from mechtransplant.experiment.setup import build_task

        test = build_task(config(), generations).split(16, 24, 48).test
        accuracy = mt.evaluate(generations.target, test).accuracy
    assert accuracy == row.accuracy
    assert "strengths are fitted on `discover`, one a module" in finished.summary
    assert "self-graft's answers and log-probabilities are bit-identical" in finished.summary
    # the way to an export
    again = finished_run(finished.folder)
    assert again.graft.strengths == finished.graft.strengths and again.graft.modules == finished.graft.modules


def test_random_sets_have_the_same_strengths_or_their_own(finished: Any, generations: Pair) -> None:
    k, ours = len(finished.graft), sorted(finished.graft.strengths)
    cells = [json.loads(line) for line in (finished.folder / "cells.jsonl").read_text().splitlines()]
    drawn = [c for c in cells if c["role"] == "random" and c["k"] == k]
    dealt = [c for c in drawn if sorted(c["strengths"]) == ours]
    fitted = [c for c in drawn if sorted(c["strengths"]) != ours]
    assert len(dealt) == 4 + 1, "random sets, and an order's beginning"
    assert len(fitted) == 2
    sets = random_matched(generations, finished.graft.modules, 4, 42 + k).sets
    assert {frozenset(c["modules"]) for c in fitted} == {frozenset(s) for s in sets[:2]}
    rows = finished.results[finished.results["set"].str.startswith("refitted")]
    assert len(rows) == 2
    table = pd.read_csv(finished.folder / "rules.csv").iloc[0]
    assert table.refitted_n == 2 and table.refitted_beaten == (rows.accuracy < table.after).sum()
    assert "2 of them with strengths fitted to them" in finished.summary
    assert "matched random sets with its strengths dealt anew" in finished.summary
    assert f"it beats {table.refitted_beaten:.0f} of 2 of them (p = " in finished.summary
    assert "of which the smallest possible is 0.33)." in finished.summary
    lowest = pd.read_csv(finished.folder / "rankings" / f"pruned-{k}.csv")[::-1][:k]
    (bottom,) = [c for c in cells if c["role"] == "bottom"]
    assert bottom["strengths"] == list(lowest.strength)
    assert runs_table([finished.folder]).refitted_n.iloc[0] == 2


def test_what_strengths_do_not_go_with(generations: Pair, splits: Splits, tmp_path: Path) -> None:
    for changes, said in (
        ({"operator": "slerp"}, "fits strengths for the operator replace"),
        ({"rule": "lae", "rule_options": {}}, "no rule with controls fits strengths"),
        (
            {"rule": ["lae", "pruned"], "rule_options": {"pruned": FAST}, "controlled": ["lae"]},
            "no rule with controls fits strengths",
        ),
        ({"random_sets": 1}, "2 of 1 random sets cannot be fitted to"),
        ({"kind": ["attn", "head"]}, "may share weights: give one kind, head and mlp, or head and neuron"),
        ({"kind": "head", "kv": "group"}, "leave kv out"),
    ):
        with pytest.raises(UsageError, match=said):
            run_experiment(config(**changes), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()
    ranking = rank_modules(generations, splits.discover, "pruned", k=4, **FAST)
    with pytest.raises(UsageError, match="gives every module a strength of its own"):
        mt.graft_with_controls(generations, ranking, 4, splits.test)


def test_orders_of_a_rule_that_is_told_its_k(tmp_path: Path) -> None:
    given = config(rule_options={**FAST, "k": 4}, k=[2, 4, 9], curve_sets=2, side_effects=None, refitted_sets=0)
    run = run_experiment(given, tmp_path / "run", progress=False)
    cells = [json.loads(line) for line in (run.folder / "cells.jsonl").read_text().splitlines()]
    order = pd.read_csv(run.folder / "ranking.csv")
    for k in (2, 4, 9):
        drawn = [c for c in cells if c["role"] == "random" and c["k"] == k]
        assert drawn and all(sorted(c["strengths"]) == sorted(order.strength[:k]) for c in drawn)
    assert "does not separate the choice of modules from the fit." in run.summary


def test_any_engine_and_a_second_start(finished: Any, tmp_path: Path) -> None:
    other = run_experiment(config(), tmp_path / "run", progress=False, engine="processes", workers=2)
    assert list(other.results.correct) == list(finished.results.correct)
    before = (finished.folder / "cells.jsonl").read_bytes()
    run_experiment(config(), finished.folder, progress=False)
    assert (finished.folder / "cells.jsonl").read_bytes() == before


def test_the_explorer_tells_them_from_one_strength(finished: Any) -> None:
    run, k = MeasuredRun(finished.folder), len(finished.graft)
    modules = frozenset(map(str, finished.graft.modules))
    assert run.of_set(modules, 1.0, "test", run.budgets[-1]) is None
    found = run.of_set(modules, 1.0, "test", run.budgets[-1], fitted=True)
    assert found is not None and found.accuracy == finished.outcomes[run.budgets[-1]].after_accuracy
    again = run.measure(finished.graft.modules, 1.0, "test", finished.graft.strengths)
    assert again[run.budgets[-1]].accuracy == found.accuracy
    widget = mt.explore(finished.folder)
    widget.k.value = k
    assert widget.graft.modules == finished.graft.modules and widget.graft.strengths == finished.graft.strengths
    said = widget.text()
    assert "fitted strengths × 1" in said and "not measured" not in said
    assert f"strengths={list(finished.graft.strengths)}" in widget.code()
    widget._clicked(next(iter(widget.chosen)))
    assert "strengths=" not in widget.code() and set(widget.graft.strengths) == {1.0}


@pytest.mark.parametrize("kind", ["linear", "head", ["head", "mlp"]])
def test_a_report_ranks_nothing_more(kind: Any, tmp_path: Path) -> None:
    # a share that half of the layers would not fit into
    given = config(kind=kind, k=[2, 3], rule_options={**FAST, "share": 0.15}, side_effects=None, refitted_sets=0)
    run = run_experiment(given, tmp_path / "run", progress=False)
    names = {p.name for p in (run.folder / "rankings").iterdir()}
    assert {n for n in names if "unrelated" not in n} == {"pruned-2.csv", "pruned-3.csv"}
    assert not (run.folder / "ranking.csv").exists() and len(run.ranking) == len(
        run.findings.grafts["pruned"]
    ) - 1 + len(pd.read_csv(run.folder / "rankings" / "pruned-2.csv"))
    assert (run.folder / "figures" / "k_curve.png").exists()
    assert ("K of this run, each with a ranking of its own." in run.summary) == (kind == "linear")


def test_all_candidates_have_strengths_that_were_fitted_together(tmp_path: Path) -> None:
    given = {"k": [1.0], "rule_options": FAST, "random_sets": 0, "refitted_sets": 0, "side_effects": None}
    run = run_experiment(config(**given), tmp_path / "run", progress=False)
    assert len(run.graft) == 28 and (run.folder / "rankings" / "pruned-28.csv").exists()
    assert not (run.folder / "ranking.csv").exists()
    with pytest.raises(UsageError, match="share: no 28 modules"):
        run_experiment(config(**{**given, "rule_options": {**FAST, "share": 0.5}}), tmp_path / "b", progress=False)
