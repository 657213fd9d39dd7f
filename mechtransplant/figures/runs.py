"""Runs side by side: each graft between its target and its source, over the range of its random sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.style import BLUE, GREEN, GREY, ORANGE, PAGE, SKY, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_NEEDED = (
    "run", "rule", "k", "n", "target", "source", "after", "after_low", "after_high", "random_low", "random_median",
    "random_high", "random_n", "random_beaten", "recovery", "recovery_low", "recovery_high",
)  # fmt: skip


#: how far below a row's points its random sets are drawn, and how far apart those of several kinds, in rows
BELOW, APART = 0.36, 0.28


def run_rows(rows: pd.DataFrame, title: str = "") -> tuple[Figure, Any]:
    """Accuracy of target (hollow), graft (filled), source (bar) and matched random sets (grey), and Recovery, by row.

    Args:
        rows: as :func:`~mechtransplant.experiment.runs_table` has them, the first on top; a column ``label`` names the
            rows, which are otherwise called by run, rule and K.

    Bars of the graft are 95 % intervals (Wilson's; the run's own for Recovery). Below them, grey is the whole range of
    the random sets, with their median, light blue that of the same sets at the strength that suits them, if it is not
    the graft's, and orange that of random weights, where a run has some (columns tuned_low, weights_low, …), and at the
    edge how many of them the graft beats. Where Recovery is withheld, the right panel has no point.
    Raises UsageError for lacking columns.
    """
    from matplotlib.colors import to_rgb

    lacking = [c for c in _NEEDED if c not in getattr(rows, "columns", [])]
    if lacking or not len(rows):
        raise UsageError(f"the frame lacks {', '.join(lacking) or 'rows'}: pass what runs_table returns")
    frame = rows.reset_index(drop=True)
    y = np.arange(len(frame))[::-1]
    with style():
        figure, (left, right) = new_figure(PAGE, 1.15 + 0.33 * len(frame), columns=2)
        drawn = "as many changes at random"
        if "operator" in frame and frame.operator.str.startswith("low_rank").any():
            drawn = "as many changes, or directions, at random"
        has = _controls(frame)
        kinds = (("random", "random sets", GREY), ("tuned", "at their own strength", SKY), ("weights", drawn, ORANGE))
        for kind, name, colour in kinds:
            if kind not in has:
                continue
            controlled = has[kind].to_numpy()
            # below the points, which would hide a narrow range; those of several kinds below each other
            order = has.cumsum(axis=1)[kind] - (has.sum(axis=1) + 1) / 2
            heights = y - BELOW - APART * order.to_numpy()
            low, median, high = (100 * frame[f"{kind}_{end}"][controlled] for end in ("low", "median", "high"))
            said = name if has.shape[1] > 2 else f"{name}: range, median"
            at = heights[controlled]
            # light blue is too light for letters
            ink = tuple(0.7 * part for part in to_rgb(colour)) if colour == SKY else colour
            left.hlines(at, low, high, color=colour, alpha=0.45, linewidth=3.5, label=said)
            left.plot(median, at, "|", color=ink, markersize=4, markeredgewidth=1.2)
            # at the edge, where no range is in the way
            for at_row in np.flatnonzero(controlled):
                beaten, n = (frame[f"{kind}_{name}"][at_row] for name in ("beaten", "n"))
                left.text(
                    1.02, heights[at_row], f"beats {beaten:.0f} of {n:.0f}", transform=left.get_yaxis_transform(),
                    va="center", fontsize="x-small", color=ink,
                )  # fmt: skip
        ends = [frame.after - frame.after_low, frame.after_high - frame.after]
        left.errorbar(
            100 * frame.after, y, xerr=100 * np.clip(ends, 0, None), color=BLUE, marker="o", linestyle="none",
            elinewidth=0.7, capsize=1.5, label="target + graft",
        )  # fmt: skip
        left.plot(100 * frame.target, y, "o", color=BLUE, markerfacecolor="white", label="target", linestyle="none")
        left.plot(100 * frame.source, y, "|", color=GREEN, markersize=9, markeredgewidth=1.6, label="source")
        some = frame.recovery.notna().to_numpy()
        part = frame[some]
        reach = [part.recovery - part.recovery_low, part.recovery_high - part.recovery]
        right.errorbar(
            part.recovery, y[some], xerr=np.clip(reach, 0, None), color=BLUE, marker="o", linestyle="none",
            elinewidth=0.7, capsize=1.5,
        )  # fmt: skip
        right.axvline(100, color=GREEN, linewidth=0.8, linestyle=":")
        right.axvline(0, color=GREY, linewidth=0.6, linestyle=":")
        names = frame.label if "label" in frame else frame.run + ", " + frame["rule"] + ", K = " + frame.k.astype(str)
        left.set_yticks(y, list(names))
        left.set_ylim(-0.8, len(frame) - 0.5)
        left.set_xlim(-2, 102)
        left.set_xlabel("accuracy, %")
        right.set_xlabel("Recovery, %")
        figure.legend(loc="outside lower center", ncols=4 if has.shape[1] < 3 else 3)
        figure.suptitle(f"{title}\n95 % intervals" if title else "95 % intervals")
    return figure, (left, right)


def _controls(frame: pd.DataFrame) -> pd.DataFrame:
    """Which rows (of the frame) have which kind of random counterpart (columns), of the kinds that any has."""
    import pandas as pd

    kinds = [kind for kind in ("random", "tuned", "weights") if f"{kind}_n" in frame]
    found = pd.DataFrame({kind: frame[f"{kind}_n"].notna() for kind in kinds}, index=frame.index)
    if "tuned" in found:
        # at the graft's own strength they are its random sets
        found["tuned"] &= frame.tuned_strength != frame.strength
    return found.loc[:, found.any()]
