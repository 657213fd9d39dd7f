"""A run's cells in whatever process: what the engines call."""

from __future__ import annotations

from typing import Any, Literal

from mechtransplant.engine import Engine, Processes, Recipe, Serial
from mechtransplant.errors import UnknownNameError, UsageError, check_count
from mechtransplant.experiment.config import parse_config
from mechtransplant.experiment.elsewhere import SIDE_EFFECTS, Elsewhere
from mechtransplant.experiment.evaluator import Cell, Evaluator
from mechtransplant.experiment.setup import Setup

EngineName = Literal["serial", "processes"]
ENGINES: tuple[str, ...] = ("serial", "processes")
#: how many processes, where no number is given
WORKERS = 2


class CellWorker:
    """Computes cells of one setup."""

    def __init__(self, setup: Setup, elsewhere: Elsewhere | None = None) -> None:
        self.evaluator = Evaluator(setup)
        self.elsewhere = Elsewhere(setup) if elsewhere is None else elsewhere

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """A cell's values."""
        if job["what"] == SIDE_EFFECTS:
            return self.elsewhere.compute(job)
        return self.evaluator.compute(Cell.of(job))


def cell_worker(config: dict[str, Any], turned: bool, fingerprints: dict[str, str]) -> CellWorker:
    """The worker of a run in a process of its own; raises UsageError where it finds other weights than the run has."""
    setup = Setup(parse_config(config))
    if turned:
        setup.turn()
    if setup.fingerprints != fingerprints:
        raise UsageError("a worker found other weights than the run began with: leave the files as they are meanwhile")
    return CellWorker(setup)


def check_engine(engine: str, workers: int | None) -> None:
    """Raise UsageError for an unknown engine, or a number of workers that it does not have."""
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    if workers is not None:
        check_count("workers", workers)
        if engine == "serial":
            raise UsageError("the serial engine has no workers: choose the engine processes, or leave workers out")


def make_engine(engine: str, workers: int | None, setup: Setup, elsewhere: Elsewhere) -> Engine:
    """The engine of a run."""
    if engine == "serial":
        return Serial(CellWorker(setup, elsewhere))
    arguments = {
        "config": setup.config.model_dump(mode="json"),
        "turned": setup.turned,
        "fingerprints": setup.fingerprints,
    }
    return Processes(Recipe(f"{__name__}:{cell_worker.__name__}", arguments), workers or WORKERS, setup.config.threads)
