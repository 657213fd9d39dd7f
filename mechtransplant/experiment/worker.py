"""A run's cells in whatever process: what the engines call, and which engine a run has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mechtransplant.engine import Engine, Processes, Ray, Recipe, Serial
from mechtransplant.errors import UnknownNameError, UsageError, check_count
from mechtransplant.experiment.config import parse_config
from mechtransplant.experiment.elsewhere import SIDE_EFFECTS, Elsewhere
from mechtransplant.experiment.evaluator import Cell, Evaluator
from mechtransplant.experiment.setup import Parts, Setup
from mechtransplant.pair import LanguageModel, make_pair
from mechtransplant.pair.shipping import ShippedModel, ship, unship
from mechtransplant.tasks import Task
from mechtransplant.weights import Residence, admit

if TYPE_CHECKING:
    from mechtransplant.side_effects import NeutralText

EngineName = Literal["serial", "processes", "ray"]
ENGINES: tuple[str, ...] = ("serial", "processes", "ray")


@dataclass(frozen=True)
class EngineChoice:
    """Where cells are computed; ``workers`` are processes (2 without a number), ``address`` is a Ray cluster's.

    Raises UsageError for an unknown engine, and for what an engine does not have.
    """

    name: EngineName = "serial"
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise UnknownNameError("engine", self.name, ENGINES)
        if self.workers is not None:
            check_count("workers", self.workers)
            if self.name == "serial":
                raise UsageError(
                    "the serial engine has no workers: choose the engine processes or ray, or leave workers out"
                )
        if self.address is not None and self.name != "ray":
            raise UsageError(f"an address is a Ray cluster's, and the engine is {self.name}: choose the engine ray")

    @property
    def count(self) -> int:
        """How many processes."""
        return self.workers or 2

    @property
    def start(self) -> dict[str, Any]:
        """What a run notes about a start, besides versions: nothing of the plain engine."""
        return {} if self.name == "serial" else {"engine": self.name, "workers": self.count}

    def make(self, setup: Setup, elsewhere: Elsewhere) -> Engine:
        """The engine of a run."""
        if self.name == "serial":
            return Serial(CellWorker(setup, elsewhere))
        config = setup.config
        if config.device_map is not None:
            raise UsageError(
                f"the engine {self.name} gives every worker models of its own, on one device: leave device_map out, or "
                "choose the engine serial"
            )
        arguments = {
            "config": config.model_dump(mode="json"),
            "turned": setup.turned,
            "fingerprints": _work_of(setup),
            "gate": None if setup.gating is None else setup.gating.saved(),
        }
        if self.name == "processes":
            return Processes(Recipe(f"{__name__}:{cell_worker.__name__}", arguments), self.count, config.threads)
        recipe = Recipe(f"{__name__}:{shipped_worker.__name__}", arguments, Shipped.of(setup, elsewhere))
        # a GPU of its own for each process, whose models fill it
        gpus = 0 if config.device in ("cpu", "mps") else 1
        return Ray(recipe, self.count, config.threads, self.address, gpus)


class CellWorker:
    """Computes cells of one setup."""

    def __init__(self, setup: Setup, elsewhere: Elsewhere | None = None) -> None:
        self.evaluator = Evaluator(setup)
        self.elsewhere = Elsewhere(setup) if elsewhere is None else elsewhere

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """A cell's values."""
        if job["what"] == SIDE_EFFECTS:
            self.evaluator.lower.forget()
            return self.elsewhere.compute(job)
        return self.evaluator.compute(Cell.of(job))


def cell_worker(
    config: dict[str, Any], turned: bool, fingerprints: dict[str, str], gate: dict[str, Any] | None = None
) -> CellWorker:
    """The worker of a run in a process of its own; raises UsageError where it finds other weights than the run has."""
    setup = Setup(parse_config(config))
    if turned:
        setup.turn()
    return _worker(setup, fingerprints, gate)


@dataclass(frozen=True)
class Shipped:
    """All that a worker is made of, for a process that may have no files: models as arrays, questions, texts."""

    source: ShippedModel
    target: ShippedModel
    base: ShippedModel | None
    pair: dict[str, Any]
    task: Task
    other: Task | None
    explore: Task | None
    elsewhere: tuple[tuple[Task, ...], NeutralText | None]
    shut: tuple[Task, ...] = ()

    @classmethod
    def of(cls, setup: Setup, elsewhere: Elsewhere) -> Shipped:
        """What a run's workers are made of."""
        pair = setup.pair
        named = {name: getattr(pair, name) for name in ("name", "default_task", "planted", "tasks")}
        base = None if pair.base is None else ship(pair.base)
        found = elsewhere.tasks, elsewhere.file
        asked = setup.task, setup.other, setup.explore
        return cls(ship(pair.source), ship(pair.target), base, named, *asked, found, setup.shut)

    def parts(self, turned: bool, device: str, one_at_a_time: bool) -> Parts:
        """Models and questions again."""
        residence = Residence() if one_at_a_time else None

        def unpacked(shipped: ShippedModel) -> LanguageModel:
            model = unship(shipped, device)
            if residence is not None:
                admit(model.hf, residence)
            return model

        pair = make_pair(unpacked(self.source), unpacked(self.target))
        for name, value in self.pair.items():
            setattr(pair, name, value)
        pair.base = None if self.base is None else unpacked(self.base)
        return Parts(pair, turned, self.task, self.other, self.explore, self.shut)


def shipped_worker(
    config: dict[str, Any],
    turned: bool,
    fingerprints: dict[str, str],
    gate: dict[str, Any] | None,
    shipped: Shipped,
) -> CellWorker:
    """The worker of a run on another machine; raises UsageError where other weights arrive than were sent."""
    parsed = parse_config(config)
    setup = Setup(parsed, shipped.parts(turned, parsed.device, parsed.one_at_a_time))
    return _worker(setup, fingerprints, gate, Elsewhere(setup, shipped.elsewhere))


def _work_of(setup: Setup) -> dict[str, str]:
    """Fingerprints of the weights and questions of a setup."""
    return setup.fingerprints | {str(split.role): split.fingerprint for split in setup.splits}


def _worker(
    setup: Setup,
    fingerprints: dict[str, str],
    gate: dict[str, Any] | None,
    elsewhere: Elsewhere | None = None,
) -> CellWorker:
    if _work_of(setup) != fingerprints:
        raise UsageError(
            "a worker found other weights or questions than the run began with: leave the files as they are meanwhile"
        )
    if setup.gating is not None and gate is not None:
        setup.gating.use(gate)
    return CellWorker(setup, elsewhere)
