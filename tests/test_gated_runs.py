"""A run whose grafts stand behind a gate: what it closes is the target's own, and all else is the plain run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import small

from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.experiment import run_experiment, runs_table
from mechtransplant.experiment.cells import finished_cells
from mechtransplant.experiment.config import RunConfig, parse_config
from mechtransplant.experiment.evaluator import Cell, Evaluator
from mechtransplant.experiment.run import Run, depends_on
from mechtransplant.export import finished_run

GATE = {"texts": 16, "tokens": 12, "tasks": ["sort"]}


def config(**changes: Any) -> RunConfig:
    lean = {"rule": "weight_delta", "k": [3, 8], "random_sets": 2, "curve_sets": 0}
    return parse_config(small(**{**lean, **changes}))


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_experiment(config(gate=GATE), tmp_path_factory.mktemp("gated") / "run", progress=False)


def bits(table: Any, **where: Any) -> Any:
    """Verdicts of the first row with these labels."""
    for key, value in where.items():
        table = table[table[key] == value]
    return np.array([c == "1" for c in table.correct.iloc[0]])


def test_what_it_closes_is_the_targets(gated: Any, tmp_path: Path) -> None:
    plain = run_experiment(config(), tmp_path / "plain", progress=False)
    same = Run(config(gate=GATE), tmp_path / "other", progress=False)
    gating = same.gating
    assert gating is not None
    test = gating.splits.test
    shut = np.array([key in gating.closed(test) for key in test.keys])
    # this small model fills neutral texts with sums, so some questions are taken for such texts
    assert 0 < shut.sum() < len(test) and gating.open == (~shut).sum()
    target = bits(plain.results, split="test", role="target")
    differ = 0
    for role, k in (("graft", 3), ("graft", 8), ("random", len(gated.graft)), ("bottom", len(gated.graft))):
        where = {"split": "test", "role": role, "k": k}
        ours, theirs = bits(gated.results, **where), bits(plain.results, **where)
        assert (ours == np.where(shut, target, theirs)).all(), role
        differ += int((ours != theirs).sum())
    assert differ, "the gate changed nothing, so this shows nothing"
    assert f"{gating.open} of the {len(test)} `test` questions" in gated.summary
    assert "**Conditional.**" in gated.summary and "**Conditional.**" not in plain.summary
    written = json.loads((gated.folder / "outcome.json").read_text())
    asked = same.elsewhere.tasks
    others = {task.name: [round(gating.gate.share(task) * len(task)), len(task)] for task in asked}
    assert others and f"It is open for {others[asked[0].name][0]} of {len(asked[0])} questions of" in gated.summary
    assert all(
        o["gate"] == {"layer": gating.gate.layer, "open": gating.open, "elsewhere": others} for o in written.values()
    )
    assert list(runs_table([gated.folder, plain.folder]).gate) == [True, False]


def test_side_effects_stand_behind_it_too(gated: Any, tmp_path: Path) -> None:
    notes = [note for line in (gated.folder / "cells.jsonl").read_text().splitlines() for note in notes_of(line)]
    assert any(note.startswith("the gate is open for") for note in notes)
    run = Run(config(gate=GATE), tmp_path / "run", progress=False)
    asked = {key for task in run.elsewhere.tasks for key in task.keys}
    assert [t.name for t in run.shut] == ["sort"] and len(run.shut[0]) == 16
    assert asked and not asked & set(run.shut[0].keys), "the gate was fitted on questions that measure it"


def notes_of(line: str) -> list[str]:
    return list(json.loads(line).get("notes", []))


def test_every_process_and_every_start_has_the_gate_of_the_folder(gated: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    saved = json.loads((gated.folder / "gate.json").read_text())
    # one that this machine would not fit: open for the other side
    turned = {**saved, "direction": [-v for v in saved["direction"]]}
    turned["closed"] = {
        split: [key for key in task.keys if key not in saved["closed"][split]]
        for task in Run(config(gate=GATE), folder, progress=False).splits
        for split in saved["closed"]
        if task.fingerprint == split
    }
    (folder / "gate.json").write_text(json.dumps(turned))
    (folder / "config.yaml").write_bytes((gated.folder / "config.yaml").read_bytes())
    other = run_experiment(config(gate=GATE), folder, progress=False, engine="processes", workers=2)
    where = {"split": "test", "role": "graft", "k": len(gated.graft)}
    target, plain = (
        bits(gated.results, split="test", role="target"),
        run_experiment(config(), tmp_path / "plain", False),
    )
    ours, theirs = bits(gated.results, **where), bits(other.results, **where)
    # what one closes the other lets through
    whole = bits(plain.results, **where)
    assert (np.where(ours != target, ours, theirs) == np.where(whole != target, whole, target)).all()
    assert (ours != theirs).any() and other.summary != gated.summary
    (folder / "gate.json").write_text("{}")
    with pytest.raises(UsageError, match=r"gate\.json is broken"):
        run_experiment(config(gate=GATE), folder, progress=False)


def test_where_it_lets_all_through_cells_are_those_of_the_plain_run(tmp_path: Path) -> None:
    behind = Run(config(gate=GATE), tmp_path / "a", progress=False)
    plain = Run(config(), tmp_path / "b", progress=False)
    cell = Cell("test", "graft", ("L0.q_proj", "L1.up_proj"))
    key = [Evaluator(run).content(cell) for run in (behind, plain)]
    assert key[0] != key[1] and "closed" in key[0]
    assert behind.gating is not None
    behind.gating.shut[behind.splits.test.fingerprint] = []
    assert Evaluator(behind).content(cell) == key[1]
    # nothing is grafted into these
    for role in ("target", "source"):
        body: Any = "source" if role == "source" else "graft"
        assert Evaluator(behind).content(Cell("choose", role, body=body)) == Evaluator(plain).content(
            Cell("choose", role, body=body)
        )


@pytest.mark.parametrize(
    ("gate", "error", "said"),
    [
        ({"layer": 99}, UsageError, r"gate\.layer: no layer 99 in .*: give one from 0 to 3"),
        ({"tasks": ["addition"]}, UsageError, r"gate\.tasks: 'addition' is the run's own task"),
        ({"tasks": ["sorting"]}, UnknownNameError, "sort"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_before_anything_is_written(
    gate: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        run_experiment(config(gate=gate), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_words_for_a_wrong_key() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'gate\.layers': did you mean layer\?"):
        config(gate={"layers": 2})
    with pytest.raises(UsageError, match=r"gate\.texts: .*greater than or equal to 2"):
        config(gate={"texts": 1})


def test_its_graft_is_no_one_set_of_weights(gated: Any) -> None:
    with pytest.raises(UsageError, match=r"in place for some questions alone \(gate\)"):
        finished_run(gated.folder)


# --- cells of another run ---------------------------------------------------------------------------------------------


def test_cells_of_another_run_are_taken(gated: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_experiment(config(), other, progress=False)
    # as while that run is going on: a line is being written
    with (other / "cells.jsonl").open("a") as file:
        file.write('{"key": "abc')
    before = (other / "cells.jsonl").read_bytes()
    more = Run(config(k=[3, 5, 8], gate=GATE), tmp_path / "more", progress=False, reuse=gated.folder)
    again = more.execute()
    plain = Run(config(k=[3, 5, 8]), tmp_path / "plain", progress=False, reuse=other)
    plain.execute()
    for run, folder in ((more, gated.folder), (plain, other)):
        taken = finished_cells(folder / "cells.jsonl").keys() & run.store.cells.keys()
        assert len(taken) > 10 and 0 < run.store.computed == len(run.store.cells) - len(taken)
    assert (other / "cells.jsonl").read_bytes() == before, "another run's folder is only read"
    ours = again.results.query("split == 'choose' and role == 'graft' and k == 3").correct.iloc[0]
    assert ours == gated.results.query("split == 'choose' and role == 'graft' and k == 3").correct.iloc[0]
    starts = json.loads((tmp_path / "more" / "environment.json").read_text())["starts"]
    assert [start.get("reused") for start in starts] == [None, "run"]


def test_rankings_of_another_run_are_taken(tmp_path: Path) -> None:
    given = {"rule": "gradient", "k": [2], "random_sets": 1, "curve_sets": 0, "side_effects": None}
    first = run_experiment(config(**given), tmp_path / "first", progress=False)
    path = first.folder / "ranking.csv"
    head, *lines = path.read_text().splitlines(keepends=True)
    # told from one that is computed again
    path.write_text(head + lines[1] + lines[0] + "".join(lines[2:]))
    again = run_experiment(config(**given, strengths=[2.0]), tmp_path / "again", progress=False, reuse=first.folder)
    assert (again.folder / "ranking.csv").read_bytes() == path.read_bytes()
    assert list(again.graft.modules) == [line.split(",")[0] for line in (lines[1], lines[0])]
    assert (again.folder / "rankings").exists()
    for changes in ({"seed": 1}, {"rule_options": {"batch_size": 4}}, {"pair": "family/instruct"}):
        other = config(**{**given, **changes}, name="other")
        run = Run(other, tmp_path / "other", progress=False, reuse=first.folder)
        assert not run.reused.rankings, changes


def test_rankings_of_other_questions_are_not_taken(tmp_path: Path) -> None:
    lines = [f'{{"question": "{i}+{i + 1}=", "answer": "{2 * i + 1}"}}\n' for i in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(lines))
    task = {"name": str(tmp_path / "q.jsonl"), "scorer": "exact", "max_new_tokens": 4}
    task["format"] = {"completion": "{answer}"}
    small_split = {"discover": 8, "choose": 8, "test": 16}
    given = {"rule": "gradient", "k": [2], "random_sets": 1, "curve_sets": 0, "side_effects": None}
    given |= {"task": task, "split": small_split, "controls": ["bottom"]}
    first = run_experiment(config(**given), tmp_path / "first", progress=False)
    same = Run(config(**given), tmp_path / "same", progress=False, reuse=first.folder)
    assert same.reused.rankings_for(depends_on(same)).keys() == {"ranking.csv"}
    # the same path, with other questions in it
    (tmp_path / "q.jsonl").write_text("".join(lines[::-1][:36]))
    other = Run(config(**given), tmp_path / "other", progress=False, reuse=first.folder)
    assert other.reused.rankings and not other.reused.rankings_for(depends_on(other))


def test_side_effects_of_another_budget_say_what_this_run_gains(tmp_path: Path) -> None:
    given = {"rule": "gradient", "random_sets": 1, "curve_sets": 0, "k": [14]}
    long = run_experiment(config(**given, budgets=[2, 8]), tmp_path / "long", progress=False)
    short = run_experiment(config(**given, budgets=[2]), tmp_path / "short", progress=False, reuse=long.folder)
    for run, budget in ((long, 8), (short, 2)):
        assert run.plane is not None
        row = run.plane[run.plane.role == "graft"].iloc[0]
        assert row.gain == run.outcomes[budget].difference
        assert (row.gain_low, row.gain_high) == run.outcomes[budget].interval
    assert long.outcomes[8].difference != short.outcomes[2].difference


def test_the_gate_of_another_run_is_taken(gated: Any, tmp_path: Path) -> None:
    more = Run(config(k=[5], gate=GATE, side_effects=None), tmp_path / "more", progress=False, reuse=gated.folder)
    more.execute()
    assert (tmp_path / "more" / "gate.json").read_bytes() == (gated.folder / "gate.json").read_bytes()
    other = Run(config(gate={**GATE, "layer": 0}), tmp_path / "other", progress=False, reuse=gated.folder)
    assert other.reused.gate is None


@pytest.mark.parametrize(("effects", "said"), [(None, False), ({"questions": 4, "texts": 0}, False)])
def test_the_page_says_what_harm_was_measured_on(effects: Any, said: bool, gated: Any, tmp_path: Path) -> None:
    run = run_experiment(config(gate=GATE, side_effects=effects), tmp_path / "run", False, reuse=gated.folder)
    assert ("other texts of the same making" in run.summary) == said
    assert "other texts of the same making" in gated.summary


def test_what_is_no_run_gives_no_cells(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run whose cells could be used again"):
        run_experiment(config(), tmp_path / "run", progress=False, reuse=tmp_path / "nothing")
    assert not (tmp_path / "run").exists()
