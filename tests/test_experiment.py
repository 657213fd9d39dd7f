"""A config becomes a run folder; a killed run continues; wrong input gets one line and exit code 2."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_runs import small

from mechtransplant import tasks
from mechtransplant.errors import UsageError
from mechtransplant.evaluation.forked import resuming
from mechtransplant.experiment import Run, evaluator, lower_layers, run_experiment
from mechtransplant.experiment.cells import CellStore, cell_key
from mechtransplant.experiment.config import parse_config, read_config
from mechtransplant.experiment.drawing import draw
from mechtransplant.experiment.setup import Setup, build_task
from mechtransplant.experiment.summary_effects import _with_fronts
from mechtransplant.experiment.worker import Shipped
from mechtransplant.ranking import rank_modules
from mechtransplant.tasks import load_task
from mechtransplant.tasks.scorers import SCORING

SMALL = small(k=[2, 8, 1.0])


def config(**changes: Any) -> Any:
    return parse_config({**SMALL, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_experiment(config(), tmp_path_factory.mktemp("runs") / "small", progress=False)


@pytest.fixture(scope="module")
def instruct_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    small = config(
        pair="family/instruct", task="boxed", k=[4, 14], strengths=[1.0, 1.5], budgets=[3, 6, 12], random_sets=2
    )
    return run_experiment(small, tmp_path_factory.mktemp("runs") / "instruct", progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"random_sets": 20},
        # answers that are written: the prompt's pass alone begins there
        {"random_sets": 12, "pair": "family/instruct", "task": "boxed", "controls": ["bottom"], "curve_sets": 0},
    ],
    ids=["short", "written"],
)
def test_grafts_begin_at_their_lowest_layer_with_the_bits_of_whole_passes(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def counted(model: Any, memory: Any, layer: int) -> Any:
        begun.append(layer if memory.usable else 0)
        return resuming(model, memory, layer)

    monkeypatch.setattr(evaluator, "resuming", counted)
    sizes: dict[str, Any] = {"rule": "weight_delta", "k": [1, 2], "side_effects": None}
    cells = []
    for folder in ("resumed", "whole"):
        run_experiment(config(**sizes | changes), tmp_path / folder / "small", progress=False)
        cells.append(CellStore(tmp_path / folder / "small" / "cells.jsonl").cells)
        assert any(begun) == (folder == "resumed")
        begun.clear()
        monkeypatch.setattr(lower_layers, "LIMIT", 0)
    assert cells[0] == cells[1]


def test_the_target_is_remembered_when_that_has_paid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    evaluate = lower_layers.evaluate_budgets

    def counted(model: Any, task: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(len(task))
        return evaluate(model, task, *arguments, **options)

    monkeypatch.setattr(lower_layers, "evaluate_budgets", counted)
    few: dict[str, Any] = {"rule": "weight_delta", "k": [1], "random_sets": 0, "curve_sets": 0, "side_effects": None}
    run_experiment(config(**few, controls=[]), tmp_path / "few" / "small", progress=False)
    assert asked == []
    run_experiment(config(**few | {"random_sets": 20}), tmp_path / "many" / "small", progress=False)
    # once, and of the test questions alone: few of the grafts on choose leave a layer alone
    assert asked == [48]
    # of a generation the prompt alone begins at a layer: that pays later
    written = Run(config(pair="family/instruct", task="boxed", k=[1]), tmp_path / "written" / "small")
    lower = lower_layers.LowerLayers(written)
    usable = [lower.under(written.splits.test, ["L3.mlp"])[0].usable for _ in range(6)]
    assert not any(usable[:2]) and usable[-1] and asked == [48, 48]
    # what is in no layer changes every pass
    short = lower_layers.LowerLayers(Run(config(**few), tmp_path / "short" / "small"))
    for _ in range(5):
        assert short.under(short.setup.splits.test, ["L3.mlp", "embed_tokens"])[1] == 0 and not short.missed


def test_a_run_writes_its_folder(finished: Any) -> None:
    names = {p.name for p in finished.folder.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "cells.jsonl",
        "ranking.csv",
        "results.parquet",
        "outcome.json",
        "summary.md",
        "figures",
    } <= names
    assert {p.name for p in (finished.folder / "figures").iterdir()} >= {
        "k_curve.png",
        "k_curve.pdf",
        "k_curve.csv",
        "score_heatmap.svg",
    }
    assert not [n for n in names if n.endswith(".tmp")]
    table = pd.read_parquet(finished.folder / "results.parquet")
    drawn = table[(table.split == "test") & (table.role == "random")]
    k = len(finished.graft)
    assert len(drawn[(drawn.k == k) & drawn.set.str.startswith("set")]) == 4
    assert drawn[drawn.set.str.startswith("order")].groupby("k").size().to_dict() == {2: 3, 8: 3}
    assert not len(table[(table.split == "choose") & (table.role == "random")]), "random sets choose nothing"
    assert read_config(finished.folder / "config.yaml") == config()
    for word in (
        "TIR",
        "Recovery",
        "McNemar",
        "matched random sets",
        "best K",
        "Feed-forward / attention",
        "stays the target's",
    ):
        assert word in finished.summary


def test_numbers_of_the_summary_come_from_the_table(finished: Any) -> None:
    outcome = finished.outcomes[8]
    test = finished.results[finished.results.split == "test"]
    assert outcome.target_accuracy == test[test.role == "target"].accuracy.item()
    grafted = test[(test.role == "graft") & (test.k == len(finished.graft))]
    assert outcome.after_accuracy == grafted.accuracy.item()
    assert outcome.controls is not None and outcome.controls.n == 4
    sets = test[(test.role == "random") & test.set.str.startswith("set")].accuracy
    assert outcome.controls.beaten == (sets < outcome.after_accuracy).sum()
    assert outcome.controls.p_value == (1 + (sets >= outcome.after_accuracy).sum()) / 5
    assert f"{100 * outcome.after_accuracy:.1f} %" in finished.summary
    chosen = finished.results[(finished.results.split == "choose") & (finished.results.role == "graft")]
    selective = chosen[chosen.k < 28].set_index("k").accuracy
    assert selective[len(finished.graft)] == selective.max()


def test_controls_beside_the_random_sets(finished: Any, generations: Any) -> None:
    from mechtransplant.evaluation import evaluate
    from mechtransplant.experiment.summary_controls import self_graft_is_identical
    from mechtransplant.grafting import Graft

    test = finished.results[finished.results.split == "test"].set_index("role")
    assert {"bottom", "unrelated", "reverse", "self", "all"} <= set(test.index)
    assert test.accuracy["self"] == test.accuracy["target"] and test.correct["self"] == test.correct["target"]
    assert "log-probabilities are bit-identical" in finished.summary
    # the reverse direction, measured by hand: the target's modules in the source
    run = Run(config(), finished.folder, progress=False)
    run.execute()
    assert self_graft_is_identical(run) is True
    with Graft(finished.graft.modules).applied(generations.reversed()):
        assert evaluate(generations.source, run.splits.test).accuracy == test.accuracy["reverse"]
    lowest = list(finished.ranking.module[::-1][: len(finished.graft)])
    with Graft(lowest).applied(generations):
        assert evaluate(generations.target, run.splits.test).accuracy == test.accuracy["bottom"]
    other = pd.read_csv(finished.folder / "rankings" / "lae-unrelated.csv")
    assert list(other.module) != list(finished.ranking.module)
    # whether the choice is specific to the task: the other graft among the sets, and beside the own one
    row, drawn = finished.rules.iloc[0], finished.results[finished.results.role == "random"]
    sets = drawn[drawn.set.str.startswith("set") & (drawn.k == len(finished.graft)) & (drawn.split == "test")].accuracy
    assert len(sets) == 4 and row.unrelated_beaten == (sets < row.unrelated).sum()
    graft = finished.results[(finished.results.role == "graft") & (finished.results.split == "test")]
    correct = (graft.correct[graft.k == len(finished.graft)].iloc[0], test.correct["unrelated"])
    own, theirs = (np.array([c == "1" for c in bits]) for bits in correct)
    assert (row.unrelated_gained, row.unrelated_lost) == ((own & ~theirs).sum(), (theirs & ~own).sum())
    k = len(lowest)
    shared = set(other.module[:k]) & set(finished.ranking.module[:k])
    drawn_sets = run.controls.sets("lae", k).sets
    between = np.median([len(set(s) & set(finished.ranking.module[:k])) for s in drawn_sets])
    assert (row.unrelated_shared, row.random_shared) == (len(shared), between) and row.unrelated_shared < k
    assert (
        f"What it picks on `{run.other.name}` shares {len(shared)} of its {k} modules with it (random sets "
        f"{between:g} in the median), reaches {100 * row.unrelated:.1f} %"
    ) in finished.summary


def test_side_effects_of_every_reported_graft(finished: Any) -> None:
    plane = finished.plane
    assert list(plane.role) == ["graft", "all", "graft", "random"] and plane.front.dtype == bool
    table = pd.read_csv(finished.folder / "side_effects.csv")
    assert set(table[table.kind == "task"].what) == {"reverse", "sort", "copy", "max"}
    assert (table[table.kind == "task"].n == 16).all() and set(table[table.kind == "text"].n) == {4}
    assert (table.low <= table.change).all() and (table.change <= table.high).all()
    grafted = plane[(plane.role == "graft") & (plane.k == len(finished.graft))].iloc[0]
    assert grafted.gain == pytest.approx(finished.outcomes[8].difference)
    assert "## Side effects" in finished.summary and (finished.folder / "figures" / "gain_against_harm.png").exists()


def test_the_side_effects_table_says_on_which_front_a_graft_is() -> None:
    plane = pd.DataFrame({"gain": [0.3, 0.2, 0.3, 0.1], "harm": [0.0, 0.0, 0.1, 0.1], "kl": [0.5, 0.1, 0.2, 0.4]})
    both, accuracy, kl = "gain and accuracy elsewhere; gain and KL", "gain and accuracy elsewhere", "gain and KL"
    assert list(_with_fronts(plane).fronts) == [accuracy, kl, kl, ""]
    assert list(_with_fronts(plane.assign(kl=[0.1, 0.2, 0.3, 0.4])).fronts) == [both, "", "", ""]
    assert list(_with_fronts(plane.drop(columns="harm")).fronts) == ["", kl, kl, ""]
    # the third overflows: it has no KL, and the others are compared all the same
    overflowing = plane.assign(kl=[0.5, 0.1, float("nan"), 0.4])
    assert list(_with_fronts(overflowing).fronts) == [both, kl, "", ""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "nowhere.jsonl"}, "no task file at nowhere.jsonl"),
        ({"task": "addition", "split": {"test": 99999}}, "ask for fewer"),
        ({}, "holds another run"),
    ],
)
def test_what_needs_no_weights_is_refused_before_they_are_loaded(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechtransplant.experiment.setup.load_pair", lambda *a, **k: pytest.fail("weights were loaded"))
    if not changes:
        (tmp_path / "config.yaml").write_text("pair: family/instruct\n")
    with pytest.raises(UsageError, match=message):
        Run(config(**changes), tmp_path, progress=False)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Any:
    small = config(
        rule=["gradient", "weight_delta", "mask"],
        rule_options={"mask": {"steps": 3, "swaps": 2}},
        controlled=["gradient"],
        kind=["head", "mlp"],
        k=[2, 6],
        side_effects={"questions": 8, "texts": 0, "random": 0},
    )
    return run_experiment(small, tmp_path_factory.mktemp("runs") / "several", progress=False)


def test_several_rules_in_one_run(several: Any) -> None:
    assert list(several.rules.rule) == ["gradient", "weight_delta", "mask"]
    assert set(several.ranking.kind) == {"head", "mlp"} and set(several.findings.outcomes) == set(several.rules.rule)
    controlled = several.rules.set_index("rule").random_n
    assert controlled["gradient"] == 4 and controlled[["weight_delta", "mask"]].isna().all()
    assert "`weight_delta` has no random sets of its own" in several.summary
    assert "3 rules are compared" in several.summary
    names = {p.name for p in (several.folder / "rankings").iterdir()}
    assert {"weight_delta.csv", "mask-2.csv", "mask-6.csv", "gradient-unrelated.csv"} <= names
    assert "mask.csv" not in names, "a search for all sizes at once that nothing asked for"
    assert (several.folder / "figures" / "rule_curves.png").exists()
    at = several.results[(several.results.split == "test") & (several.results.role == "graft")]
    assert set(zip(at.rule, at.k, strict=True)) == {(r, k) for r in several.rules.rule for k in (2, 6)}


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": ["weight_delta", "depth"]},
        {"rule": ["weight_delta", "gradient"], "controlled": []},
        {"pair": {"source": "repo:family/first", "target": "repo:family/second"}, "rule": ["depth", "random"]},
        {"rule": ["weight_delta", "gradient"], "controls": ["self"], "k": [28]},
    ],
)
def test_runs_without_some_controls_come_to_their_end(tmp_path: Path, changes: dict[str, Any]) -> None:
    small = config(**{"k": [2], "random_sets": 1, "curve_sets": 1, **changes, "side_effects": None})
    result = run_experiment(small, tmp_path / "out", progress=False)
    assert "Left out" in result.summary or "No unrelated ranking" in result.summary


def test_a_rule_learned_for_one_k_has_random_sets_like_its_own(tmp_path: Path, generations: Any) -> None:
    from collections import Counter

    small = config(
        rule="mask", rule_options={"steps": 2, "swaps": 1}, kind=["head", "mlp"], k=[3, 6], side_effects=None
    )
    run = Run(small, tmp_path / "out", progress=False)
    run.execute()
    curves, _ = run.controls.curves("mask")
    for k in (3, 6):
        kinds = Counter("H" in m for m in run.rankings.top("mask", k))
        assert all(Counter("H" in m for m in curve[k]) == kinds for curve in curves)
    names = {p.name for p in (tmp_path / "out" / "rankings").iterdir()}
    assert {f"mask-{len(run.cells.graft(run.rankings.top('mask', k), 1))}.csv" for k in (3, 6)} <= names
    assert any(n.endswith("-unrelated.csv") and n != "mask-unrelated.csv" for n in names)


def test_a_runs_graft_remembers_the_runs_questions(finished: Any, generations: Any, addition: Any) -> None:
    from mechtransplant.evaluation import compare, evaluate
    from mechtransplant.export import finished_run

    other = addition.split(8, 8, 900, seed=11).test
    for graft in (finished.graft, finished_run(finished.folder).graft):
        with graft.applied(generations), pytest.raises(UsageError, match="selected the modules"):
            compare(
                *[evaluate(m, other) for m in (generations.target, generations.source)],
                evaluate(generations.target, other),
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side_effects": {"tasks": ["sortt"]}}, "unknown task 'sortt'"),
        ({"side_effects": {"tasks": ["addition"]}}, "is the run's own task"),
        ({"side_effects": {"file": "nowhere.txt"}}, "nowhere.txt"),
        ({"rule_options": {"alignment": "bogus"}}, "unknown alignment 'bogus'"),
        ({"rule": "bottom", "rule_options": {"of": "nonsense"}}, "unknown rule 'nonsense'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_experiment(config(**changes), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_self_graft_of_a_pair_with_an_ancestor_changes_nothing(tmp_path: Path) -> None:
    pair = {"source": "repo:family/second", "target": "repo:family/instruct", "base": "repo:family/first"}
    small = config(pair=pair, operator="task_arithmetic", rule="weight_delta", k=[4], random_sets=1, side_effects=None)
    result = run_experiment(small, tmp_path / "out", progress=False)
    assert "are bit-identical" in result.summary


def test_searches_stand_beside_the_best_other_rule(several: Any, finished: Any) -> None:
    rows = several.results[(several.results.split == "choose") & (several.results.role == "graft")]
    assert "## Searches on `choose`" in several.summary and "## Searches" not in finished.summary
    for k in (2, 6):
        at = rows[rows.k == k].set_index("rule").log_probability
        rival = at.drop("mask").idxmax()
        assert (
            f"| {k} | {at[rival]:.3f} `{rival}` | {at['mask']:.3f} ({at['mask'] - at[rival]:+.3f}) |" in several.summary
        )


def test_verdict_says_what_the_ranks_say(several: Any) -> None:
    outcome = several.outcomes[8]
    ranks, curve = outcome.controls, outcome.curve
    assert f"beats {ranks.beaten} of {ranks.n} matched random sets at K = {len(several.graft)}" in several.summary
    assert curve.n == 3 and f"over the whole K-curve p = {curve.p_value:.2g} (3 random orders" in several.summary


def test_an_unrelated_task_that_is_the_runs_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the run's own task"):
        run_experiment(config(unrelated="addition"), tmp_path / "out")
    with pytest.raises(UsageError, match="unknown task 'adition'"):
        run_experiment(config(unrelated="adition"), tmp_path / "out")
    # the same questions under another name
    questions = tmp_path / "sums.jsonl"
    asked = load_task("addition").examples[:3]
    questions.write_text("".join(json.dumps({"question": e.question, "answer": e.answer}) + "\n" for e in asked))
    with pytest.raises(UsageError, match="asks 3 of the run's own questions: name another task"):
        run_experiment(config(unrelated=str(questions)), tmp_path / "out")


def test_another_task_that_shows_its_own_questions_has_fewer_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = load_task("sort", 100)
    shown = replace(words.format, shots=tuple((e.question, e.answer) for e in words.examples[:2]))
    few = replace(words, name="shown", format=shown)
    monkeypatch.setitem(tasks._REGISTERED, "shown", (lambda name, n, seed: few, ""))
    beside = {"tasks": ["shown"], "questions": 256, "texts": 0}
    run = Run(config(unrelated="shown", split={"discover": 64, "choose": 64}, side_effects=beside), tmp_path / "out")
    assert run.other is not None and len(few.askable) == 98
    parts = run.other.split(**run.controls._other_sizes(run.other))
    (asked,) = run.elsewhere.tasks
    assert [len(part) for part in parts] == [48, 48, 1] and len(asked) == 96


def test_a_scorer_that_judges_otherwise_has_other_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few: dict[str, Any] = {"pair": "family/instruct", "split": {"discover": 4, "choose": 4, "test": 4}}
    few["side_effects"] = {"tasks": ["sort"], "questions": 4, "texts": 0}
    cell = evaluator.Cell("test", "graft", ("L0.q_proj",))

    def keys() -> dict[str, list[str]]:
        return {
            name: [cell_key(part.content(cell)) for part in (evaluator.Evaluator(run), run.elsewhere)]
            for name, run in runs.items()
        }

    specs = {name: {"name": "boxed-addition", "scorer": name} for name in ("boxed", "number", "exact")}
    runs = {name: Run(config(**few, task=spec), tmp_path / name, progress=False) for name, spec in specs.items()}
    runs["beside"] = Run(
        config(**{**few, "side_effects": {**few["side_effects"], "tasks": ["boxed-addition"]}}, task="addition"),
        tmp_path / "beside",
        progress=False,
    )
    # cells from before versions were noted are of version 1
    assert "scoring" not in evaluator.Evaluator(runs["number"]).content(cell)
    before = keys()
    monkeypatch.setitem(SCORING, "boxed", 2)
    after = keys()
    changed = {name: [a != b for a, b in zip(before[name], after[name], strict=True)] for name in before}
    # the side effects of the last are on boxed answers
    none, both = [False, False], [True, True]
    assert changed == {"boxed": both, "number": none, "exact": none, "beside": [False, True]}


def test_splits_never_share_a_question(finished: Any, tmp_path: Path) -> None:
    run = Run(config(), tmp_path / "again", progress=False)
    parts = [{e.key for e in s} for s in run.splits]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_run_again_computes_nothing_and_gives_the_same_tables(finished: Any) -> None:
    before = {p: p.read_bytes() for p in finished.folder.rglob("*") if p.is_file()}
    run = Run(config(), finished.folder, progress=False)
    run.execute()
    assert run.store.computed == 0
    changed = [p.name for p, content in before.items() if p.read_bytes() != content]
    assert changed == []


def test_a_killed_run_continues_where_it_was(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, put, calls = tmp_path / "killed", CellStore.put, []

    def dying(store: CellStore, key: str, values: Any) -> None:
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(1)
        put(store, key, values)

    monkeypatch.setattr(CellStore, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config(), folder, progress=False)
    monkeypatch.undo()
    # the kill also tore the line that was being written
    with (folder / "cells.jsonl").open("a") as file:
        file.write('{"key": "torn')
    already = len((folder / "cells.jsonl").read_text().splitlines()) - 1
    assert already == 7
    run = Run(config(), folder, progress=False)
    resumed = run.execute()
    pd.testing.assert_frame_equal(resumed.results, finished.results)
    assert resumed.summary == finished.summary
    assert run.store.computed == len(run.store.cells) - already
    for line in (folder / "cells.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_folder_with_another_run_is_refused(finished: Any, tmp_path: Path) -> None:
    before = (finished.folder / "cells.jsonl").read_bytes()
    with pytest.raises(UsageError, match="holds another run"):
        run_experiment(config(seed=7), finished.folder)
    assert (finished.folder / "cells.jsonl").read_bytes() == before
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run_experiment(config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def without_last_cell(folder: Path) -> None:
    """As if a finished run had been killed before its last cell."""
    path = folder / "cells.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def test_a_folder_goes_on_on_another_device(finished: Any, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(finished.folder, folder)
    without_last_cell(folder)
    run = Run(config(device="cpu:0"), folder)
    assert run.execute().summary == finished.summary and run.store.computed == 1
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    assert [start.get("device") for start in starts] == [None, "cpu:0"]
    # another kind of device, as if: the page says so
    path = folder / "environment.json"
    path.write_text(path.read_text().replace('"device": "cpu:0"', '"device": "cuda"'))
    assert "computed on cpu and cuda, which round otherwise" in Run(config(), folder).execute().summary
    # and where another version of the package began it
    earlier = path.read_text().replace('"device": "cuda"', '"device": "cpu"')
    path.write_text(earlier.replace('"mechtransplant": "0.1.0"', '"mechtransplant": "0.0.9"', 1))
    said = Run(config(), folder).execute().summary
    assert "computed by mechtransplant 0.0.9 and 0.1.0" in said and "which round otherwise" not in said


def test_a_folder_with_other_weights_is_refused(finished: Any, generations: Any) -> None:
    from mechtransplant.grafting import Graft
    from mechtransplant.pair import Pair

    changed = Pair(generations.source, generations.target, generations.compatibility, generations.name)
    with (
        Graft(["L0.mlp"]).applied(changed),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UsageError, match="different weights"),
    ):
        patch.setattr("mechtransplant.experiment.setup.load_pair", lambda *a, **k: changed)
        run_experiment(config(), finished.folder)


def test_a_broken_file_in_the_folder_is_named(finished: Any, tmp_path: Path) -> None:
    import shutil

    for name, content, message in (
        ("cells.jsonl", '{"key": \n', "line 1 is no finished cell"),
        ("environment.json", "{", "is broken"),
    ):
        folder = Path(shutil.copytree(finished.folder, tmp_path / name))
        (folder / name).write_text(content)
        with pytest.raises(UsageError, match=message):
            run_experiment(config(), folder)


def test_later_starts_are_noted_beside_the_first(finished: Any, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    saved = json.loads((folder / "environment.json").read_text())
    assert len(saved["starts"]) == 1 and saved["starts"][0]["packages"]["torch"]
    saved["starts"][0]["packages"]["torch"] = "1.0"
    (folder / "environment.json").write_text(json.dumps(saved))

    def earlier_torch() -> list[bool]:
        run_experiment(config(), folder, progress=False)
        starts = json.loads((folder / "environment.json").read_text())["starts"]
        return [s["packages"]["torch"] == "1.0" for s in starts]

    # one that only writes the pages again computed nothing of what they say
    assert earlier_torch() == [True]
    for lost in (lambda: without_last_cell(folder), lambda: (folder / "ranking.csv").unlink()):
        (folder / "environment.json").write_text(json.dumps(saved))
        lost()
        assert earlier_torch() == [True, False]


def test_the_ranking_gets_the_runs_budget_and_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(pair: Any, task: Any, rule: str, kind: str, **options: Any) -> Any:
        seen.update(options)
        return rank_modules(pair, task, rule, kind, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("mechtransplant.experiment.rankings.rank_modules", spy)
    none = {"random_sets": 0, "curve_sets": 0, "controls": ["all"], "side_effects": None}
    small = config(k=[2], **none, budgets=[2, 5], batch_size=3, rule_options={"alignment": "teacher-forced"})
    result = run_experiment(small, tmp_path / "out", progress=False)
    options = {"batch_size": 3, "max_new_tokens": 5, "alignment": "teacher-forced"}
    assert seen == {"seed": 42, "progress": False, **options}
    assert "no random set was asked for" in result.summary
    assert "Left out, as the config asked: bottom, reverse, unrelated, self" in result.summary
    assert result.plane is None and "Side effects" not in result.summary


def test_direction_better_records_the_weights_in_their_parts(tmp_path: Path, generations: Any) -> None:
    spec = {"source": "repo:family/second", "target": "repo:family/first"}
    small = config(pair=spec, direction="better", k=[4], random_sets=1)
    for _ in range(2):
        outcome = run_experiment(small, tmp_path / "out", progress=False).outcomes[8]
        assert outcome.source_accuracy > outcome.target_accuracy
        weights = json.loads((tmp_path / "out" / "environment.json").read_text())["weights"]
        assert weights == {"source": generations.source.fingerprint, "target": generations.target.fingerprint}


def test_two_starts_in_one_folder(finished: Any) -> None:
    from filelock import FileLock

    with FileLock(finished.folder / ".lock"), pytest.raises(UsageError, match="another process"):
        run_experiment(config(), finished.folder)


def test_k_above_the_candidates_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"k = 29 is above the 28 candidates"):
        run_experiment(config(k=[4, 29]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ruel": "lae"}, r"unknown key 'ruel': did you mean rule"),
        ({"split": {"discovery": 3}}, r"unknown key 'split.discovery': did you mean discover"),
        ({"k": [0]}, "whole numbers of modules"),
        ({"k": [1.5]}, "shares"),
        ({"k": []}, "at least one"),
        ({"random_sets": -1}, "random_sets"),
        ({"kind": "neurons"}, "kind"),
        ({"budgets": [0]}, "at least 1"),
        ({"seed": -1}, "seed"),
        ({"split": {"seed": -1}}, "split.seed"),
        ({"strengths": [float("nan")]}, "strengths"),
        ({"k": [float("nan")]}, "k.0"),
        ({"pair": {"source": "x"}}, "pair.target"),
        ({"rule": ["lae", "lae"]}, "list of different ones"),
        ({"rule": []}, "name a rule"),
        ({"rule": ["lae", "own"], "rule_options": {"text": "gold"}}, "rule_options.text: with several rules"),
        ({"controlled": ["own"]}, "own is none of the rules lae"),
        ({"controls": ["botom"]}, "controls.0"),
        ({"curve_sets": -1}, "curve_sets"),
        ({"side_effects": {"toxens": 3}}, r"unknown key 'side_effects.toxens': did you mean tokens"),
        ({"kind": ["head", "neurons"]}, "kind"),
    ],
)
def test_config_errors_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)


def test_prompt_format_of_the_config_reaches_the_task(generations: Any) -> None:
    spec = {
        "name": "addition",
        "format": {"shots": [["1+1=", "2"]], "shot_separator": " "},
        "stop": [" "],
        "max_new_tokens": 5,
    }
    task = build_task(config(task=spec), generations)
    assert task.subset([0]).prompts()[0].startswith("1+1=2 ") and task.stop == (" ",) and task.max_new_tokens == 5
    assert not task.short_answer, "an answer in another format is judged by generation unless the config says otherwise"
    assert build_task(config(task="addition"), generations).short_answer
    assert build_task(config(task={**spec, "short_answer": True, "stop": []}), generations).short_answer


def test_every_budget_has_its_own_best_k(instruct_run: Any) -> None:
    saved = json.loads((instruct_run.folder / "outcome.json").read_text())
    assert set(saved) == {"3", "6", "12"} == {str(b) for b in instruct_run.grafts}
    table = instruct_run.results
    for budget, graft in instruct_run.grafts.items():
        at = table[(table.budget == budget) & (table.role == "graft") & (table.strength == graft.strengths[0])]
        best = at[(at.split == "choose") & (at.k < 28)].accuracy.max()
        assert at[(at.split == "choose") & (at.k == len(graft))].accuracy.item() == best
        after = at[(at.split == "test") & (at.k == len(graft))].accuracy.item()
        assert after == instruct_run.outcomes[budget].after_accuracy
    assert instruct_run.outcomes[3].tir is None, "nothing is boxed within three tokens"
    assert "each with its own best K" in instruct_run.summary


def test_the_sweep_says_why_a_point_has_no_random_orders(instruct_run: Any, tmp_path: Path) -> None:
    own = instruct_run.rules.set_index("budget").strength
    assert own[6] != own[12] and f"random orders are at strength {own[12]:g} alone |" in instruct_run.summary
    lean = {"k": [8], "rule": ["weight_delta", "lae"], "controlled": ["lae"], "controls": [], "side_effects": None}
    run = run_experiment(config(**lean), tmp_path / "run", progress=False)
    assert "| this rule has no controls (`controlled`) |" in run.summary
    for summary in (instruct_run.summary, run.summary):
        assert "no other set has this make-up" not in summary


def test_outcome_is_strict_json_with_null_for_unbounded() -> None:
    from mechtransplant.experiment.result import _strict
    from mechtransplant.experiment.words import interval_of

    assert interval_of((18.0, float("inf")), "", 1) == "[18, ∞]"
    assert json.dumps(_strict({"a": (1.0, float("inf")), "b": float("nan")})) == '{"a": [1.0, null], "b": null}'


def test_random_controls_have_the_strength_of_their_graft(instruct_run: Any) -> None:
    table = instruct_run.results
    random = table[(table.split == "test") & (table.role == "random")]
    for budget, graft in instruct_run.grafts.items():
        controls = random[(random.budget == budget) & random.set.str.startswith("set")]
        assert ((controls.k == len(graft)) & (controls.strength == graft.strengths[0])).sum() == 2
    orders = random[random.set.str.startswith("order")]
    assert set(orders.strength) == {instruct_run.graft.strengths[0]} and set(orders.k) == {4, 14}


def test_unknown_rule_is_refused_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechtransplant.experiment.setup.load_pair", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match="unknown rule"):
        run_experiment(config(rule="leo"), tmp_path / "out")


def test_math500_runs_end_to_end_and_says_that_tir_is_undefined(shared_data: Path, tmp_path: Path) -> None:
    small = config(
        task={"name": str(shared_data / "math500.jsonl"), "max_new_tokens": 4},
        k=[4],
        random_sets=1,
        budgets=[2, 4],
        split={"discover": 4, "choose": 4, "test": 8},
    )
    result = run_experiment(small, tmp_path / "out", progress=False)
    assert result.outcomes[4].target_accuracy == 0 and result.outcomes[4].tir is None
    assert "TIR is undefined: the target answers none" in result.summary


def test_chosen_by_log_probability_and_within_a_share_of_the_parameters(tmp_path: Path) -> None:
    changes = {
        "rule": "weight_delta",
        "k": [1, 2, 4, 8, 14],
        "strengths": [0.5, 1.0],
        "random_sets": 1,
        "curve_sets": 0,
    }
    lean = {**changes, "controls": [], "side_effects": None}
    free = run_experiment(config(**lean, choose_by="log_probability"), tmp_path / "free", progress=False)
    rows = free.results.query("split == 'choose' and role == 'graft'")
    best = rows.loc[rows.log_probability.idxmax()]
    assert (len(free.graft), free.graft.strengths[0]) == (best.k, best.strength)
    assert "by the gold answer's log-probability" in free.summary
    tight = run_experiment(config(**lean, parameters=0.2), tmp_path / "tight", progress=False)
    assert tight.outcomes[8].parameter_share <= 0.2 and "at most 20.0 % of the parameters" in tight.summary
    accuracy = tight.results.query("split == 'choose' and role == 'graft'").set_index(["k", "strength"]).accuracy
    chosen = accuracy[(len(tight.graft), tight.graft.strengths[0])]
    allowed = [k for k in (1, 2, 4, 8, 14) if k <= len(tight.graft)]
    assert chosen == accuracy[accuracy.index.get_level_values(0).isin(allowed)].max()
    with pytest.raises(UsageError, match=r"all grafts of weight_delta change more than 0\.1% of the parameters"):
        run_experiment(config(**lean, parameters=0.001), tmp_path / "none", progress=False)


#: a run of one rule, whose grafts at 1e30 overflow
OVERFLOWING: dict[str, Any] = {
    "rule": "weight_delta", "k": [9], "strengths": [1e30, 1.0], "choose_by": "log_probability", "random_sets": 5,
    "curve_sets": 0, "controls": ["all"], "side_effects": None,
}  # fmt: skip


def test_a_graft_that_overflows_is_not_chosen(tmp_path: Path) -> None:
    run = run_experiment(parse_config(small(**OVERFLOWING)), tmp_path / "run", progress=False)
    assert run.graft.strengths == (1.0,) * 9 and run.outcomes[8].log_probability is not None
    swept = run.results[(run.results.split == "choose") & (run.results.role == "graft")]
    assert swept.set_index("strength").log_probability.isna().to_dict() == {1e30: True, 1.0: False}
    broken = parse_config(small(**{**OVERFLOWING, "strengths": [1e30]}))
    with pytest.raises(UsageError, match="all grafts of weight_delta overflow on choose: give smaller ones"):
        run_experiment(broken, tmp_path / "broken", progress=False)


def test_a_graft_of_everything_is_no_way_out_of_an_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(parse_config(small(**OVERFLOWING)), tmp_path / "run", progress=False)
    rows = [{"k": k, "strength": 1.0, "log_probability": v} for k, v in ((9, -np.inf), (len(run.candidates), -1.0))]
    monkeypatch.setattr(run, "rows", SimpleNamespace(where=lambda **_: rows), raising=False)
    with pytest.raises(UsageError, match="all grafts of weight_delta overflow on choose: give smaller ones"):
        run._choose("weight_delta", 8)
    del rows[0]
    assert run._choose("weight_delta", 8) == (len(run.candidates), 1.0)


def test_a_run_whose_graft_overflows_is_reported_without_log_probability(tmp_path: Path) -> None:
    given = {**OVERFLOWING, "strengths": [1e30], "choose_by": "accuracy", "random_strengths": [1e20]}
    given["side_effects"] = SMALL["side_effects"]
    run = run_experiment(parse_config(small(**given)), tmp_path / "run", progress=False)
    saved = json.loads((run.folder / "outcome.json").read_text(), parse_constant=pytest.fail)
    (outcome,) = saved.values()
    assert outcome["log_probability"] is None and outcome["log_probability_controls"] is None
    assert "the graft overflows: the gold answer has no log-probability" in run.summary and "nan" not in run.summary
    assert "tuned_p_value_log_probability" not in run.rules and run.rules.tuned_n[0] == 5
    assert set(draw(run.folder)) >= {"against_chance", "gain_against_harm"}


def test_a_strength_at_which_random_sets_overflow_suits_them_least(tmp_path: Path) -> None:
    # at 1e16 the graft itself has a log-probability
    given = {**OVERFLOWING, "strengths": [1e16], "random_strengths": [1.0]}
    run = run_experiment(parse_config(small(**given)), tmp_path / "run", progress=False)
    assert run.rules.strength[0] == 1e16 and run.rules.tuned_strength[0] == 1
    assert run.rules.tuned_beaten_log_probability[0] == 0 and run.outcomes[8].log_probability_controls is None
    broken = parse_config(small(**{**given, "random_strengths": [1e17]}))
    with pytest.raises(UsageError, match="random sets of weight_delta overflow on choose at every strength"):
        run_experiment(broken, tmp_path / "broken", progress=False)


def test_a_strength_at_which_random_draws_overflow_is_not_taken(tmp_path: Path) -> None:
    given = {**OVERFLOWING, "operator": {"name": "ties", "density": 0.5}, "random_sets": 0, "random_weights": 2}
    run = run_experiment(parse_config(small(**given)), tmp_path / "run", progress=False)
    assert run.rules.weights_strength[0] < 1e30 and run.rules.weights_n[0] == 2


def test_a_format_that_is_given_in_part_is_written_in_part(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    given = config(task={"name": str(tmp_path / "q.jsonl"), "format": {"system": "Add."}})
    again = parse_config(given.model_dump(mode="json"))
    pair: Any = None
    assert again == given and build_task(again, pair) == build_task(given, pair)
    assert build_task(again, pair).format.completion == "\\boxed{{answer}}"


def test_gsm8k_finds_on_its_training_set(shared_data: Path, tmp_path: Path) -> None:
    task = {
        "name": str(shared_data / "gsm8k_test.jsonl"),
        "explore": str(shared_data / "gsm8k_train.jsonl"),
        "max_new_tokens": 2,
    }
    run = Run(config(task=task), tmp_path / "out")
    tests = {e.key for e in load_task(shared_data / "gsm8k_test.jsonl")}
    assert set(run.splits.test.keys) <= tests
    assert not tests & {*run.splits.discover.keys, *run.splits.choose.keys}
    shipped = Shipped.of(run, run.elsewhere).parts(False, "cpu", False)
    assert Setup(run.config, shipped).splits == run.splits


def test_heads_with_their_kv_and_an_operator(tmp_path: Path) -> None:
    changes = {"rule": "weight_delta", "kind": "head", "kv": "group", "operator": "slerp", "strengths": [0.5]}
    small = config(**changes, k=[3], random_sets=2)
    result = run_experiment(small, tmp_path / "out", progress=False)
    assert result.graft.kv == "group" and result.graft.operator.name == "slerp"
    assert "operator slerp" in result.summary and "moves K/V of heads" in result.summary
    written = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert {(o["kv"], o["operator"]["name"]) for o in written.values()} == {("group", "slerp")}
    # K and V that follow are other weights, and another cell
    run_experiment(config(**{**changes, "kv": "never"}, k=[3], random_sets=2), tmp_path / "b", progress=False)
    cells = [(tmp_path / name / "cells.jsonl").read_text().splitlines() for name in ("out", "b")]
    keys = [{c["key"] for c in map(json.loads, lines) if c["role"] == "graft"} for lines in cells]
    assert len(keys[0]) == len(keys[1]) == 2, "on choose and on test"
    assert not keys[0] & keys[1]


def test_a_run_from_before_a_key_existed_goes_on(finished: Any, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    old = "".join(line for line in lines if not line.startswith(("kv:", "operator:", "controlled:", "unrelated:")))
    assert len(old) < sum(map(len, lines))
    (folder / "config.yaml").write_text(old)
    run = Run(config(), folder, progress=False)
    run.execute()
    assert run.store.computed == 0


def test_an_operators_options_and_an_ancestor_from_the_config(tmp_path: Path) -> None:
    pair = {"source": "repo:family/second", "target": "repo:family/instruct", "base": "repo:family/first"}
    operator = {"name": "ties", "density": 0.7}
    result = run_experiment(
        config(pair=pair, operator=operator, rule="weight_delta", k=[4], random_sets=1),
        tmp_path / "out",
        progress=False,
    )
    assert "operator ties (density = 0.7, normalize = None)" in result.summary
    assert "ancestor b: repo:family/first" in result.summary
    written = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert all(o["operator"] == {**operator, "normalize": None} for o in written.values())


# --- engines ----------------------------------------------------------------------------------------------------------


def same_numbers(one: Any, other: Any) -> None:
    pd.testing.assert_frame_equal(one.results, other.results)
    pd.testing.assert_frame_equal(one.rules, other.rules)
    assert one.summary == other.summary
    names = ["outcome.json", "rules.csv"] + ["side_effects.csv"] * (one.plane is not None)
    for name in names:
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_processes_compute_what_one_does_to_the_bit(tmp_path: Path) -> None:
    threaded = config(threads=1)
    serial = run_experiment(threaded, tmp_path / "serial" / "small", progress=False)
    spread = run_experiment(threaded, tmp_path / "spread" / "small", progress=False, engine="processes", workers=2)
    same_numbers(serial, spread)
    cells = [CellStore(r.folder / "cells.jsonl").cells for r in (serial, spread)]
    assert cells[0] == cells[1] and len(cells[0]) == len((spread.folder / "cells.jsonl").read_text().splitlines())
    starts = json.loads((spread.folder / "environment.json").read_text())["starts"]
    assert starts[-1]["engine"] == "processes" and starts[-1]["workers"] == 2
    # either engine continues what the other began
    lines = (spread.folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (spread.folder / "cells.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    same_numbers(serial, run_experiment(threaded, spread.folder, progress=False))


def test_the_better_model_is_the_source_in_every_process(tmp_path: Path) -> None:
    turned = config(
        pair={"source": "repo:family/second", "target": "repo:family/first"},
        direction="better", k=[2], threads=1, side_effects=None, random_sets=2, curve_sets=0,
    )  # fmt: skip
    serial = run_experiment(turned, tmp_path / "a" / "turned", progress=False)
    spread = run_experiment(turned, tmp_path / "b" / "turned", progress=False, engine="processes")
    same_numbers(serial, spread)
    assert serial.outcomes[max(serial.outcomes)].source_accuracy > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "cluster"}, "unknown engine 'cluster'"),
        ({"engine": "processes", "workers": 0}, "workers must be a whole number of at least 1"),
        ({"workers": 2}, "the serial engine has no workers"),
    ],
)
def test_engines_are_checked_before_anything_is_loaded(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_experiment(config(pair="family/nowhere"), tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_a_worker_with_other_weights_is_refused(tmp_path: Path) -> None:
    from mechtransplant.experiment.worker import cell_worker

    small = config(threads=1).model_dump(mode="json")
    with pytest.raises(UsageError, match="other weights or questions than the run began with"):
        cell_worker(small, False, {"source": "0" * 16, "target": "0" * 16})
