"""Patch against graft as a folder: its numbers, its figure, its page, and that a killed start loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from mechtransplant.errors import UsageError
from mechtransplant.experiment import EffectsConfig, effects_report, report_effects
from mechtransplant.figures import patch_versus_graft_plot
from mechtransplant.pair import load_pair
from mechtransplant.patching import patch_versus_graft
from mechtransplant.tasks import load_task

CONFIG = EffectsConfig("family/planted-mixed-drifted", prompts=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An analysis that was killed after two of four layers, and started again."""
    out = tmp_path_factory.mktemp("effects") / "out"
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def killed(*arguments, **options):  # type: ignore[no-untyped-def]
            calls.append(arguments)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return patch_versus_graft(*arguments, **options)

        patch.setattr(effects_report, "patch_versus_graft", killed)
        patch.setattr(effects_report, "TOGETHER", 1)
        with pytest.raises(KeyboardInterrupt):
            report_effects(CONFIG, out, progress=False)
    assert len((out / "cells.jsonl").read_text().splitlines()) == 2
    report_effects(CONFIG, out, progress=False)
    assert len((out / "cells.jsonl").read_text().splitlines()) == 4
    return out


def test_layers_are_measured_in_groups_and_stored_one_by_one(folder: Path, tmp_path: Path) -> None:
    report_effects(CONFIG, tmp_path / "whole", progress=False)
    whole, parts = ((f / "cells.jsonl").read_text() for f in (tmp_path / "whole", folder))
    assert whole == parts
    layers = [["a"] * 3, ["b"] * 3, ["c"] * 30, ["d"] * 20, ["e"] * 40, ["f"]]
    assert effects_report._groups(layers, [False] * 6) == [[0, 1, 2, 3], [4], [5]]
    assert effects_report._groups(layers, [True, False, True, True, False, False]) == [[1, 4], [5]]
    assert effects_report._groups(layers, [True] * 6) == []


def test_the_table_is_patch_versus_graft(folder: Path) -> None:
    table = pd.read_csv(folder / "effects.csv").set_index("module")
    pair = load_pair(CONFIG.pair)
    task = load_task(pair.default_task or "").split(8, 1, 1, 0).discover
    assert len(table) == 36
    expected = patch_versus_graft(pair, task, ["L1H4", "L2.mlp"]).set_index("module")
    for column in ("patch_effect", "patch_low", "graft_effect", "graft_high"):
        assert table[column][["L1H4", "L2.mlp"]].to_list() == pytest.approx(expected[column].to_list(), abs=1e-4)


def test_few_prompts_give_no_interval_and_are_no_evidence(folder: Path, tmp_path: Path) -> None:
    pair = load_pair(CONFIG.pair)
    task = load_task(pair.default_task or "").split(8, 1, 1, 0).discover
    ends = ["patch_low", "patch_high", "graft_low", "graft_high"]
    for n, none in ((1, True), (4, True), (5, False)):
        table = patch_versus_graft(pair, task.subset(range(n)), ["L1H4", "L2.mlp"])
        assert (table[ends].isna() == none).all().all() and table[["patch_effect", "graft_effect"]].notna().all().all()
    page = report_effects(EffectsConfig(CONFIG.pair, prompts=4), tmp_path, progress=False)
    assert "| head | 32 | 0 | 0 | 0 |" in page and "nan" not in page
    assert "4 prompts are too few for intervals" in page
    assert "8 prompts are few: their bootstrap intervals are too narrow" in (folder / "summary.md").read_text()


def test_the_page_and_the_figure(folder: Path) -> None:
    page = (folder / "summary.md").read_text(encoding="utf-8")
    assert "| L2.mlp (planted) |" in page and "a gap of" in page and "rank correlation" in page
    for suffix in ("png", "pdf", "svg", "csv"):
        assert (folder / "figures" / f"patch_versus_graft.{suffix}").stat().st_size > 1000
    said = json.loads((folder / "environment.json").read_text())
    assert said["config"]["pair"] == CONFIG.pair and len(said["starts"]) == 1 and said["questions"]["n"] == 8
    figure, axes = patch_versus_graft_plot(pd.read_csv(folder / "effects.csv"), ["L2.mlp"])
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"heads", "MLPs", "MLPs, marked"}
    assert "L2.mlp" in {t.get_text() for t in axes.texts}
    with pytest.raises(UsageError, match="lacks the columns"):
        patch_versus_graft_plot(pd.DataFrame({"module": ["L0H0"]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 9}, "begun with different config"),
        ({"kinds": ("linear",)}, "unknown kind of module"),
        ({"heads": "q"}, "expected z or result"),
        ({"kv": "always"}, "unknown K/V policy"),
        ({"prompts": 0}, "prompts must be"),
    ],
)
def test_refusals_change_nothing(folder: Path, changes: dict, message: str) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=message):
        report_effects(EffectsConfig(**{"pair": CONFIG.pair, "prompts": 8, **changes}), folder, progress=False)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no such analysis"):
        report_effects(CONFIG, tmp_path, progress=False)
    assert {p.name for p in tmp_path.iterdir()} <= {"notes.txt", ".lock"}
