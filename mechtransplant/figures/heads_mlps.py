"""Heads against MLPs: what grafts gain and what ablations lose, beside random sets of the same make-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.style import BLACK, BLUE, ORANGE, PAGE, PURPLE, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: arm → name, colour and hatch: hatches tell them apart in grey
_ARMS = {
    "head": ("heads", BLUE, "////"),
    "mlp": ("MLPs", ORANGE, ""),
    "mixed": ("both, ranked together", PURPLE, "...."),
}
#: the range of random sets, on which the median's mark is to be seen
PALE = "#BBBBBB"
_ROWS = {"parameters": "equal parameters", "modules": "equal number"}
_DEPTHS = ("early", "middle", "late")
#: outcome → (columns of value and interval, prefix of the random columns, scale, axis label)
_OUTCOMES = {
    "accuracy": ("accuracy_", "random_", 100.0, "Δ accuracy, points"),
    "log_probability": ("log_probability_", "random_log_probability_", 1.0, "Δ log p(answer), nats"),
}


def heads_against_mlps_bars(
    frame: pd.DataFrame,
    outcome: Literal["accuracy", "log_probability"] = "accuracy",
    by: Literal["count", "depth"] = "count",
    count: int | None = None,
    title: str = "",
) -> tuple[Figure, Any]:
    """Change of the changed model, after − before, as bars with 95 % intervals; beside each the range of random sets.

    Columns of panels: the graft (above 0: the target gained) and each ablation (below 0: the source lost). Rows: sets
    of equal parameters and of equal number.

    Args:
        frame: ``study.csv`` of ``mechtransplant heads-vs-mlps``.
        by: "count": all depths, a group of bars a number of MLPs; "depth": a group a third of the layers.
        count: with "depth", which number of MLPs; the smallest by default.

    Returns:
        the figure, and an array of axes (rows, columns).
    """
    if outcome not in _OUTCOMES or by not in ("count", "depth"):
        raise UsageError(f"expected outcome accuracy or log_probability, by count or depth, got {outcome!r}, {by!r}")
    prefix, random, scale, label = _OUTCOMES[outcome]
    needed = ["intervention", "method", "depth", "arm", "match", "count", f"{prefix}change", f"{prefix}low"]
    lacking = [c for c in (*needed, f"{prefix}high", f"{random}median") if c not in getattr(frame, "columns", [])]
    if lacking:
        raise UsageError(f"the frame lacks the columns {', '.join(lacking)}: pass a study.csv of heads-vs-mlps")
    kinds = list(dict.fromkeys(zip(frame.intervention, frame.method, strict=True)))
    if by == "count":
        rows, groups, what = frame[frame.depth == "all"], sorted(frame["count"].unique()), "count"
    else:
        size = int(frame["count"].min() if count is None else count)
        rows, groups, what = frame[(frame.depth != "all") & (frame["count"] == size)], list(_DEPTHS), "depth"
    matches = [m for m in _ROWS if (rows.match == m).any()]
    if not matches:
        raise UsageError("the frame has no rows of that kind: there is nothing to draw")
    with style():
        figure, first = new_figure(PAGE, 0.9 + 1.65 * len(matches))
        first.remove()
        panels = figure.subplots(len(matches), len(kinds), sharex=True, sharey="col", squeeze=False)
        for across, match in zip(panels, matches, strict=True):
            for panel, (intervention, method) in zip(across, kinds, strict=True):
                mine = rows[(rows.intervention == intervention) & (rows.method == method) & (rows.match == match)]
                _bars(panel, mine, groups, what, prefix, random, scale)
                panel.axhline(0, color=BLACK, linewidth=0.6)
                panel.set_xticks(range(len(groups)), [str(g) for g in groups])
                panel.tick_params(axis="x", length=0, labelbottom=True)
                of = "graft" if intervention == "graft" else f"{method} ablation"
                panel.set_title(f"{of}, {_ROWS[match]}")
            across[0].set_ylabel(label)
        if by == "count":
            below = {"parameters": "as many parameters as this many MLPs", "modules": "modules in each set"}
        else:
            here = f"{size} MLP" + "s" * (size != 1)
            below = {"parameters": f"third (parameters of {here})"}
            below["modules"] = f"third ({size} module{'s' * (size != 1)} in each set)"
        for across, match in zip(panels, matches, strict=True):
            for panel in across:
                panel.set_xlabel(below[match])
        figure.legend(handles=_legend(), loc="outside lower center", ncols=3)
        n = int(frame.n.iloc[0])
        what = "grafts change the target, ablations the source; above 0 it gained, below it lost"
        said = f"{n} test questions, 95 % paired intervals"
        figure.suptitle(f"{title}: {said}\n{what}" if title else f"{said}\n{what}")
    return figure, panels


def _bars(panel: Any, rows: pd.DataFrame, groups: list[Any], what: str, prefix: str, random: str, scale: float) -> None:
    """One group of bars a value of ``what``; an arm that was left out has a cross on the axis."""
    for at, group in enumerate(groups):
        for place, (arm, (_, colour, hatch)) in enumerate(_ARMS.items()):
            left = at + 0.29 * (place - 1)
            found = rows[(rows[what] == group) & (rows.arm == arm)]
            value, low, high = (
                (np.nan,) * 3
                if found.empty
                else (scale * float(found[f"{prefix}{end}"].iloc[0]) for end in ("change", "low", "high"))
            )
            if np.isnan(value):
                panel.plot(left, 0, marker="x", color=colour, markersize=4, zorder=4)
                continue
            panel.bar(
                left - 0.04,
                value,
                0.16,
                color=colour,
                alpha=0.75,
                hatch=hatch,
                edgecolor=BLACK,
                linewidth=0.4,
                zorder=2,
            )
            panel.errorbar(
                left - 0.04, value, [[max(0, value - low)], [max(0, high - value)]],
                color=BLACK, elinewidth=0.7, capsize=1.5, capthick=0.7, zorder=3,
            )  # fmt: skip
            middle, bottom, top = (scale * float(found[f"{random}{end}"].iloc[0]) for end in ("median", "low", "high"))
            if not np.isnan(middle):
                right = left + 0.085
                panel.fill_between([right - 0.03, right + 0.03], bottom, top, color=PALE, linewidth=0, zorder=2)
                panel.plot(right, middle, marker="_", color=BLACK, markersize=4, markeredgewidth=1, zorder=4)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [
        Patch(facecolor=colour, alpha=0.75, hatch=hatch, edgecolor=BLACK, linewidth=0.4, label=name)
        for name, colour, hatch in _ARMS.values()
    ]
    return [
        *bars,
        Line2D(
            [],
            [],
            color=PALE,
            linewidth=3.5,
            marker="_",
            markeredgecolor=BLACK,
            label="random sets: range, median (if any)",
        ),
        Line2D([], [], color=BLACK, marker="x", markersize=4, linestyle="none", label="no such set"),
    ]
