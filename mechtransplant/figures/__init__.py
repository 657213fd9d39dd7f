"""Publication figures, from tidy frames alone: each function returns (figure, axes) and shows nothing.

``grafts`` (what grafts did), ``shifts`` (what differs, how surely, how consistently and where), ``style``.
"""

from mechtransplant.figures.grafts import k_curve, score_heatmap
from mechtransplant.figures.shifts import consistency_plot, lorenz, own_against_inherited, shift_heatmap, volcano
from mechtransplant.figures.style import BLUE, COLUMN, GREEN, GREY, ORANGE, PAGE, save_figure, style

__all__ = [
    "BLUE",
    "COLUMN",
    "GREEN",
    "GREY",
    "ORANGE",
    "PAGE",
    "consistency_plot",
    "k_curve",
    "lorenz",
    "own_against_inherited",
    "save_figure",
    "score_heatmap",
    "shift_heatmap",
    "style",
    "volcano",
]
