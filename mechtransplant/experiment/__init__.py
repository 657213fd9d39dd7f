"""A config becomes a run: ``config``, ``cells`` (what is finished), ``run`` (the flow), ``summary`` (the page)."""

from mechtransplant.experiment.config import RunConfig, parse_config, read_config
from mechtransplant.experiment.run import Run, run_experiment
from mechtransplant.experiment.shift_report import ShiftConfig, report_shifts
from mechtransplant.experiment.summary import RunResult

__all__ = [
    "Run",
    "RunConfig",
    "RunResult",
    "ShiftConfig",
    "parse_config",
    "read_config",
    "report_shifts",
    "run_experiment",
]
