"""Publication figures, from tidy frames alone: each function returns (figure, axes) and shows nothing.

``grafts`` (what grafts did), ``chance`` (beside random sets), ``sweeps`` (along strength and token budget), ``paper``
(reported rows beside ours), ``runs`` (runs side by side), ``screen`` (recipes on choose), ``shifts`` (what differs,
how surely, how consistently and where), ``effects`` (patches beside grafts), ``heads_mlps`` (heads against MLPs),
``side_effects`` (gain against harm), ``bench`` (planted modules), ``calibration`` (what the tests keep of what they
promise), ``cost`` (seconds and memory by size), ``style``.
"""

from mechtransplant.figures.bench import planted_benchmark
from mechtransplant.figures.calibration import calibration_plot, interval_coverage, power_plot
from mechtransplant.figures.chance import against_chance
from mechtransplant.figures.cost import cost_plot
from mechtransplant.figures.effects import patch_versus_graft_plot
from mechtransplant.figures.grafts import k_curve, rule_curves, score_heatmap
from mechtransplant.figures.heads_mlps import heads_against_mlps_bars
from mechtransplant.figures.paper import reported_rows
from mechtransplant.figures.runs import run_rows
from mechtransplant.figures.screen import recipe_curves
from mechtransplant.figures.shifts import consistency_plot, lorenz, own_against_inherited, shift_heatmap, volcano
from mechtransplant.figures.side_effects import gain_against_harm
from mechtransplant.figures.style import BLUE, COLUMN, GREEN, GREY, ORANGE, PAGE, save_figure, style
from mechtransplant.figures.sweeps import budget_grid, strength_curve

__all__ = [
    "BLUE",
    "COLUMN",
    "GREEN",
    "GREY",
    "ORANGE",
    "PAGE",
    "against_chance",
    "budget_grid",
    "calibration_plot",
    "consistency_plot",
    "cost_plot",
    "gain_against_harm",
    "heads_against_mlps_bars",
    "interval_coverage",
    "k_curve",
    "lorenz",
    "own_against_inherited",
    "patch_versus_graft_plot",
    "planted_benchmark",
    "power_plot",
    "recipe_curves",
    "reported_rows",
    "rule_curves",
    "run_rows",
    "save_figure",
    "score_heatmap",
    "shift_heatmap",
    "strength_curve",
    "style",
    "volcano",
]
