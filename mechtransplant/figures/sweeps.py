"""What strength and token budget change: accuracy along the strengths, and over token budget × K."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.style import BLACK, BLUE, COLUMN, GREEN, GREY, ORANGE, PURPLE, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_NEEDED = ("split", "role", "rule", "k", "strength", "budget", "accuracy")


def _grafts(results: pd.DataFrame, split: str, rule: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of one rule's grafts on a split, rows of source and target there)."""
    lacking = [c for c in _NEEDED if c not in getattr(results, "columns", [])]
    if lacking:
        raise UsageError(f"the frame lacks the columns {', '.join(lacking)}: pass a run's results.parquet")
    rows = results[results.split == split]
    grafts = rows[rows.role == "graft"]
    known = list(dict.fromkeys(grafts.rule))
    if rule is not None and rule not in known:
        raise UsageError(f"there are no grafts by {rule!r} on {split}: choose from {', '.join(known) or 'no rule'}")
    return grafts[grafts.rule == (rule or (known or [""])[0])], rows[rows.role.isin(["source", "target"])]


def _title(title: str, rule: str, asked: str) -> str:
    """Two lines that fit a column: whose grafts, and what they were asked."""
    return f"{', '.join(filter(None, [title, rule]))}\n{asked}"


def strength_curve(
    results: pd.DataFrame,
    rule: str | None = None,
    counts: list[int] | None = None,
    split: str = "choose",
    budget: int | None = None,
    title: str = "",
    operator: str = "replace",
) -> tuple[Figure, Any]:
    """Accuracy against the strength of a graft, a line a K; of the operator replace, 1 is the source's weights.

    Args:
        results: columns split, role (target, source, graft), rule, k, strength, budget, accuracy, low, high, n.
        rule: whose grafts; the first by default.
        counts: which K; by default up to five, spread over those that have several strengths.

    Raises:
        UsageError: no K with several strengths.
    """
    grafts, ends = _grafts(results, split, rule)
    wanted = int(budget or grafts.budget.max()) if len(grafts) else 0
    grafts, ends = grafts[grafts.budget == wanted], ends[ends.budget == wanted]
    several = [k for k in sorted(map(int, grafts.k.unique())) if grafts[grafts.k == k].strength.nunique() > 1]
    if counts is None:
        counts = [
            several[i] for i in np.unique(np.linspace(0, len(several) - 1, min(5, len(several))).round().astype(int))
        ]
    lacking = [k for k in counts if k not in several]
    if not counts or lacking:
        raise UsageError(
            f"no several strengths {f'at K = {lacking[0]} ' if lacking else ''}on {split}: name them in the run's "
            "config (strengths: [0.5, 1.0, 1.5])"
        )
    with style():
        figure, axes = new_figure(COLUMN, 2.6)
        for role, colour, dashes in (("source", GREEN, "--"), ("target", GREY, ":")):
            value = 100 * float(ends[ends.role == role].accuracy.iloc[0])
            axes.axhline(value, color=colour, linestyle=dashes, label=f"{role}, {value:.1f} %")
        strengths = sorted(grafts.strength.unique())
        step = min(np.diff(strengths))
        for index, k in enumerate(counts):
            line = grafts[grafts.k == k].sort_values("strength")
            errors = 100 * np.array([line.accuracy - line.low, line.high - line.accuracy])
            # intervals beside each other, not on top of each other
            x = line.strength + 0.06 * step * (index - (len(counts) - 1) / 2)
            axes.errorbar(
                x,
                100 * line.accuracy,
                np.clip(errors, 0, None),
                color=(BLUE, ORANGE, GREEN, PURPLE, BLACK)[index % 5],
                marker="os^Dv"[index % 5],
                capsize=1.5,
                elinewidth=0.5,
                linewidth=0.9,
                markersize=3,
                label=f"K = {k}",
            )
        axes.axvline(1, color=GREY, linewidth=0.5)
        axes.set_xticks(strengths, [f"{s:g}" for s in strengths])
        axes.set_xlabel("strength (1: the source's weights)" if operator == "replace" else f"strength of {operator}")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(-3, 103)
        axes.set_title(_title(title, grafts.rule.iloc[0], f"{int(grafts.n.iloc[0])} {split} questions, 95 % intervals"))
        figure.legend(loc="outside lower center", ncols=3)
    return figure, axes


def budget_grid(
    results: pd.DataFrame,
    rule: str | None = None,
    split: str = "test",
    strength: float = 1.0,
    chosen: Mapping[int, int] | None = None,
    title: str = "",
) -> tuple[Figure, Any]:
    """Change of accuracy over token budget (y) × K (x), graft − target in points; the source's as the last column.

    Args:
        results: columns split, role (target, source, graft), rule, k, strength, budget, accuracy, n.
        rule: whose grafts; the first by default.
        chosen: token budget → the K that was chosen for it, on other questions; those cells have a dot.
    """
    grafts, ends = _grafts(results, split, rule)
    grafts = grafts[grafts.strength == strength]
    if not len(grafts):
        raise UsageError(f"there are no grafts at strength {strength:g} on {split}: choose one that the run has")
    best = grafts.groupby(["budget", "k"]).accuracy.first().unstack("k")
    target, source = (ends[ends.role == role].groupby("budget").accuracy.first() for role in ("target", "source"))
    change = best.sub(target.loc[best.index], axis=0)
    gap = source.loc[best.index] - target.loc[best.index]
    bound = 100 * max(float(np.nanmax(np.abs(change.to_numpy()))), float(np.abs(gap).max()), 0.01)
    columns = len(best.columns)
    with style() as matplotlib:
        figure, axes = new_figure(COLUMN, 1.3 + 0.3 * len(best))
        colours, norm = matplotlib.colormaps["RdBu_r"], matplotlib.colors.Normalize(-bound, bound)
        y = np.arange(len(best) + 1)
        axes.pcolormesh(np.arange(columns + 1), y, 100 * change.to_numpy(), cmap=colours, norm=norm)
        # a gap sets the source apart from the grafts
        last = columns + 0.3
        axes.pcolormesh([last, last + 1], y, 100 * gap.to_numpy()[:, None], cmap=colours, norm=norm)
        cells = np.column_stack([change.to_numpy(), gap.to_numpy()])
        for (row, column), value in np.ndenumerate(100 * cells):
            if np.isfinite(value):
                x = column + 0.5 if column < columns else last + 0.5
                ink = "white" if abs(value) > 0.6 * bound else "black"
                axes.text(x, row + 0.5, f"{round(value) + 0:+d}", ha="center", va="center", fontsize=7, color=ink)
        dot: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markeredgewidth": 0.5, "markersize": 2.6}
        counts = [int(k) for k in best.columns]
        for row, at in enumerate(best.index):
            if (chosen or {}).get(int(at)) in counts:
                axes.plot(counts.index((chosen or {})[int(at)]) + 0.86, row + 0.8, "o", **dot)
        axes.set_xticks([*(np.arange(columns) + 0.5), last + 0.5], [*map(str, best.columns), "source"])
        axes.set_yticks(np.arange(len(best)) + 0.5, [str(b) for b in best.index])
        axes.set_xlim(0, last + 1)
        axes.set_xlabel("grafted modules K" + (" (dot: chosen)" if chosen else ""))
        axes.set_ylabel("token budget")
        asked = f"{int(grafts.n.iloc[0])} {split} questions, strength {strength:g}"
        axes.set_title(_title(title, grafts.rule.iloc[0], asked))
        figure.colorbar(
            matplotlib.cm.ScalarMappable(norm, colours), ax=axes, label="Δ accuracy, points\n(graft − target)"
        )
    return figure, axes
