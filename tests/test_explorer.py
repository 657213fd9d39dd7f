"""The explorer says what the run's tables say, for every slider and click, and what the run did not measure."""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from small_runs import small

from mechtransplant.errors import UsageError
from mechtransplant.experiment import parse_config, run_experiment
from mechtransplant.explorer import Explorer, MeasuredRun, explore

RUNS = Path(__file__).resolve().parents[1] / "runs"
FAMILY, SMOLLM2 = RUNS / "family-generations", RUNS / "smollm2-instruct"


def words(explorer: Explorer) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", explorer.said.value))


@pytest.mark.parametrize("folder", [FAMILY, SMOLLM2])
def test_every_rule_and_k_has_the_tables_numbers(folder: Path) -> None:
    explorer, rules = explore(folder), pd.read_csv(folder / "rules.csv")
    table = pd.read_parquet(folder / "results.parquet")
    for rule in rules.rule:
        explorer.rule.value = rule
        mine = table[(table.role == "graft") & (table["rule"] == rule) & (table.split == "test")]
        for k in explorer.k.options:
            explorer.k.value = k
            rows = mine[mine.k == k]
            if not len(rows):
                continue
            assert len(explorer.modules) == len(explorer.graft) == k
            assert f"accuracy on test {100 * rows.accuracy.iloc[0]:.1f} %" in re.sub(r"\s+", " ", words(explorer))
    at = rules[rules.random_n.notna()].iloc[0]
    explorer.rule.value, explorer.k.value = at["rule"], at.k
    said = re.sub(r"\s+", " ", words(explorer))
    assert f"Recovery {at.recovery:.0f} %" in said and "perplexity of neutral text" in said
    assert f"source on test {100 * at.source:.1f} %" in said and f"target on test {100 * at.target:.1f} %" in said


def test_random_sets_are_those_of_the_verdict() -> None:
    explorer = explore(SimpleNamespace(folder=FAMILY))  # type: ignore[arg-type]
    rules = pd.read_csv(FAMILY / "rules.csv").set_index("rule")
    for rule in ("lae", "weight_delta", "mask"):
        explorer.rule.value, explorer.k.value = rule, int(rules.k[rule])
        said = re.sub(r"\s+", " ", words(explorer))
        found = re.search(r"random sets of the run \((\d+)\) on test [\d.]+ % \([\d.]+ – [\d.]+\); (\d+) beaten", said)
        assert found and (int(found[1]), int(found[2])) == (rules.random_n[rule], rules.random_beaten[rule])
    # of other K the run has orders alone
    explorer.k.value = 2
    assert "random sets" not in words(explorer)


def test_a_rule_that_is_learned_for_one_k() -> None:
    explorer = explore(FAMILY)
    explorer.rule.value, explorer.k.value = "mask", 4
    four = list(explorer.modules)
    two = set(explorer.run.ranking("mask", 2).module[:2])
    for module in four:
        if module not in two:
            explorer.buttons[module].click()
    # the two of four that are left are the two that it learns for two, or they are not
    is_its_own = explorer.chosen == two
    assert ("The 2 highest by mask" in words(explorer)) == is_its_own
    assert ("Chosen by eye" in words(explorer)) == (not is_its_own)


def test_recovery_is_withheld_as_in_the_summary(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(FAMILY, folder, ignore=shutil.ignore_patterns("figures"))
    results = pd.read_parquet(folder / "results.parquet")
    target = results[(results.split == "test") & (results.role == "target")].correct.iloc[0]
    # a source that is hardly better
    results.loc[(results.split == "test") & (results.role == "source"), "correct"] = "1" + target[1:]
    results.to_parquet(folder / "results.parquet")
    assert "Recovery" not in words(explore(folder)) and "Recovery" in words(explore(FAMILY))


def test_a_click_changes_the_set_and_says_whether_it_was_measured() -> None:
    explorer = explore(FAMILY)
    explorer.k.value = 2
    first, second, third = explorer.ranking.module[:3]
    assert [explorer.buttons[m].description for m in (first, second, third)] == ["●", "●", ""]
    assert f"{first}: score" in explorer.buttons[first].tooltip and "rank 1 of 28" in explorer.buttons[first].tooltip
    explorer.buttons[second].click()
    # the first alone was measured as K = 1, and is the highest by its rule
    assert explorer.modules == (first,) and "The 1 highest by lae" in words(explorer)
    assert f"{second}: score" in words(explorer) and "not in the set" in words(explorer)
    assert "has not measured" not in words(explorer)
    explorer.buttons[third].click()
    assert explorer.modules == (first, third) and explorer.buttons[third].description == "●"
    assert "Your own 2 modules" in words(explorer) and "no held-out number" in words(explorer)
    assert "has not measured the set" in words(explorer) and f'"{third}"' in explorer.code()
    explorer.buttons[third].click()
    explorer.buttons[second].click()
    assert explorer.modules == (first, second) and "The 2 highest by lae" in words(explorer)


def test_the_code_that_it_gives_measures_the_set() -> None:
    explorer = explore(FAMILY)
    explorer.k.value = 7
    printed: list[Any] = []
    exec(explorer.code(), {"print": printed.append})
    known = explorer.run.of_set(frozenset(explorer.modules), 1.0, "choose", 8)
    assert known is not None and printed[0][8].accuracy == known.accuracy and printed[0][8].role == "choose"


def test_a_turned_run_with_an_operator_and_budgets_is_measured_as_it_was(tmp_path: Path) -> None:
    config = parse_config(
        small(
            pair={"source": "repo:family/second", "target": "repo:family/first"},
            direction="better",
            rule="weight_delta",
            k=[2],
            strengths=[0.5, 1.0],
            operator="slerp",
            random_sets=0,
            curve_sets=0,
            controls=[],
            side_effects=None,
        )
    )
    folder = run_experiment(config, tmp_path / "small", progress=False).folder
    explorer = explore(folder)
    explorer.strength.value = 0.5
    again = explorer.run.measure(explorer.modules, 0.5)
    known = explorer.run.of_set(frozenset(explorer.modules), 0.5, "choose", explorer.budget.value)
    assert known is not None and again[explorer.budget.value].accuracy == known.accuracy
    assert "reversed" in (folder / "summary.md").read_text() and "elsewhere" not in words(explorer)
    with pytest.raises(UsageError, match="unknown split 'tests'"):
        explorer.run.measure(["L0.q_proj"], split="tests")
    (folder / "cells.jsonl").unlink()
    with pytest.raises(UsageError, match=r"lacks cells\.jsonl"):
        explore(folder)


def test_heads_and_mlps_have_a_column_each(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(FAMILY, folder, ignore=shutil.ignore_patterns("figures"))
    names = [f"L{layer}H{head}" for layer in range(3) for head in range(11)] + [f"L{layer}.mlp" for layer in range(2)]
    scores = [0.5 - 0.01 * i for i in range(len(names))]
    frame = pd.DataFrame({"module": names, "score": scores, "rank": range(1, len(names) + 1)})
    frame.to_csv(folder / "ranking.csv", index=False)
    explorer = explore(folder)
    *layers, below = explorer.grid.children
    assert [row.children[0].value for row in layers] == ["2", "1", "0"]
    assert [label.value for label in below.children[1:]] == [*map(str, range(11)), "mlp"]
    assert len(explorer.buttons) == 35 and all(len(row.children) == 13 for row in layers)
    colours = [explorer.buttons[n].style.button_color for n in ("L0H0", "L1.mlp")]
    assert colours[0] != colours[1]


@pytest.mark.parametrize("folder", [RUNS / "family-effects", RUNS / "nowhere", RUNS / "smollm2-heads-vs-mlps"])
def test_what_is_no_finished_run_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="holds no finished run"):
        MeasuredRun(folder)
