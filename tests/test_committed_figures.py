"""The committed figures are what the committed tables give, to the byte; nothing in them is clipped or over another."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.testing.compare import compare_images

from mechtransplant import figures
from mechtransplant.errors import UsageError
from mechtransplant.experiment import beside_reported, reported_results, runs_table
from mechtransplant.experiment.drawing import draw, drawings, fingerprint_of

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
import make_figures  # noqa: E402
import report as benchmarks_report  # noqa: E402

#: one of every kind, and the real model
FOLDERS = [
    "family-generations", "family-strengths", "family-screen", "smollm2-shifts", "family-effects",
    "family-heads-vs-mlps", "bench-planted",
]  # fmt: skip
PINNED = dict(re.findall(r"^(matplotlib|numpy|pandas)==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
OTHERS = {name: v for name, v in PINNED.items() if importlib.metadata.version(name) != v}


def texts_of(figure: Any) -> list[Any]:
    """The figure's own texts: its title, and those of its legends."""
    import matplotlib.text

    own = [*figure.texts, *([figure._suptitle] if figure._suptitle is not None else [])]
    return [*own, *(t for legend in figure.legends for t in legend.findobj(matplotlib.text.Text) if t.get_text())]


def ticks_of(axes: Any) -> list[tuple[str, Any]]:
    """The tick labels of one axes that lie within its limits."""
    renderer = axes.figure.canvas.get_renderer()
    found = []
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        low, high = sorted((low, high))
        for tick in axis.get_major_ticks():
            label = tick.label1
            if label.get_visible() and label.get_text() and low <= tick.get_loc() <= high:
                found.append((label.get_text(), label.get_window_extent(renderer)))
    return found


def check_same(made: Path, kept: Path, name: str) -> None:
    """The files of one figure are equal to the byte; with other versions of what draws them its picture is alike."""
    if OTHERS:
        assert compare_images(str(kept / f"{name}.png"), str(made / f"{name}.png"), tol=8) is None, OTHERS
        return
    for file in made.glob(f"{name}.*"):
        assert file.read_bytes() == (kept / file.name).read_bytes(), file.name


def check_layout(figure: Any) -> None:
    """No text outside of the figure; no tick label over another, an axis label or a title; no name over another."""
    import matplotlib.text

    with figures.style():
        figure.draw_without_rendering()
        page = figure.bbox
        own = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
        for axes in figure.axes:
            named = [axes.title, axes.xaxis.label, axes.yaxis.label]
            boxes = ticks_of(axes) + [(t.get_text(), t.get_window_extent()) for t in named if t.get_text()]
            for (one, a), (other, b) in combinations(boxes, 2):
                over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
                assert not (over[0] > 1 and over[1] > 1), f"{one!r} lies over {other!r}"
            own += boxes
            # names in the plot; an annotation's own extent has the line to its point as well
            names = [(t.get_text(), matplotlib.text.Text.get_window_extent(t)) for t in axes.texts if t.get_text()]
            for (one, a), (other, b) in combinations(names, 2):
                over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
                assert not (over[0] > 1 and over[1] > 1), f"the name {one!r} lies over {other!r}"
        for words, box in own:
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
            assert inside, f"{words!r} is cut off at the figure's edge"


@pytest.mark.parametrize("name", FOLDERS)
def test_committed_figures_are_what_the_tables_give(name: str, tmp_path: Path) -> None:
    folder = ROOT / "runs" / name
    for drawn in drawings(folder):
        assert drawn.figure.get_figwidth() in (figures.COLUMN, figures.PAGE)
        run = fingerprint_of(folder)
        figures.save_figure(drawn.figure, tmp_path, drawn.name, drawn.data, run=run)
        for suffix in ("png", "pdf", "svg"):
            made = (tmp_path / f"{drawn.name}.{suffix}").read_bytes()
            assert run.encode() in made, "the run's fingerprint is not in the file"
        check_same(tmp_path, folder / "figures", drawn.name)
        # fonts are embedded as outlines that printers take
        assert b"/Type3" not in (tmp_path / f"{drawn.name}.pdf").read_bytes()
        assert b"<text" not in (tmp_path / f"{drawn.name}.svg").read_bytes()
        # last: a figure that is laid out twice may move by a part of a pixel
        check_layout(drawn.figure)
    stale = {p.name for p in (folder / "figures").iterdir()} - {p.name for p in tmp_path.iterdir()}
    assert not stale, "figures that the tables do not give any more"


#: of several runs; the study's once one of its runs has finished
ACROSS = ("reported_rows", "run_rows", *["study"] * bool(len(make_figures.study_rows())))


def test_published_figures_are_the_runs_own(tmp_path: Path) -> None:
    for source, target in make_figures.published(make_figures.finished([])).items():
        assert source.read_bytes() == target.read_bytes(), f"{target.name}: run make figures"
    make_figures.draw_across(tmp_path)
    for name in ACROSS:
        check_same(tmp_path, ROOT / "figures", name)


def test_the_benchmarks_figures_are_what_their_results_give(tmp_path: Path) -> None:
    for name, (figure, rows) in benchmarks_report.pictures().items():
        figures.save_figure(figure, tmp_path, name, rows, run=f"of {name}.csv {benchmarks_report.digest(rows)}")
        check_same(tmp_path, ROOT / "figures", name)
        check_layout(figure)
    assert {p.stem for p in (ROOT / "figures").glob("*.png")} == {
        *benchmarks_report.pictures(), *make_figures.PUBLISHED, *ACROSS,
    }  # fmt: skip


def test_every_figure_function_has_a_committed_picture() -> None:
    # the same name as the picture's, or the beginning of it, but for these
    others = {"shift_heatmap": "heatmap", "consistency_plot": "consistency", "calibration_plot": "calibration"}
    others |= {"cost_plot": "cost", "power_plot": "power", "interval_coverage": "coverage"}
    others |= {"patch_versus_graft_plot": "patch_versus_graft", "heads_against_mlps_bars": "heads_against_mlps"}
    folders = [ROOT / "figures", *(ROOT / "runs" / folder / "figures" for folder in FOLDERS)]
    drawn = {path.stem for folder in folders for path in folder.glob("*.png")}
    for name in figures.__all__:
        if name.islower() and name not in ("save_figure", "style"):
            assert any(picture.startswith(others.get(name, name)) for picture in drawn), name


def sweep_rows() -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for budget in (8, 64):
        for role, accuracy in (("target", 0.2), ("source", 0.2 + budget / 128)):
            rows.append({"role": role, "rule": "", "k": 0, "strength": 0.0, "budget": budget, "accuracy": accuracy})
        for k in (1, 4, 16, 128):
            for strength in (0.5, 1.0, 2.0):
                accuracy = min(1.0, 0.2 + 0.004 * k * strength * (budget == 64) - 0.05 * (k == 1))
                rows.append(
                    {
                        "role": "graft",
                        "rule": "lae",
                        "k": k,
                        "strength": strength,
                        "budget": budget,
                        "accuracy": accuracy,
                    }
                )
    frame = pd.DataFrame(rows).assign(split="test", n=128)
    return frame.assign(low=frame.accuracy - 0.04, high=frame.accuracy + 0.05)


def test_along_the_strengths() -> None:
    long = sweep_rows().replace({"rule": {"lae": "integrated_gradient"}})
    check_layout(figures.strength_curve(long, split="test", title="smollm2/generations")[0])
    check_layout(figures.budget_grid(long, title="smollm2/generations")[0])
    figure, axes = figures.strength_curve(sweep_rows(), split="test", title="pair")
    check_layout(figure)
    lines = {c.get_label(): c for c in axes.containers}
    assert set(lines) == {"K = 1", "K = 4", "K = 16", "K = 128"}
    assert list(lines["K = 16"].lines[0].get_ydata()) == pytest.approx([23.2, 26.4, 32.8])
    some = figures.strength_curve(sweep_rows(), "lae", [4, 128], "test")[1].containers
    assert {c.get_label() for c in some} == {"K = 4", "K = 128"}
    with pytest.raises(UsageError, match="no several strengths at K = 3 on test"):
        figures.strength_curve(sweep_rows(), counts=[3], split="test")
    with pytest.raises(UsageError, match="no several strengths"):
        figures.strength_curve(sweep_rows().query("strength in (0, 1)"), split="test")
    with pytest.raises(UsageError, match="no grafts by 'own' on test: choose from lae"):
        figures.strength_curve(sweep_rows(), "own", split="test")
    with pytest.raises(UsageError, match="lacks the columns"):
        figures.budget_grid(pd.DataFrame({"k": [1]}))


def test_over_token_budget_and_k() -> None:
    figure, axes = figures.budget_grid(sweep_rows(), chosen={8: 1, 64: 16})
    check_layout(figure)
    dots = [tuple(np.floor(line.get_xydata()[0])) for line in axes.lines]
    assert dots == [(0, 0), (2, 1)] and not figures.budget_grid(sweep_rows())[1].lines
    cells = [t.get_text() for t in axes.texts]
    # rows from below: 8 tokens, then 64; the source's gap is the last of each
    assert cells == ["-5", "+0", "+0", "+0", "+6", "-5", "+2", "+6", "+51", "+50"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "4", "16", "128", "source"]
    with pytest.raises(UsageError, match="no grafts at strength 3 on test"):
        figures.budget_grid(sweep_rows(), strength=3.0)


def test_reported_rows_beside_a_runs() -> None:
    reported = reported_results()
    assert len(reported) == 10 and reported.recovery_percent.isna().sum() == 2
    # its ratios are those of its accuracies
    assert (reported.after_accuracy / reported.target_accuracy - reported.tir).abs().max() < 1e-3
    rows = beside_reported([ROOT / "runs" / "family-generations", ROOT / "runs" / "smollm2-instruct"])
    assert list(rows.who.unique()) == ["paper", "this project"] and len(rows) == 12
    figure, (left, right) = figures.reported_rows(rows, title="reported and measured")
    check_layout(figure)
    assert left.get_yticklabels()[0].get_text() == "Phi, 32 tokens, K = 16, n = 50"
    # with 50 questions no row of the paper excludes a ratio of 1
    intervals = [line for bars in right.containers for line in bars.lines[2][0].get_segments()]
    assert len(intervals) == 12 and all(low[0] < 1 < high[0] for low, high in intervals[:10])
    with pytest.raises(UsageError, match="lacks label"):
        figures.reported_rows(rows.drop(columns="label"))
    with pytest.raises(UsageError, match="holds no finished run"):
        beside_reported([ROOT / "runs"])


@pytest.mark.parametrize("rule", ["lae", "integrated_gradient", "weight_delta_relative"])
def test_a_rules_name_fits_below_its_curve(rule: str) -> None:
    results = pd.read_parquet(ROOT / "runs" / "smollm2-generations" / "results.parquet")
    figure, _ = figures.k_curve(results, rule=rule)
    check_layout(figure)
    assert f"graft by {rule}" in [text.get_text() for text in texts_of(figure)]


def test_runs_side_by_side() -> None:
    folder = ROOT / "runs" / "smollm2-generations"
    table = runs_table([folder, ROOT / "runs" / "family-strengths"])
    outcome = json.loads((folder / "outcome.json").read_text())["16"]
    first = table.iloc[0]
    assert (first.run, first["rule"], first.k) == ("smollm2-generations", "lae", len(outcome["modules"]))
    assert first.after == pytest.approx(outcome["after_accuracy"]) and first.after_low < first.after < first.after_high
    harm = pd.read_csv(folder / "side_effects.csv").query("role == 'graft' and rule == 'lae' and what == 'perplexity'")
    assert first.perplexity_change == harm[harm.k == first.k].change.iloc[0]
    # of several token budgets the largest
    assert list(table.budget.unique()) == [16]
    controlled = table[table.random_n.notna()]
    figure, (left, right) = figures.run_rows(controlled, title="side by side")
    check_layout(figure)
    assert left.get_yticklabels()[0].get_text() == "smollm2-generations, lae, K = 128"
    grey = left.collections[0].get_segments()
    assert np.allclose([line[0][0] for line in grey], 100 * controlled.random_low)
    assert "Recovery" in right.get_xlabel()
    # random sets at a strength of their own have a line of their own, below those at the graft's
    both = runs_table([ROOT / "runs" / "study-generations-best-0", folder])
    _, (left, _) = figures.run_rows(both[both["rule"].isin(["own", "lae"])])
    (first_grey, *_), (blue,) = (lines.get_segments() for lines in left.collections[:2])
    assert [blue[0][0], blue[1][0]] == pytest.approx([100 * both.tuned_low[0], 100 * both.tuned_high[0]])
    assert blue[0][1] < first_grey[0][1] and "beats 74 of 100" in [text.get_text() for text in left.texts]
    # where that is the graft's strength they are the same sets
    _, (left, _) = figures.run_rows(both.assign(tuned_strength=both.strength))
    assert len(left.get_legend_handles_labels()[1]) == 4
    with pytest.raises(UsageError, match="lacks recovery"):
        figures.run_rows(controlled.drop(columns="recovery"))
    with pytest.raises(UsageError, match="holds no finished run"):
        runs_table([ROOT / "runs" / "smollm2-shifts"])


def test_figures_are_drawn_again_from_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mechtransplant.cli import app

    said = CliRunner().invoke(app, ["figures", str(ROOT / "runs" / "family-effects"), "--out", str(tmp_path)])
    assert said.exit_code == 0 and "patch_versus_graft" in said.output
    assert {p.suffix for p in tmp_path.iterdir()} == {".png", ".pdf", ".svg", ".csv"}
    with pytest.raises(UsageError, match="holds no finished run"):
        draw(tmp_path)
