"""The rows that a paper reports beside one's own: target, graft and source, with the intervals that their n allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.style import BLUE, GREEN, GREY, ORANGE, PAGE, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_NEEDED = ("who", "label", "n", "target", "after", "source")


def reported_rows(rows: pd.DataFrame, title: str = "") -> tuple[Figure, Any]:
    """Accuracy of target (hollow), graft (filled, with Wilson's 95 % interval of n) and source (bar), and TIR, by row.

    Args:
        rows: columns who (for example "paper" and "ours"), label, n (questions), target, after, source (shares). Rows
            stand in their order, the first on top; each ``who`` has its colour and its marker.

    The right panel is TIR = after / target with the interval of two independent shares (Katz's logarithmic method),
    since reported tables have no pairs of answers; rows whose target has no right answer have none.
    """
    lacking = [c for c in _NEEDED if c not in getattr(rows, "columns", [])]
    if lacking or not len(rows):
        raise UsageError(f"the frame lacks {', '.join(lacking) or 'rows'}: pass who, label, n, target, after, source")
    from mechtransplant.significance import wilson_interval

    frame = rows.reset_index(drop=True)
    whose = list(dict.fromkeys(frame.who))
    y = np.arange(len(frame))[::-1]
    with style():
        figure, (left, right) = new_figure(PAGE, 1.1 + 0.19 * len(frame), columns=2)
        for index, who in enumerate(whose):
            mine, colour = (frame.who == who).to_numpy(), (ORANGE, BLUE, GREEN)[index % 3]
            at, marker = y[mine], "os^"[index % 3]
            part = frame[mine]
            ends = np.array([wilson_interval(round(a * n), int(n)) for a, n in zip(part.after, part.n, strict=True)])
            after = part.after.to_numpy()
            left.hlines(at, 100 * part.target, 100 * after, color=colour, linewidth=0.6, linestyle=":")
            left.errorbar(
                100 * after,
                at,
                xerr=100 * np.clip([after - ends[:, 0], ends[:, 1] - after], 0, None),
                color=colour,
                marker=marker,
                linestyle="none",
                elinewidth=0.7,
                capsize=1.5,
                label=f"{who}: after the graft",
            )
            left.plot(
                100 * part.target,
                at,
                marker,
                color=colour,
                markerfacecolor="white",
                linestyle="none",
                label=f"{who}: target",
            )
            left.plot(100 * part.source, at, "|", color=GREEN, markersize=8, markeredgewidth=1.4, linestyle="none")
            some = (part.target > 0).to_numpy() & (after > 0)
            ratio = after[some] / part.target.to_numpy()[some]
            n = part.n.to_numpy()[some]
            spread = np.sqrt((1 / after[some] - 1) / n + (1 / part.target.to_numpy()[some] - 1) / n)
            low, high = ratio * np.exp(-1.96 * spread), ratio * np.exp(1.96 * spread)
            right.errorbar(
                ratio,
                at[some],
                xerr=[ratio - low, high - ratio],
                color=colour,
                marker=marker,
                linestyle="none",
                elinewidth=0.7,
                capsize=1.5,
            )
        left.plot([], [], "|", color=GREEN, markersize=8, markeredgewidth=1.4, linestyle="none", label="source")
        right.axvline(1, color=GREY, linewidth=0.6, linestyle=":")
        right.set_xscale("log")
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        right.minorticks_off()
        ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100) if right.get_xlim()[0] <= t <= right.get_xlim()[1]]
        right.set_xticks(ticks)
        left.set_yticks(y, [f"{label}, n = {int(n)}" for label, n in zip(frame.label, frame.n, strict=True)])
        left.set_ylim(-0.7, len(frame) - 0.3)
        left.set_xlim(-2, 102)
        left.set_xlabel("accuracy, %")
        right.set_xlabel("TIR: after / target")
        figure.legend(loc="outside lower center", ncols=min(3, 2 * len(whose) + 1))
        figure.suptitle(f"{title}\n95 % intervals" if title else "95 % intervals")
    return figure, (left, right)
