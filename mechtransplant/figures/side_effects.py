"""What grafts gain on their task against what they cost elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.labels import name_points
from mechtransplant.figures.style import BLUE, COLUMN, GREY, ORANGE, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: column of the harm → (axis, factor)
_HARMS = {
    "harm": ("harm: mean accuracy lost on other tasks (points)", 100),
    "perplexity_change": ("harm: perplexity rise on neutral text (%)", 100),
    "kl": ("harm: KL on neutral text (nats a token)", 1),
}


def gain_against_harm(
    frame: pd.DataFrame, harm: str = "harm", names: int = 6, harm_label: str = "", title: str = ""
) -> tuple[Figure, Any]:
    """Gain on the task (y, points) against harm elsewhere (x), one point a graft; the Pareto front joined and named.

    Up and left is better. Controls (rows whose ``role`` is "random") are grey points without intervals.

    Args:
        frame: columns gain (a share) and ``harm``, one row a graft, as ``SideEffects.against`` makes them. Used where
            they are there: ``gain_low``, ``gain_high``, ``harm_low``, ``harm_high`` (95 % intervals; of another harm,
            its name with the same ends), ``role``, ``front`` (from :func:`pareto_front`), ``label``.
        harm: the column: "harm" (accuracy lost, a share), "perplexity_change", "kl", or another, drawn as it is.
        names: how many points of the front are named, those with the largest gain first.
        harm_label: the axis of another harm.

    Raises:
        UsageError: missing columns, no rows, or a value that is not finite.
    """
    lacking = [c for c in ("gain", harm) if c not in getattr(frame, "columns", [])]
    if lacking:
        raise UsageError(f"the frame lacks the column {lacking[0]!r}: make its rows with SideEffects.against(outcome)")
    if not len(frame):
        raise UsageError("the frame has no rows: there is nothing to draw")
    rows = frame.reset_index(drop=True)
    axis, factor = _HARMS.get(harm, (harm, 1))
    x = factor * rows[harm].to_numpy(dtype=float)
    y = 100 * rows.gain.to_numpy(dtype=float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UsageError(f"gain or {harm} is not finite in some row: drop what was not measured")
    control = (rows.role == "random").to_numpy() if "role" in rows else np.zeros(len(rows), dtype=bool)
    front = rows.front.to_numpy(dtype=bool) if "front" in rows else np.zeros(len(rows), dtype=bool)
    with style():
        figure, axes = new_figure(COLUMN, 2.9)
        for line in (axes.axhline, axes.axvline):
            line(0, color=GREY, linewidth=0.5)
        if control.any():
            axes.plot(
                x[control],
                y[control],
                "o",
                color=GREY,
                alpha=0.5,
                markersize=2.5,
                markeredgewidth=0,
                label=f"{int(control.sum())} random sets",
            )
        for chosen, colour, marker, label in (
            (~control & ~front, BLUE, "o", "graft"),
            (~control & front, ORANGE, "D", "Pareto front"),
        ):
            if chosen.any():
                bars = {
                    "xerr": _bars(rows, harm, x, factor, chosen),
                    "yerr": _bars(rows, "gain", y, 100, chosen),
                }
                axes.errorbar(
                    x[chosen], y[chosen], **bars, fmt=marker, color=colour, markersize=3.5, elinewidth=0.5, label=label
                )
        if front.any():
            # in the order of harm, where gain rises too; controls may be on it
            order = np.lexsort((y, x))
            joined = order[front[order]]
            axes.plot(x[joined], y[joined], color=ORANGE, linewidth=0.8, zorder=1)
        axes.set_xlabel(harm_label or axis)
        axes.set_ylabel("gain: accuracy on the task (points)")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=3)
        if "label" in rows:
            named = [int(i) for i in np.argsort(-y, kind="stable") if front[i] and not control[i]][:names]
            name_points(axes, rows.assign(module=rows.label.astype(str)), x, y, named)
    return figure, axes


def _bars(rows: pd.DataFrame, name: str, values: Any, factor: float, chosen: Any) -> Any:
    """Lengths of the interval's two arms, shape (2, rows); None where the frame has no interval."""
    ends = [f"{name}_low", f"{name}_high"]
    if not set(ends) <= set(rows.columns):
        return None
    # an interval by resampling may miss its own estimate by a rounding
    low, high = (factor * rows[end].to_numpy(dtype=float)[chosen] for end in ends)
    return np.maximum([values[chosen] - low, high - values[chosen]], 0)
