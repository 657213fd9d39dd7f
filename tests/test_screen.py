"""A screen compares recipes on choose alone, goes on where it was killed, and gives its best to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.experiment import Run, read_config, read_screen, report_screen
from mechtransplant.experiment.screen import Screen, best_recipe
from mechtransplant.experiment.screen_config import ScreenConfig
from mechtransplant.grafting import Graft
from mechtransplant.side_effects import measure_side_effects, neutral_texts
from mechtransplant.tasks import Task

SMALL: dict[str, Any] = {
    "name": "small",
    "pair": "family/generations",
    "split": {"discover": 16, "choose": 24, "test": 48},
    "kinds": ["linear", ["head", "mlp"]],
    "rules": ["weight_delta", "gradient"],
    "strengths": [1.0, 1.5],
    "shares": [0.2, 0.4],
    "texts": 4,
    "tokens": 8,
}


def config(**changes: Any) -> ScreenConfig:
    return ScreenConfig.model_validate({**SMALL, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("screens") / "small"
    report_screen(config(), out, progress=False)
    return out


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "screen.csv")


def test_every_recipe_has_a_row_within_its_share(table: pd.DataFrame) -> None:
    assert len(table) == 2 * 2 * 2 * 2 and set(table.kind) == {"linear", "head+mlp"}
    assert (table.parameters <= table.share).all() and (table.k > 0).all()
    # one module more would be too many
    screen = Screen(config())
    order = screen.pair.modules("linear")
    for share in (0.2, 0.4):
        chosen = screen._within(order, share)
        assert screen._size(order[: len(chosen) + 1]) > share * screen.everything >= screen._size(chosen)


def test_the_numbers_are_those_of_the_library(folder: Path, table: pd.DataFrame) -> None:
    row = table[(table.kind == "head+mlp") & (table["rule"] == "gradient")].iloc[-1]
    modules = list(pd.read_csv(folder / "rankings" / "head-mlp-gradient.csv").module[: row.k])
    screen = Screen(config())
    graft = Graft(modules, row.strength)
    with graft.applied(screen.pair):
        found = evaluate(screen.pair.target, screen.splits.choose)
    assert found.log_probability is not None
    assert row.log_probability == pytest.approx(found.log_probability.mean(), abs=1e-6)
    assert row.accuracy == found.accuracy
    for role in ("target", "source"):
        alone = evaluate(getattr(screen.pair, role), screen.splits.choose).log_probability
        assert alone is not None and row[f"{role}_log_probability"] == pytest.approx(alone.mean(), abs=1e-6)
    texts = neutral_texts(screen.pair.target, 4, 8, 43)
    harm = measure_side_effects(screen.pair, graft, tasks=(), text=texts).frame.set_index("what").change
    assert row.perplexity_change == pytest.approx(harm["perplexity"], abs=1e-6)
    assert row.kl == pytest.approx(harm["KL"], abs=1e-6)


def test_no_test_question_is_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    tests = {e.question for e in Screen(config()).splits.test}
    real = Task.prompts

    def seen(task: Task, tokenizer: Any = None) -> list[str]:
        asked.update(e.question for e in task)
        return real(task, tokenizer)

    monkeypatch.setattr(Task, "prompts", seen)
    report_screen(config(rules=["lae"], shares=[0.2], strengths=[1.0]), tmp_path / "out", progress=False)
    assert asked and not asked & tests
    assert set(json.loads((tmp_path / "out" / "environment.json").read_text())["questions"]) == {"discover", "choose"}


def test_a_killed_screen_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    out.mkdir()
    for name in ("environment.json", "config.yaml", "cells.jsonl"):
        (out / name).write_bytes((folder / name).read_bytes())
    lines = (out / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (out / "cells.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    page = report_screen(config(), out, progress=False)
    assert (out / "cells.jsonl").read_bytes() == (folder / "cells.jsonl").read_bytes()
    assert page == (folder / "summary.md").read_text() and (out / "best.yaml").exists()
    with pytest.raises(UsageError, match="begun with different settings"):
        report_screen(config(seed=1), out, progress=False)


def test_recipes_may_join_and_another_limit_may_choose(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    report_screen(config(strengths=[1.0]), out, progress=False)
    before = (out / "cells.jsonl").read_bytes()
    page = report_screen(config(perplexity=-1.0), out, progress=False)
    after = (out / "cells.jsonl").read_bytes()
    assert after.startswith(before) and len(after.splitlines()) == len(
        (folder / "cells.jsonl").read_bytes().splitlines()
    )
    assert (out / "screen.csv").read_bytes() == (folder / "screen.csv").read_bytes()
    assert "No recipe" in page and not (out / "best.yaml").exists()


def test_of_free_form_answers_no_accuracy_is_claimed(tmp_path: Path) -> None:
    free = config(task={"name": "addition", "short_answer": False}, rules=["weight_delta"], shares=[0.2])
    page = report_screen(free, tmp_path / "out", progress=False)
    table = pd.read_csv(tmp_path / "out" / "screen.csv")
    assert table.accuracy.isna().all() and table.log_probability.notna().all() and "right)" not in page


def test_the_best_becomes_a_run(folder: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    best = table.loc[table.log_probability.idxmax()]
    run = Run(read_config(folder / "best.yaml"), tmp_path / "run")
    assert run.counts == [best.k] and run.config.strengths == (best.strength,) and run.config.rules == (best["rule"],)
    assert "+".join(run.config.kinds) == best.kind
    assert [s.fingerprint for s in run.splits] == [s.fingerprint for s in Screen(config()).splits]
    assert f"K = {best.k} ({best.kind}) by `{best['rule']}`" in (folder / "summary.md").read_text()


def test_a_limit_of_perplexity_leaves_recipes_out(table: pd.DataFrame) -> None:
    limit = float(table.perplexity_change.quantile(0.3))
    best = best_recipe(table, limit)
    allowed = table[table.perplexity_change <= limit]
    assert best is not None and table.log_probability[best] == allowed.log_probability.max()
    assert best_recipe(table, -1.0) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": [0]}, "shares of the parameters are above 0"),
        ({"rules": []}, "rules: name at least one"),
        ({"rules": ["leo"]}, "unknown rule"),
        ({"operators": ["paste"]}, "unknown operator"),
        ({"kinds": ["layer"]}, "kinds"),
        ({"share": [0.1]}, "unknown key 'share': did you mean shares?"),
        ({"texts": 0, "perplexity": 0.01}, "a limit needs texts"),
        ({"rules": ["greedy"]}, "searches on `choose`"),
        ({"rules": ["mask"]}, "searches on `choose`"),
        ({"rule_options": {"lae": {}}}, "lae is none of the rules"),
        ({"shares": [0.0001]}, "the smallest module has"),
        ({"name": "a/b"}, "a name becomes a folder"),
        ({"pair": "family/generation"}, "unknown pair"),
    ],
)
def test_wrong_input(command: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**SMALL, **changes}))
    code, _, error = command("screen", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"))
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_by_the_command(command: Any, tmp_path: Path) -> None:
    small = {**SMALL, "rules": ["weight_delta"], "kinds": ["linear"], "strengths": [1.0], "texts": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(small))
    code, said, error = command("screen", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"))
    assert code == 0, error
    assert "mechtransplant run" in said and {p.suffix for p in (tmp_path / "out" / "figures").iterdir()} >= {".png"}
    assert read_screen(tmp_path / "c.yaml").grafted == (("linear",),)


def test_the_figure_draws_the_highest_rules_the_papers_and_both_models() -> None:
    from mechtransplant.figures import recipe_curves

    names = ["a", "b", "c", "d", "e", "f", "g", "lae"]
    rows = pd.DataFrame({"rule": names, "kind": "linear", "share": 0.1, "parameters": 0.1})
    rows = rows.assign(log_probability=[-1.0 - i for i in range(8)], target_log_probability=-9.0)
    rows = rows.assign(source_log_probability=-0.5)
    _, (panel,) = recipe_curves(rows)
    drawn = {line.get_label(): line.get_ydata()[0] for line in panel.lines}
    assert drawn == {"a": -1, "b": -2, "c": -3, "d": -4, "e": -5, "lae": -8, "target": -9, "source": -0.5}
    _, (panel,) = recipe_curves(rows[rows["rule"] != "lae"].drop(columns=["target_log_probability"]))
    assert {line.get_label() for line in panel.lines} == {"a", "b", "c", "d", "e", "f", "source"}
