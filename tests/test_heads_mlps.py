"""Heads against MLPs: planted skills are found in their kind, sizes match, and a killed start loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import compare, evaluate
from mechtransplant.experiment import HeadsMlpsConfig, heads_mlps_study, report_heads_and_mlps
from mechtransplant.experiment.heads_mlps_sets import Arm, ModuleSet, candidates_in, random_sets, sets_of
from mechtransplant.figures import heads_against_mlps_bars
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair, load_pair
from mechtransplant.patching import Ablation, reference_activations
from mechtransplant.patching.heads_and_mlps import parameter_count
from mechtransplant.ranking import rank_modules
from mechtransplant.significance import rank_among
from mechtransplant.tasks import Splits, load_task

MLPS = HeadsMlpsConfig("family/planted-mlps-drifted", counts=(1, 2), sets=5, discover=16, test=40)
HEADS = HeadsMlpsConfig("family/planted-heads-drifted", counts=(1, 4, 8), methods=(), sets=5, discover=16, test=40)
Run = Callable[..., tuple[int, str, str]]


def row_of(table: pd.DataFrame, intervention: str, match: str, arm: str, count: int, depth: str = "all") -> pd.Series:
    """The one row of these."""
    wanted = {"intervention": intervention, "match": match, "arm": arm, "count": count, "depth": depth}
    found = table[np.logical_and.reduce([table[key] == value for key, value in wanted.items()])]
    assert len(found) == 1
    return found.iloc[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of planted MLPs, killed after 20 evaluations and started again."""
    out = tmp_path_factory.mktemp("heads_mlps") / "out"
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def killed(*arguments, **options):  # type: ignore[no-untyped-def]
            calls.append(arguments)
            if len(calls) > 20:
                raise KeyboardInterrupt
            return evaluate(*arguments, **options)

        patch.setattr(heads_mlps_study, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            report_heads_and_mlps(MLPS, out, progress=False)
    assert len((out / "cells.jsonl").read_text().splitlines()) == 20
    report_heads_and_mlps(MLPS, out, progress=False)
    return out


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "study.csv")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load_pair(MLPS.pair)


@pytest.fixture(scope="module")
def splits(pair: Pair) -> Splits:
    return load_task(str(pair.default_task)).split(16, 1, 40, 0)


def test_planted_mlps_beat_heads_and_random_mlps(table: pd.DataFrame) -> None:
    mlp, head = (row_of(table, "graft", "parameters", arm, 1) for arm in ("mlp", "head"))
    assert mlp.log_probability_low > head.log_probability_high
    assert mlp.log_probability_beaten == mlp.random_sets == 3
    both = row_of(table, "graft", "parameters", "mlp", 2)
    assert set(both.names.split()) == {"L1.mlp", "L2.mlp"} and both.accuracy > 0.8
    assert both.beaten == both.random_sets == 5 and both.p == pytest.approx(1 / 6)
    assert both.accuracy_low > row_of(table, "graft", "modules", "head", 2).accuracy_high


def test_planted_heads_beat_mlps_and_random_heads(tmp_path: Path) -> None:
    page = report_heads_and_mlps(HEADS, tmp_path, progress=False)
    table = pd.read_csv(tmp_path / "study.csv")
    # all heads have the parameters of an MLP here: nothing is left to draw from
    head, mlp = (row_of(table, "graft", "parameters", arm, 1) for arm in ("head", "mlp"))
    assert head.modules == 32 and head.near == pytest.approx(32 * 4096 / 147456) and head.random_sets == 0
    assert np.isnan(head.p) and "there is no other set to compare with" in page
    assert head.accuracy_low > mlp.accuracy_high
    for count in (1, 4):
        head, mlp = (row_of(table, "graft", "modules", arm, count) for arm in ("head", "mlp"))
        assert head.log_probability_low > mlp.log_probability_high
        assert head.log_probability_beaten == head.random_sets == 5
    assert row_of(table, "graft", "modules", "mlp", 4).random_sets == 0
    eight = row_of(table, "graft", "modules", "head", 8)
    assert eight.log_probability_change > 20 and eight.log_probability_beaten == 5
    assert "all depths, 8 MLPs: there are only 4" in page
    assert not ((table.arm == "mlp") & (table["count"] == 8)).any() and set(table.intervention) == {"graft"}


def test_a_graft_and_an_ablation_are_what_direct_computations_give(
    folder: Path, table: pd.DataFrame, pair: Pair, splits: Splits
) -> None:
    target, source = (evaluate(model, splits.test) for model in (pair.target, pair.source))
    row = row_of(table, "graft", "modules", "head", 2)
    names = row.names.split()
    ranking = rank_modules(pair, splits.discover, MLPS.rule, "head", batch_size=16)
    assert names == list(ranking.module[:2])
    with Graft(names).applied(pair):
        after = evaluate(pair.target, splits.test)
    others = []
    chosen = ModuleSet("all", "head", "modules", 2, tuple(names), 0)
    for drawn in random_sets(pair, chosen, 5, 2).sets:
        with Graft(drawn).applied(pair):
            others.append(evaluate(pair.target, splits.test))
    outcome = compare(target, source, after, controls=others, graft=Graft(names), pair=pair)
    assert outcome.log_probability and outcome.log_probability_controls and outcome.controls
    assert row.accuracy == outcome.after_accuracy and row.share == pytest.approx(outcome.parameter_share, rel=1e-7)
    assert [row.accuracy_low, row.accuracy_high] == pytest.approx(outcome.interval, rel=1e-7)
    assert row.p == pytest.approx(outcome.controls.p_value) and row.beaten == outcome.controls.beaten
    assert row.p_log_probability == pytest.approx(outcome.log_probability_controls.p_value)
    # a cell keeps seven digits of a log-probability
    assert row.log_probability_change == pytest.approx(outcome.log_probability.change, abs=1e-5)
    assert [row.log_probability_low, row.log_probability_high] == pytest.approx(
        outcome.log_probability.interval, abs=1e-5
    )

    row = row_of(table, "ablation", "parameters", "mlp", 1, "middle")
    assert row.names == "L2.mlp" and row.random_sets == 0 and np.isnan(row.p)
    reference = reference_activations(pair.source, splits.discover, ["L2.mlp"])
    with Ablation(["L2.mlp"], "mean", reference).applied(pair.source):
        ablated = evaluate(pair.source, splits.test)
    assert row.accuracy == ablated.accuracy and row.accuracy_change == pytest.approx(
        ablated.accuracy - source.accuracy, rel=1e-7
    )
    assert ablated.log_probability is not None
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    kept = [c for c in cells if c["what"] == "mean" and c["modules"] == ["L2.mlp"] and "log_probability" in c]
    assert kept[0]["log_probability"] == [float(f"{v:.7g}") for v in ablated.log_probability]
    # an ablation stands high among random sets where it loses more than they do
    row = row_of(table, "ablation", "modules", "mlp", 1)
    lost = {c["modules"][0]: c["log_probability_mean"] for c in cells if c["what"] == "mean" and len(c["modules"]) == 1}
    rest = [-lost[m] for m in pair.modules("mlp") if m != row.names]
    assert row.p_log_probability == pytest.approx(rank_among(-lost[row.names], rest).p_value)


def test_where_nothing_differs_rounding_beats_no_random_set(tmp_path: Path) -> None:
    # every head of this pair is the same in both models
    clean = HeadsMlpsConfig("family/planted-mlps", counts=(1, 2), methods=(), sets=5, discover=16, test=40)
    report_heads_and_mlps(clean, tmp_path, progress=False)
    heads = pd.read_csv(tmp_path / "study.csv").query("arm == 'head' and random_sets > 0")
    assert len(heads) and (heads.log_probability_beaten == 0).all() and (heads.p_log_probability == 1).all()


def test_sizes_and_parameters(table: pd.DataFrame, pair: Pair) -> None:
    each = {kind: parameter_count(pair.target, [pair.modules(kind)[0]]) for kind in ("head", "mlp")}
    layers = {"early": {0, 1}, "middle": {2}, "late": {3}}
    for row in table.itertuples():
        names = row.names.split()
        kinds = {"head" if "H" in m else "mlp" for m in names}
        assert row.modules == len(set(names)) and (row.arm == "mixed" or kinds == {row.arm})
        assert row.parameters == sum(each["head" if "H" in m else "mlp"] for m in names)
        assert row.depth == "all" or {int(m[1]) for m in names} <= layers[row.depth]
        if row.match == "modules":
            assert row.modules == row.count
        else:
            assert row.near == pytest.approx(row.parameters / (row.count * each["mlp"])) and abs(row.near - 1) <= 0.25
            assert row.arm != "mixed" or row.near <= 1
        assert (row.random_sets == 0) == np.isnan(row.p)
        assert np.isnan(row.p) or row.p <= row.p_adjusted + 1e-9


def test_sets_fill_their_budget(pair: Pair) -> None:
    mlps, heads = pair.modules("mlp"), pair.modules("head")

    def ranked(*mixed: str) -> dict[Arm, Sequence[str]]:
        return {"head": heads, "mlp": mlps, "mixed": mixed}

    found, left_out = sets_of(pair, ranked(*heads[:2], *mlps, *heads[2:]), [2])
    mixed = next(s for s in found if (s.depth, s.arm, s.match) == ("all", "mixed", "parameters"))
    # two heads, the first MLP, then no second MLP fits and all heads do
    assert set(mixed.modules) == {*heads, mlps[0]} and mixed.near == pytest.approx((32 * 4096 + 147456) / (2 * 147456))
    assert "all depths, the parameters of 2 MLPs: all 32 heads have 44% of them" in left_out
    # K and V of a group are counted once
    grouped, _ = sets_of(pair, ranked(*heads, *mlps), [1], kv="group")
    top = next(s for s in grouped if (s.depth, s.arm, s.match) == ("all", "head", "parameters"))
    assert top.parameters == Graft(top.modules, kv="group").parameter_count(pair) and len(top.modules) < 32


def test_random_sets_of_a_third_come_from_it(pair: Pair) -> None:
    inside = set(candidates_in(pair, [*pair.modules("head"), *pair.modules("mlp")], "early"))
    assert {m[:2] for m in inside} == {"L0", "L1"}
    chosen = ModuleSet("early", "mixed", "modules", 3, ("L0H1", "L1H1", "L1.mlp"), 0)
    drawn = random_sets(pair, chosen, 300, 0)
    # two of 16 heads and one of two MLPs, less the set itself
    assert len(drawn.sets) == len({frozenset(s) for s in drawn.sets}) == 120 * 2 - 1
    assert all(set(s) <= inside and sum("mlp" in m for m in s) == 1 for s in drawn.sets)
    assert frozenset(chosen.modules) not in {frozenset(s) for s in drawn.sets}
    assert random_sets(pair, ModuleSet("late", "mlp", "modules", 1, ("L3.mlp",), 0), 5).sets == []
    assert set(candidates_in(pair, pair.modules("mlp"), "all")) == set(pair.modules("mlp"))


def test_a_second_start_computes_nothing_and_writes_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments, **options):  # type: ignore[no-untyped-def]
        raise AssertionError("computed again")

    for name in ("evaluate", "reference_activations"):
        monkeypatch.setattr(heads_mlps_study, name, never)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    page = report_heads_and_mlps(MLPS, folder, progress=False)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert page == (folder / "summary.md").read_text(encoding="utf-8")


def test_the_page_and_the_figures(folder: Path, table: pd.DataFrame) -> None:
    page = (folder / "summary.md").read_text(encoding="utf-8")
    row = row_of(table, "graft", "modules", "mlp", 2)
    assert f"{100 * row.accuracy_change:+.1f} points (2 MLPs; random sets: median" in page
    assert "**not adjusted**" in page and "Left out" in page and "nan" not in page and "None" not in page
    names = ("heads_against_mlps", "heads_against_mlps_log_probability", "heads_against_mlps_by_depth")
    for name in names:
        for suffix in ("png", "pdf", "svg"):
            assert (folder / "figures" / f"{name}.{suffix}").stat().st_size > 1000
    figure, panels = heads_against_mlps_bars(table)
    assert panels.shape == (2, 2) and figure.get_size_inches()[0] == pytest.approx(6.8)
    # an arm that was left out has no bar: heads at the parameters of two MLPs
    assert [len(p.patches) for p in panels.flat] == [5, 5, 6, 6]
    heights = [bar.get_height() for bar in panels[1, 0].patches]
    arms = ("head", "mlp", "mixed")
    expected = [100 * row_of(table, "graft", "modules", arm, c).accuracy_change for c in (1, 2) for arm in arms]
    assert heights == pytest.approx(expected)
    with pytest.raises(UsageError, match="lacks the columns"):
        heads_against_mlps_bars(pd.DataFrame({"arm": ["head"]}))
    with pytest.raises(UsageError, match="no rows of that kind"):
        heads_against_mlps_bars(table, by="depth", count=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("family/planted-mlp",), "did you mean family/planted-mlps"),
        (("family/generations", "--rule", "gradeint"), "did you mean"),
        (("family/generations", "--rule", "greedy"), "ranks on discover alone"),
        (("family/generations", "--counts", "1,x"), "whole numbers with commas"),
        (("family/generations", "--counts", "0"), "count must be a whole number"),
        (("family/generations", "--counts", "40"), "at most 32"),
        (("family/generations", "--methods", "resample"), "unknown ablation"),
        (("family/generations", "--sets", "0"), "sets must be a whole number"),
        (("family/generations", "--kv", "grouped"), "did you mean group"),
        (("family/generations", "--test", "9999999"), "distinct questions"),
    ],
)
def test_wrong_input_is_one_line(command: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, error = command("heads-vs-mlps", *arguments, "--out", str(tmp_path / "out"))
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(command: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, error = command("heads-vs-mlps", MLPS.pair, "--counts", "1", "--out", str(tmp_path))
    assert code == 2 and "holds no such analysis" in error
    code, _, error = command("heads-vs-mlps", MLPS.pair, "--counts", "1", "--out", str(folder))
    assert code == 2 and "begun with different config" in error
