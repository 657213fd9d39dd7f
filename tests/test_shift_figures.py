"""Figures of shifts draw what their frames hold, mark what is significant, and refuse what they cannot show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from mechtransplant.errors import UsageError
from mechtransplant.figures import (
    BLUE,
    consistency_plot,
    lorenz,
    own_against_inherited,
    save_figure,
    shift_heatmap,
    volcano,
)
from mechtransplant.localization import consistency, lorenz_curve
from mechtransplant.pair import Pair
from mechtransplant.shifts import measure_shifts
from mechtransplant.significance import test_shifts as table_of
from mechtransplant.tasks import load_task


@pytest.fixture(scope="module")
def shifts(generations: Pair) -> pd.DataFrame:
    measures = ("magnitude", "own", "inherited")
    return measure_shifts(generations, load_task("addition", 24), measures=measures, positions="answer")


@pytest.fixture(scope="module")
def table(shifts: pd.DataFrame) -> pd.DataFrame:
    return table_of(shifts, permutations=999)


def meshes(axes: object) -> list[np.ndarray]:
    return [np.ma.filled(c.get_array(), np.nan) for c in axes.collections]  # type: ignore[attr-defined]


def test_heatmap_has_heads_then_the_mlp(table: pd.DataFrame) -> None:
    _, axes = shift_heatmap(table)
    heads, mlps = meshes(axes)
    indexed = table.set_index("module").effect_size
    assert heads.reshape(4, 8)[2, 5] == indexed["L2H5"] and mlps.reshape(4, 1)[3, 0] == indexed["L3.mlp"]
    marks = sum(len(line.get_xdata()) for line in axes.lines)
    assert marks == (table.p_adjusted <= 0.05).sum() > 0
    assert [t.get_text() for t in axes.get_xticklabels()][-1] == "MLP"
    low, high = axes.collections[0].get_clim()
    assert low == -high, "signed values have a scale that is symmetric around 0"


def test_heatmap_of_a_norm_starts_at_0_and_has_no_marks(shifts: pd.DataFrame) -> None:
    means = shifts[shifts.measure == "own"].groupby(["module", "measure"], sort=False).value.mean().reset_index()
    figure, axes = shift_heatmap(means, value="value")
    assert axes.collections[0].get_clim()[0] == 0 and not axes.lines
    assert "own" in figure.axes[-1].get_ylabel()


def test_an_infinite_effect_size_does_not_set_the_scale(table: pd.DataFrame) -> None:
    effects = table.effect_size.where(table.module != "L1H3", np.inf)
    _, axes = shift_heatmap(table.assign(effect_size=effects))
    low, high = axes.collections[0].get_clim()
    largest = table.effect_size[table.module != "L1H3"].abs().max()
    assert high == -low == pytest.approx(largest)
    assert meshes(axes)[0].reshape(4, 8)[1, 3] == pytest.approx(largest)


def test_an_outlier_does_not_set_the_scale_and_is_said_to_be_beyond(table: pd.DataFrame) -> None:
    effects = table.effect_size.where(table.module != "L1H3", 300.0)
    _, axes = shift_heatmap(table.assign(effect_size=effects))
    assert axes.collections[0].get_clim()[1] < 20
    assert meshes(axes)[0].reshape(4, 8)[1, 3] == axes.collections[0].get_clim()[1]
    _, axes = volcano(table.assign(effect_size=effects))
    assert axes.get_xlim()[1] < 25


def test_what_is_subtracted_from_what(shifts: pd.DataFrame) -> None:
    own = shifts[shifts.measure == "own"]
    control = table_of(own, control=own.assign(value=own.value.to_numpy()[::-1]), permutations=999)
    assert "task − control" in shift_heatmap(control)[0].axes[-1].get_ylabel()
    magnitude = table_of(shifts, measure="magnitude", permutations=999)
    assert "source − target" in shift_heatmap(magnitude)[0].axes[-1].get_ylabel()


def test_heads_alone_and_mlps_alone(table: pd.DataFrame) -> None:
    for kind, columns in (("H", 8), ("mlp", 1)):
        _, axes = shift_heatmap(table[table.module.str.contains(kind)])
        assert [m.size for m in meshes(axes) if m.size] == [4 * columns]


def filled(axes: object) -> int:
    """How many points are filled blue."""
    lines = [line for line in axes.lines if line.get_marker() in "os^Dv"]  # type: ignore[attr-defined]
    return sum(len(line.get_xdata()) for line in lines if to_rgba(line.get_markerfacecolor()) == to_rgba(BLUE))


def test_volcano_fills_the_significant(table: pd.DataFrame) -> None:
    _, axes = volcano(table)
    assert filled(axes) == (table.p_adjusted <= 0.05).sum()
    assert "36 modules, n = 24" in axes.get_title()
    names = {t.get_text() for t in axes.texts}
    assert len(names) == 6 and names <= set(table[table.p_adjusted <= 0.05].module)


def test_a_p_value_of_0_stands_at_the_end_of_the_scale(shifts: pd.DataFrame) -> None:
    # a t-test's p underflows where a module shifts equally on all prompts
    equal = shifts[shifts.measure == "magnitude"].copy()
    equal.loc[equal.module == "L0.mlp", "value"] = 1.0
    table = table_of(equal, test="t", correction="holm").set_index("module", drop=False)
    assert table.p_adjusted["L0.mlp"] == 0
    figure, axes = volcano(table.reset_index(drop=True))
    figure.draw_without_rendering()
    assert np.isfinite(axes.get_ylim()).all() and "L0.mlp" in [text.get_text() for text in axes.texts]


def test_consistency_and_lorenz(shifts: pd.DataFrame) -> None:
    signs = consistency(shifts)
    _, axes = consistency_plot(signs)
    assert filled(axes) == (signs.sign_p <= 0.05).sum() and axes.get_xscale() == "log"
    curve = lorenz_curve(shifts, "own", permutations=99)
    _, axes = lorenz(curve)
    line = next(line for line in axes.lines if line.get_label() == "measured")
    np.testing.assert_allclose(line.get_ydata(), 100 * np.r_[0, curve.cumulative])


def test_own_against_inherited_fills_the_planted(shifts: pd.DataFrame) -> None:
    _, axes = own_against_inherited(shifts, ["L1H2", "L3.mlp"])
    assert filled(axes) == 2 and "marked" in axes.get_title()
    with pytest.raises(UsageError, match="marked names L9H9"):
        own_against_inherited(shifts, ["L9H9"])
    assert filled(own_against_inherited(shifts, "L1H2")[1]) == 1
    with pytest.raises(UsageError, match="lacks the columns"):
        own_against_inherited(shifts.drop(columns="value"))
    with pytest.raises(UsageError, match="measure both"):
        own_against_inherited(shifts[shifts.measure == "own"])


def test_what_cannot_be_drawn_is_said(shifts: pd.DataFrame, table: pd.DataFrame) -> None:
    with pytest.raises(UsageError, match="one at a time"):
        shift_heatmap(pd.concat([table, table.assign(measure="other")]))
    with pytest.raises(UsageError, match="lacks the columns size"):
        shift_heatmap(table, value="size")
    with pytest.raises(UsageError, match="heads and MLPs"):
        shift_heatmap(table[:1].assign(module="L0.q_proj"))
    with pytest.raises(UsageError, match="lorenz_curve"):
        lorenz(table)
    with pytest.raises(UsageError, match="lacks the columns"):
        volcano(shifts[shifts.measure == "own"])


def test_only_figures_are_saved(table: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a figure"):
        save_figure(volcano(table), tmp_path, "x")  # type: ignore[arg-type]
    save_figure(volcano(table)[0], str(tmp_path / "new"), "x")
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_saved_twice_is_saved_alike(table: pd.DataFrame, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_figure(shift_heatmap(table)[0], tmp_path / name, "heatmap", table)
    for suffix in ("png", "pdf", "svg", "csv"):
        assert len({(tmp_path / name / f"heatmap.{suffix}").read_bytes() for name in ("one", "two")}) == 1
