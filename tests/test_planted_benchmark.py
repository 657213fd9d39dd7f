"""The planted benchmark: rows, summary, folder, plugin; small sizes on the family's pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import mechtransplant as mt
from mechtransplant.errors import UsageError
from mechtransplant.experiment import PlantedConfig, bench_planted, planted_pairs, report_planted
from mechtransplant.experiment.planted import default_rules, is_drifted, summary_of
from mechtransplant.ranking import RULES

PAIRS = ("family/planted-mlps", "family/planted-mlps-drifted")
SMALL: dict[str, Any] = {"seeds": 2, "discover": 16, "choose": 16, "test": 64}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return bench_planted(PAIRS, ("own", "weight_delta", "random", "gradient"), **SMALL)


def test_every_planted_pair_is_a_problem() -> None:
    names = planted_pairs()
    assert {"family/planted-heads", "family/planted-mixed-drifted"} <= set(names)
    assert all(is_drifted(n) == n.endswith("drifted") for n in names if n.startswith("family/"))
    assert all(is_drifted(n) for n in names if n.startswith("smollm2/"))
    assert {"greedy", "mask", "lae"} <= set(default_rules()) and "bottom" not in default_rules()


def test_own_finds_planted_mlps(rows: pd.DataFrame) -> None:
    assert len(rows) == 2 * 2 * 4 and (rows.planted == 2).all() and (rows.modules == 36).all()
    own = rows[rows.rule == "own"]
    assert (own.auroc == 1).all() and (own.precision == 1).all() and (own.average_precision == 1).all()
    assert (own.recovery > 80).all() and (own.recovery_low <= own.recovery).all()
    clean = rows[(rows.rule == "weight_delta") & ~rows.drifted]
    assert (clean.auroc == 1).all(), "in a clean pair nothing else moved"
    assert rows[rows.rule == "random"].recovery.max() < 50


def test_summary_is_means_of_means(rows: pd.DataFrame) -> None:
    table = summary_of(rows).set_index("rule")
    for rule, mine in rows[rows.drifted].groupby("rule"):
        assert table.drifted_auroc[rule] == pytest.approx(mine.auroc.mean())
    assert table.stability["weight_delta"] == 1 and table.stability["random"] < 0.5
    assert list(table.drifted_auroc) == sorted(table.drifted_auroc, reverse=True)
    assert (table.seeds == 2).all() and (table.drifted_pairs == 1).all()


def test_a_folder_is_continued_with_more_rules(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    config = PlantedConfig(PAIRS, ("own", "random"), **SMALL)
    page = report_planted(config, out, progress=False)
    lines = (out / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 8 and "| `own` | prompts | 1 | 1.000 |" in page
    assert {p.name for p in out.iterdir()} >= {"config.yaml", "results.csv", "summary.csv", "summary.md", "figures"}
    more = PlantedConfig(PAIRS, ("own", "random", "depth"), **SMALL, single=("depth",))
    page = report_planted(more, out, progress=False)
    again = (out / "cells.jsonl").read_text().splitlines()
    assert again[:8] == lines and len(again) == 10, "one seed of depth on each pair"
    assert "`depth`" in page and (out / "figures" / "planted_benchmark.png").exists()


def test_a_folder_is_not_overwritten_by_another_config(tmp_path: Path, command: Any) -> None:
    out = tmp_path / "bench"
    sizes = {**SMALL, "seeds": 1, "test": 16}
    report_planted(
        PlantedConfig(PAIRS[:1], ("own", "depth"), **sizes, overrides={"smollm2/": {"seeds": 2}}), out, False
    )
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    for arguments, message in (
        (["--seeds", "3"], "was measured with seeds = 1, not 3"),
        (["--options", '{"greedy": {"pool": 4}}'], "was measured with options = {}"),
        (["--config", str(tmp_path / "other.yaml")], "was measured with"),
    ):
        (tmp_path / "other.yaml").write_text("rules: [own]\nseeds: 1\n")
        code, _, error = command("bench", "planted", *arguments, "--out", str(out))
        assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    # more rules join it, and nothing else need be said again
    code, page, _ = command("bench", "planted", "--rules", "random", "--out", str(out))
    assert code == 0 and all(f"`{r}`" in page for r in ("own", "depth", "random"))
    assert len((out / "cells.jsonl").read_text().splitlines()) == 3
    assert "smollm2/" in (out / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("overrides: [a]", "overrides: expected a mapping from name to a mapping, got"),
        ("overrides: {smollm2/: 3}", "overrides: expected a mapping from name to a mapping, got"),
        ("overrides: {smollm2/: {options: [greedy]}}", "overrides.smollm2/: options: expected a mapping"),
        ("options: {greedy: 4}", "options: expected a mapping from name to a mapping, got"),
        ("rules: 5", "rules: expected a list of names, got '5'"),
        ("seeds: many", "seeds: expected a whole number, got 'many'"),
        ("seeds: true", "seeds: expected a whole number, got 'True'"),
        ("sedes: 3", "unknown key of"),
        ("seeds: 3\nseeds: 4", "the key 'seeds' is given twice"),
    ],
)
def test_a_wrong_config_gets_one_line(command: Any, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text(content + "\n")
    code, _, error = command("bench", "planted", "--config", str(path), "--out", str(tmp_path / "out"))
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_a_rule_that_fits_strengths_is_judged_with_them() -> None:
    from mechtransplant.experiment.planted import Problem, splits_of

    pair = mt.load_pair("family/planted-mlps-drifted")
    splits = splits_of(pair, 16, 16, 64, 0)
    options = {"rounds": 1, "steps": 2, "settle": 2}
    row = Problem(pair, splits).measure("pruned", 0, options)
    ranking = mt.rank_modules(pair, splits.discover, "pruned", ("head", "mlp"), seed=0, k=2, **options)
    assert [str(m) for m in ranking.module[:2]] == row["top"] and (ranking.strength[:2] != 1).all()
    accuracy = {}
    for name, strengths in (("own", list(ranking.strength[:2])), ("one", 1.0)):
        with mt.Graft(list(ranking.module[:2]), strengths).applied(pair):
            found = mt.evaluate(pair.target, splits.test)
        accuracy[name] = found.log_probability.mean() - mt.evaluate(pair.target, splits.test).log_probability.mean()
    assert row["log_probability_change"] == pytest.approx(accuracy["own"], abs=1e-6)
    assert abs(accuracy["own"] - accuracy["one"]) > 1e-3


def test_config_and_options_are_not_mixed(command: Any, tmp_path: Path) -> None:
    code, _, error = command("bench", "planted", "--config", "configs/bench-planted.yaml", "--seeds", "1")
    assert code == 2 and "--config takes the place of --seeds" in error


def test_an_edited_rule_is_computed_again(tmp_path: Path) -> None:
    from mechtransplant.experiment.planted_report import load_plugin

    plugin, found = tmp_path / "mine.py", []
    for sign in ("", "-"):
        plugin.write_text(
            "import mechtransplant as mt\n\n\n"
            '@mt.register_rule("edited", needs="nothing")\n'
            "def edited(pair, task, kind, **options):\n"
            f"    return [{sign}float(m in pair.planted) for m in pair.modules(kind)]\n"
        )
        try:
            load_plugin(plugin)
            report_planted(PlantedConfig(PAIRS[1:], ("edited",), **{**SMALL, "seeds": 1}), tmp_path / "o", False)
            found.append(float(pd.read_csv(tmp_path / "o" / "results.csv").auroc.iloc[0]))
        finally:
            RULES.pop("edited", None)
    assert found == [1.0, 0.0]


def test_anothers_rule_by_plugin(tmp_path: Path, command: Any) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import mechtransplant as mt\n\n\n"
        '@mt.register_rule("their-rule", needs="nothing")\n'
        "def theirs(pair, task, kind, **options):\n"
        "    return [float(m in pair.planted) for m in pair.modules(kind)]\n"
    )
    sizes = ["--seeds", "1", "--discover", "8", "--choose", "8", "--test", "16"]
    wanted = [
        "--pairs",
        PAIRS[1],
        "--rules",
        "their-rule,random",
        "--plugin",
        str(plugin),
        "--out",
        str(tmp_path / "o"),
    ]
    try:
        code, out, _ = command("bench", "planted", *wanted, *sizes)
        assert code == 0 and "| `their-rule` | nothing | 1 | 1.000 |" in out
        # another's folder: the plugin's rule joins those that are there, with options of its own
        folder = tmp_path / "theirs"
        report_planted(PlantedConfig(PAIRS[1:], ("random",), **{**SMALL, "seeds": 1, "test": 16}), folder, False)
        RULES.pop("their-rule", None)
        more = ["--plugin", str(plugin), "--options", '{"their-rule": {"strange": 1}}', "--out", str(folder)]
        code, out, _ = command("bench", "planted", *more)
        assert code == 0 and all(f"`{rule}`" in out for rule in ("their-rule", "random"))
    finally:
        RULES.pop("their-rule", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "family/generations"], "unknown planted pair 'family/generations'"),
        (["--rules", "leo"], "unknown rule 'leo': did you mean lae"),
        (["--seeds", "0"], "seeds must be a whole number of at least 1"),
        (["--plugin", "nowhere.py"], "no file at nowhere.py"),
        (["--options", "pool=4"], "--options is JSON"),
        (["--options", '{"greedy": {"pol": 4}}'], "unknown option of rule 'greedy' 'pol': did you mean pool"),
    ],
)
def test_wrong_input_gets_one_line_and_writes_nothing(
    command: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, error = command("bench", "planted", *arguments, "--out", str(tmp_path / "out"))
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    # the folder of a run has a file of that name too
    (tmp_path / "environment.json").write_text('{"starts": [], "weights": {}}')
    with pytest.raises(UsageError, match="holds no such benchmark"):
        report_planted(PlantedConfig(PAIRS, ("random",), **SMALL), tmp_path, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"precious.txt", "environment.json"}
    assert "weights" in (tmp_path / "environment.json").read_text()
