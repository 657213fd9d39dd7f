"""``mechtransplant shifts``: one folder with every table and figure; wrong input prints one line and leaves nothing."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from mechtransplant import cli
from mechtransplant.errors import UsageError
from mechtransplant.experiment import ShiftConfig, report_shifts
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.significance import test_shifts as table_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shifts") / "out"
    report_shifts(ShiftConfig("family/planted-mixed-drifted", control="max", prompts=16), out)
    return out


def test_the_folder_is_complete(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "compatibility.csv", "shifts.parquet", "table.csv", "consistency.csv",
        "concentration.csv", "stability.csv", "summary.md", "figures", ".lock",
    }  # fmt: skip
    drawn = {p.stem for p in (folder / "figures").glob("*.pdf")}
    assert {"heatmap_magnitude", "heatmap_own_control", "volcano", "consistency", "lorenz"} <= drawn
    assert yaml.safe_load((folder / "config.yaml").read_text())["control"] == "max"
    saved = json.loads((folder / "environment.json").read_text())
    assert saved["questions"]["control"]["n"] == 16 and len(saved["weights"]["source"]) == 16


def test_the_tables_follow_from_the_values(folder: Path) -> None:
    shifts, table = pd.read_parquet(folder / "shifts.parquet"), pd.read_csv(folder / "table.csv")
    again = table_of(shifts, measure="magnitude")
    saved = table[(table.measure == "magnitude") & (table.test == "sign-flip")].reset_index(drop=True)
    pd.testing.assert_series_equal(saved.p_adjusted, again.p_adjusted, rtol=1e-6)
    assert set(zip(table.measure, table.test, strict=True)) == {
        ("magnitude", "sign-flip"), ("projection", "direction"), ("magnitude", "control"), ("distance", "control"),
        ("own", "control"), ("inherited", "control"),
    }  # fmt: skip


def test_the_page_says_what_the_tables_hold(folder: Path) -> None:
    page, table = (folder / "summary.md").read_text(), pd.read_csv(folder / "table.csv")
    rows = table[(table.measure == "own") & (table.test == "control")]
    assert f"| own | control | 16 | {int((rows.p_adjusted <= 0.05).sum())} of 36 |" in page
    assert "they share 3 templates" in page
    assert "Planted: L1H1, L1H4, L2H2, L2H5, L2.mlp" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("family/generation",), "unknown pair"),
        (("family/generations", "--task", "adition"), "unknown task"),
        (("family/generations", "--kinds", "heads"), "did you mean head"),
        (("family/generations", "--positions", "first"), "unknown positions"),
        (("family/generations", "--correction", "fdr"), "unknown correction"),
        (("family/generations", "--prompts", "3"), "prompts must be"),
        (("family/generations", "--k", "99"), "k must be"),
        (("family/generations", "--seed", "-1"), "seed must be"),
        (("family/generations", "--kinds", "head, attn"), "overlap"),
        (("family/generations", "--unit", "token"), "unknown unit"),
        (("family/generations", "--text", "gold"), "positions are 'answer'"),
        (("family/generations", "--text", "none", "--positions", "decoding"), "unknown text"),
        (("family/generations", "--permutations", "10"), "permutations must be"),
    ],
)
def test_wrong_input(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = () if "--prompts" in arguments else ("--prompts", "8")
    monkeypatch.setattr(sys, "argv", ["mechtransplant", "shifts", *arguments, *short, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in said[-1] and len(said) == 1
    assert not (tmp_path / "out").exists()


def test_a_clean_pair_has_fewer_shifts_than_k(tmp_path: Path) -> None:
    page = report_shifts(ShiftConfig("family/planted-mlps", prompts=8), tmp_path / "out")
    assert "The 2 largest own shifts (no more than 2 of 36 modules have any)" in page


@pytest.mark.parametrize(
    ("parameter", "nowhere", "elsewhere"),
    [("model.embed_tokens.weight", "own", "inherited"), ("model.layers.3.mlp.down_proj.weight", "inherited", "own")],
)
def test_a_measure_that_is_0_everywhere_is_left_out(
    parameter: str, nowhere: str, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instruct: Pair
) -> None:
    changed = copy.deepcopy(instruct.target.hf)
    with torch.no_grad():
        changed.get_parameter(parameter).mul_(1.25)
    source = LanguageModel("changed", changed, instruct.target.tokenizer)
    pair = make_pair(source, instruct.target, "one tensor")
    monkeypatch.setattr("mechtransplant.experiment.shift_report.load_pair", lambda name: pair)
    config = ShiftConfig("family/instruct", "addition", control="sort", prompts=8, permutations=100)
    page = report_shifts(config, tmp_path / "out", progress=False)
    assert f"No module's `{nowhere}` is above 0 on any prompt" in page
    concentrated = set(pd.read_csv(tmp_path / "out" / "concentration.csv").measure)
    assert nowhere not in concentrated and {"distance", elsewhere} <= concentrated
    drawn = {p.stem for p in (tmp_path / "out" / "figures").glob("*.pdf")}
    assert ("lorenz" in drawn) == (tmp_path / "out" / "stability.csv").exists() == (nowhere != "own")


def test_templates_as_the_unit(tmp_path: Path) -> None:
    page = report_shifts(ShiftConfig("family/planted-mixed-drifted", prompts=24, unit="template"), tmp_path / "out")
    assert "the unit is the template, of which there are 3" in page and "projection" not in page
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert (table.n == 3).all() and table.note.str.contains("no p-value is below").all()


def test_a_folder_of_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="begun with different config"):
        report_shifts(ShiftConfig("family/generations", prompts=8), folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no such analysis"):
        report_shifts(ShiftConfig("family/generations", prompts=8), tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        report_shifts(ShiftConfig("family/generations", prompts=8), tmp_path / "notes.txt")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_killed_folder_is_written_again(tmp_path: Path) -> None:
    config = ShiftConfig("family/planted-mlps", prompts=16, permutations=200)
    out = tmp_path / "out"
    page = report_shifts(config, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for name in ("summary.md", "shifts.parquet", "table.csv"):
        (out / name).unlink()
    assert report_shifts(config, out) == page
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    tested = pd.read_csv(out / "table.csv")
    assert set(tested[tested.test == "sign-flip"].permutations) == {200}


def test_whose_text_is_decoded(tmp_path: Path) -> None:
    pages = {}
    for text in ("target", "source", "gold"):
        config = ShiftConfig("family/generations", prompts=8, positions="decoding", text=text, permutations=200)  # type: ignore[arg-type]
        pages[text] = report_shifts(config, tmp_path / text)
    shifts = {text: pd.read_parquet(tmp_path / text / "shifts.parquet") for text in pages}
    # the source's answers are nearly all the gold ones, the target's are not
    values = {text: frame["value"].to_numpy() for text, frame in shifts.items()}
    near = {text: abs(values[text] - values["gold"]).mean() for text in ("target", "source")}
    assert near["source"] < 0.5 * near["target"]
    for text, said in (("target", "the target's text"), ("source", "the source's text"), ("gold", "the gold answer")):
        assert f"positions `decoding` ({said})" in pages[text]
