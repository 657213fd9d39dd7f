"""A config becomes a run: ``config``, ``cells`` (what is finished), ``run`` (the flow), ``summary`` (the page)."""

from mechtransplant.experiment.config import RunConfig, parse_config, read_config
from mechtransplant.experiment.run import Run, run_experiment
from mechtransplant.experiment.summary import RunResult

__all__ = ["Run", "RunConfig", "RunResult", "parse_config", "read_config", "run_experiment"]
