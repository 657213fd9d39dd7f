"""A config becomes a run.

``config``, ``cells`` (what is finished), ``run`` (the flow), ``result`` (its files), ``summary`` (the page).
"""

from mechtransplant.experiment.config import RunConfig, parse_config, read_config
from mechtransplant.experiment.effects_report import EffectsConfig, report_effects
from mechtransplant.experiment.heads_mlps import HeadsMlpsConfig, report_heads_and_mlps
from mechtransplant.experiment.planted import bench_planted, planted_pairs
from mechtransplant.experiment.planted_report import PlantedConfig, report_planted
from mechtransplant.experiment.recheck import recheck
from mechtransplant.experiment.reported import beside_reported, reported_power, reported_results
from mechtransplant.experiment.result import RunResult
from mechtransplant.experiment.run import Run, run_experiment
from mechtransplant.experiment.screen import report_screen
from mechtransplant.experiment.screen_config import ScreenConfig, read_screen
from mechtransplant.experiment.setup import Setup
from mechtransplant.experiment.shift_report import ShiftConfig, report_shifts
from mechtransplant.experiment.side_by_side import runs_table

__all__ = [
    "EffectsConfig",
    "HeadsMlpsConfig",
    "PlantedConfig",
    "Run",
    "RunConfig",
    "RunResult",
    "ScreenConfig",
    "Setup",
    "ShiftConfig",
    "bench_planted",
    "beside_reported",
    "parse_config",
    "planted_pairs",
    "read_config",
    "read_screen",
    "recheck",
    "report_effects",
    "report_heads_and_mlps",
    "report_planted",
    "report_screen",
    "report_shifts",
    "reported_power",
    "reported_results",
    "run_experiment",
    "runs_table",
]
