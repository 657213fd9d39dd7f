"""A config becomes a run: baselines, rankings, a sweep on ``choose``, curves, controls and a report on ``test``.

A run is a folder: ``config.yaml``, ``environment.json``, ``compatibility.csv`` (what matches in the two models),
``cells.jsonl`` (finished cells), ``ranking.csv`` and ``rankings/``, ``results.parquet`` (one row a cell and token
budget), ``rules.csv``, ``plane.csv`` (side effects, one row a graft), ``outcome.json``, ``summary.md`` and
``figures/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechtransplant.controls import RandomOrders, RandomSets, deal, random_matched, random_orders
from mechtransplant.errors import FolderError, UsageError
from mechtransplant.evaluation import Evaluation
from mechtransplant.experiment.cells import CellStore, cell_key, write_atomically
from mechtransplant.experiment.config import RunConfig, on_device, read_config
from mechtransplant.experiment.elsewhere import Elsewhere, labelled
from mechtransplant.experiment.estimate import Estimate, estimate
from mechtransplant.experiment.evaluator import Body, Cell, Evaluator
from mechtransplant.experiment.findings import find
from mechtransplant.experiment.folder import locked, write_compatibility, write_starts
from mechtransplant.experiment.rankings import STEPS, Rankings, strengths_in
from mechtransplant.experiment.result import RunResult, write_report
from mechtransplant.experiment.reused import Reused
from mechtransplant.experiment.rows import Rows
from mechtransplant.experiment.setup import Setup
from mechtransplant.experiment.worker import EngineChoice, EngineName
from mechtransplant.progress import announce, bar
from mechtransplant.ranking import get_rule
from mechtransplant.tasks import Task

Job = tuple[str, str, tuple[str, ...], float, dict[str, Any]]


class Run(Setup):
    """One configured run in one folder; ``execute`` does the work, skipping what the folder already holds.

    ``engine``: where its cells are computed. ``reuse``: the folder of another run; cells that this one shares with it
    (the same graft of the same weights, asked the same questions in the same way) are taken from there, and rankings
    of the same weights by the same rules on the same questions.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        progress: bool = True,
        engine: EngineChoice | None = None,
        reuse: Path | None = None,
    ) -> None:
        # of the process that ranks alone: a worker may not know a user's own rule
        for rule in config.rules:
            get_rule(rule).check(config.kinds, config.options_of(rule))
        # before any weights are loaded
        check_folder(config, folder)
        self.reused = Reused.of(reuse, config)
        super().__init__(config)
        self.folder, self.progress, self.where = folder, progress, engine or EngineChoice()
        self.elsewhere = Elsewhere(self)

    @property
    def _config_text(self) -> str:
        import yaml

        return str(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))

    # --- the flow ------------------------------------------------------------------------------------------------

    def execute(self) -> RunResult:
        """Do what is left to do, and write every table and figure."""
        with locked(self.folder):
            # again under the lock: another start may have come first
            check_folder(self.config, self.folder)
            write_atomically(self.folder / "config.yaml", self._config_text)
            self.store = CellStore(self.folder / "cells.jsonl", self.reused.cells)
            return self._execute()

    def _execute(self) -> RunResult:
        self.cells = Evaluator(self, self.store)
        if self.config.direction == "better":
            self._turn_to_better()
        start = self.where.start | ({} if self.config.device == "cpu" else {"device": self.config.device})
        added = ("elsewhere", "pair")
        write_starts(
            self.folder, depends_on(self), ("weights", "splits"), added, start=start, others=self.reused.starts
        )
        write_compatibility(self.folder, self.pair)
        self.engine = self.where.make(self, self.elsewhere)
        try:
            result = self._steps()
        finally:
            self.engine.close()
        # all rankings are there: of a start that was killed between a ranking and this some may be left
        (self.folder / STEPS).unlink(missing_ok=True)
        return result

    def estimate(self) -> Estimate:
        """What is left to be computed, and how long it takes here; writes nothing."""
        path = self.folder / "cells.jsonl"
        return estimate(self, path.read_bytes().count(b"\n") if path.exists() else 0)

    def _steps(self) -> RunResult:
        if self.progress:
            announce(lambda: str(self.estimate()))
        self.rankings = Rankings(
            self.config, self.pair, self.splits, self.budget, self.folder, self.progress, self.fingerprints, self.reused
        )
        self.rows = Rows()
        choose, test = self.splits.choose, self.splits.test
        self._baselines(choose)
        sweep: list[Job] = [
            ("graft", rule, self.rankings.top(rule, k), strength, {"strengths": self.rankings.strengths(rule, k)})
            for rule in self.config.rules
            for k in self.counts
            for strength in self.config.strengths
        ]
        self._do(choose, sweep, "sweep on choose")
        # as in the paper, every token budget has its own best K
        self.chosen = {rule: {b: self._choose(rule, b) for b in self.budgets} for rule in self.config.rules}
        self.baselines = self._baselines(test)
        self._do(test, self._curves(), "K-curves on test")
        for rule in self.config.with_controls:
            self._do(test, self._random(rule), f"random sets of {rule}")
        self._do(test, self._other_controls(), "other controls")
        self.side_effects = self._side_effects()
        return write_report(self, find(self))

    def _curves(self) -> list[Job]:
        """Every rule at every K, at the strength that it chose, and everything grafted at those strengths."""
        jobs: list[Job] = []
        for rule in self.config.rules:
            strength = self.chosen[rule][self.budget][1]
            points = [(k, strength) for k in self.counts if k < len(self.candidates)]
            for k, s in dict.fromkeys([*points, *self.chosen[rule].values()]):
                jobs.append(
                    ("graft", rule, self.rankings.top(rule, k), s, {"strengths": self.rankings.strengths(rule, k)})
                )
        for strength in dict.fromkeys(self.chosen[rule][self.budget][1] for rule in self.config.rules):
            jobs.append(("all", "", tuple(self.candidates), strength, {}))
        return jobs

    def random_curves(self, rule: str) -> tuple[list[dict[int, tuple[str, ...]]], str]:
        """(random curves, each K → a set matched to the rule's own; how depth was matched).

        They are the beginnings of random orders; a rule that is learned for one K has orders of its own at each.
        """
        config, chosen = self.config, self.chosen[rule][self.budget][0]
        sizes = [k for k in self.counts if k < len(self.candidates)]
        orders: dict[int, RandomOrders] = {}
        for k in sizes:
            order = list(map(str, self.rankings.frame(rule, k).module))
            strictest = k if self.rankings.by_k(rule) else chosen
            known = next((o for size, o in orders.items() if not self.rankings.by_k(rule)), None)
            orders[k] = known or random_orders(self.pair, order, config.curve_sets, strictest, config.seed)
        curves = [{k: orders[k].orders[i][:k] for k in sizes} for i in range(config.curve_sets)]
        return curves, ", ".join(dict.fromkeys(o.depth for o in orders.values()))

    def random_sets(self, rule: str, k: int) -> RandomSets:
        """Random sets matched to a rule's K modules."""
        return random_matched(self.pair, self.rankings.top(rule, k), self.config.random_sets, self.config.seed + k)

    def dealt(self, rule: str, drawn: tuple[str, ...]) -> tuple[float, ...]:
        """Strengths of a random set that is matched to a rule's modules: theirs, in other hands of the same class."""
        k = len(drawn)
        strengths = self.rankings.strengths(rule, k)
        return deal(self.pair, self.rankings.top(rule, k), strengths, drawn) if strengths else ()

    def refitted(self, rule: str, k: int) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
        """The first random sets, each with strengths that are fitted to it; [] of a rule that fits none."""
        if not self.rankings.strengths(rule, k):
            return []
        drawn = self.random_sets(rule, k).sets[: self.config.refitted_sets]
        return [(modules, self.rankings.refitted(rule, k, number, modules)) for number, modules in enumerate(drawn)]

    def _random(self, rule: str) -> list[Job]:
        """Random orders for the whole curve, and random sets at the K that is reported."""
        jobs: list[Job] = []
        strength, (curves, depth) = self.chosen[rule][self.budget][1], self.random_curves(rule)
        for number, curve in enumerate(curves):
            more: dict[str, Any] = {"set": f"order-{number}", "depth_matched": depth}
            jobs += [
                ("random", rule, modules, strength, {**more, "strengths": self.dealt(rule, modules)})
                for modules in curve.values()
            ]
        for k, s in dict.fromkeys(self.chosen[rule].values()):
            controls = self.random_sets(rule, k)
            for number, drawn in enumerate(controls.sets):
                more = {"set": f"set-{number}", "depth_matched": controls.depth, "strengths": self.dealt(rule, drawn)}
                jobs.append(("random", rule, drawn, s, more))
        k, s = self.chosen[rule][self.budget]
        for number, (drawn, strengths) in enumerate(self.refitted(rule, k)):
            jobs.append(("random", rule, drawn, s, {"set": f"refitted-{number}", "strengths": strengths}))
        return jobs

    def _other_controls(self) -> list[Job]:
        """Bottom, unrelated, reverse and self, at the K and strength that each rule chose."""
        config = self.config
        jobs: list[Job] = []
        for rule in config.with_controls:
            k, strength = self.chosen[rule][self.budget]
            top, order = self.rankings.top(rule, k), self.rankings.frame(rule, k)
            own = {"strengths": self.rankings.strengths(rule, k)}
            if "bottom" in config.controls:
                jobs.append(("bottom", rule, tuple(order.module[::-1][:k]), strength, own))
            if self.unrelated_rules(rule) and self.other is not None:
                names = self.rankings.unrelated(rule, self.other.split(**self._other_sizes(self.other)), k)
                more = {"strengths": strengths_in(names, k)}
                jobs.append(("unrelated", rule, tuple(names.module[:k]), strength, more))
            if "reverse" in config.controls:
                jobs.append(("reverse", rule, top, strength, {"body": "reverse", **own}))
            if "self" in config.controls and rule == config.rules[0]:
                jobs.append(("self", rule, top, strength, {"body": "self", **own}))
        return jobs

    def _side_effects(self) -> list[dict[str, Any]]:
        """Of every rule's graft, of everything grafted, of the headline's whole curve, and of some random sets."""
        elsewhere = self.elsewhere
        if not elsewhere.wanted:
            return []
        jobs: list[Job] = []

        def ranked(rule: str, size: int, strength: float) -> Job:
            more = {"strengths": self.rankings.strengths(rule, size)}
            return "graft", rule, self.rankings.top(rule, size), strength, more

        for rule in self.config.rules:
            jobs.append(ranked(rule, *self.chosen[rule][self.budget]))
        headline = self.config.rules[0]
        k, strength = self.chosen[headline][self.budget]
        jobs.append(("all", "", tuple(self.candidates), strength, {}))
        others = [size for size in self.counts if size not in (k, len(self.candidates))]
        jobs += [ranked(headline, size, strength) for size in others]
        spec = self.config.side_effects
        if headline in self.config.with_controls and spec is not None:
            drawn = self.random_sets(headline, k).sets[: spec.random]
            jobs += [("random", headline, m, strength, {"strengths": self.dealt(headline, m)}) for m in drawn]
        cells = self._cells(self.splits.test, jobs)
        keys = [cell_key(elsewhere.content(cell)) for cell in cells]
        self._compute(cells, "side effects")
        wanted: dict[str, dict[str, Any]] = {}
        for key, cell in zip(keys, cells, strict=True):
            evaluations = {
                "target": self._stored("target"),
                "source": self._stored("source"),
                "after": self._held(cell),
            }
            wanted[key] = elsewhere.job(cell, evaluations)
        self._run_jobs(wanted, "side effects")
        return [
            labelled(self.store.cells[key], role, rule, len(modules), strength)
            for key, (role, rule, modules, strength, _) in zip(keys, jobs, strict=True)
        ]

    # --- cells ---------------------------------------------------------------------------------------------------

    def _held(self, cell: Cell) -> dict[str, Any]:
        return self.store.cells[cell_key(self.cells.content(cell))]

    def _stored(self, role: str) -> dict[str, Any]:
        """The finished cell of a model without any graft, on ``test``."""
        return self._held(Cell(self.splits.test.role, role, body="source" if role == "source" else "graft"))

    def _compute(self, cells: Sequence[Cell], what: str) -> None:
        """Evaluations that are missing, by the engine."""
        self._run_jobs({cell_key(self.cells.content(cell)): cell.job() for cell in cells}, what)

    def _run_jobs(self, wanted: dict[str, dict[str, Any]], what: str) -> None:
        """Jobs by the key of the cell that each makes; cells that are there are not computed again."""
        missing = [key for key in wanted if not self.store.has(key)]
        if not missing:
            return
        with bar(len(missing), what, self.progress) as advance:

            def done(number: int, values: dict[str, Any]) -> None:
                self.store.put(missing[number], values)
                advance()

            self.engine.run([wanted[key] for key in missing], done)

    def unrelated_rules(self, rule: str) -> bool:
        """Whether a ranking on another task would be another one."""
        needs = get_rule(rule).needed(self.config.options_of(rule))
        return "unrelated" in self.config.controls and needs != "nothing"

    def _other_sizes(self, other: Task) -> dict[str, Any]:
        """As many questions of the unrelated task as of the run's own, or what it has."""
        sizes = {key: getattr(self.config.split, key) for key in ("discover", "choose")}
        distinct = len(set(other.keys))
        scale = min(1.0, (distinct - 1) / sum(sizes.values()))
        return {key: max(1, int(n * scale)) for key, n in sizes.items()} | {"test": 1, "seed": self.config.split.seed}

    def _baselines(self, split: Task) -> dict[str, dict[int, Evaluation]]:
        found = {
            role: self.cells.cell(split, role, body="source" if role == "source" else "graft")
            for role in ("target", "source")
        }
        for role, evaluations in found.items():
            self.rows.note(split, role, evaluations, digest=self.cells.digests[role,])
        return found

    def _cells(self, split: Task, jobs: Sequence[Job]) -> list[Cell]:
        """What jobs ask for."""
        return [
            Cell(
                split.role,
                role,
                modules,
                strength,
                more.get("body", "graft"),
                role != "random",
                more.get("strengths", ()),
            )
            for role, _, modules, strength, more in jobs
        ]

    def _do(self, split: Task, jobs: list[Job], what: str) -> None:
        cells = self._cells(split, jobs)
        self._compute(cells, what)
        for cell, (role, rule, modules, strength, more) in zip(cells, jobs, strict=True):
            found = self.cells.cell(
                split, role, modules, strength, body=cell.body, whole=cell.whole, strengths=cell.strengths
            )
            labels = {key: value for key, value in more.items() if key not in ("body", "strengths")}
            labels["digest"] = self.cells.digests[(role, *modules)]
            labels["beside"] = self.cells.beside[(role, *modules)]
            self.rows.note(split, role, found, len(modules), strength, rule=rule, **labels)

    def _turn_to_better(self) -> None:
        """Exchange the two where the named target is better on ``choose``: the better model is the source."""
        bodies: dict[str, Body] = {"target": "graft", "source": "source"}
        accuracy = {r: self.cells.cell(self.splits.choose, r, body=b)[self.budget].accuracy for r, b in bodies.items()}
        if accuracy["target"] > accuracy["source"]:
            self.turn()
            self.cells = Evaluator(self, self.store)

    def _choose(self, rule: str, budget: int) -> tuple[int, float]:
        """K and strength that are best on ``choose`` at a token budget; the smallest among equals.

        A graft of every candidate selects nothing and has no random control: it is always reported as ``all``, and
        chosen only where the config names no smaller K.
        """
        by = self.config.choose_by
        options = self.rows.where(role="graft", split="choose", budget=budget, rule=rule)
        options = [r for r in options if self._small_enough(rule, r["k"])]
        if not options:
            raise UsageError(
                f"parameters: every graft of {rule} has more than {self.config.parameters:.1%} of the parameters: give "
                "smaller k, or a larger share"
            )
        if any(r[by] is None for r in options):
            raise UsageError(f"choose_by: {by} is not known of this task's answers: choose by accuracy")
        selective = [r for r in options if r["k"] < len(self.candidates)]
        best = min(selective or options, key=lambda r: (-r[by], r["k"], abs(r["strength"] - 1)))
        return best["k"], best["strength"]

    def _small_enough(self, rule: str, k: int) -> bool:
        """Whether a rule's K modules are within the config's share of the parameters."""
        limit = self.config.parameters
        if limit is None:
            return True
        whole, graft = (self.cells.graft(m, 1.0) for m in (self.pair.modules("linear"), self.rankings.top(rule, k)))
        return graft.parameter_count(self.pair) <= limit * whole.parameter_count(self.pair)


def depends_on(run: Run) -> dict[str, Any]:
    """What the run's numbers depend on besides the config and the versions: weights, task."""
    return {
        "pair": run.pair.name,
        "weights": run.fingerprints | ({} if run.pair.base is None else {"base": run.pair.base.fingerprint}),
        "task": {"name": run.task.name, "fingerprint": run.task.fingerprint},
        **(
            {}
            if run.explore is None
            else {"explore": {"name": run.explore.name, "fingerprint": run.explore.fingerprint}}
        ),
        "splits": {s.role: {"n": len(s), "fingerprint": s.fingerprint} for s in run.splits},
        "elsewhere": {
            "unrelated": None if run.other is None else {"name": run.other.name, "fingerprint": run.other.fingerprint},
            **run.elsewhere.fingerprints,
        },
    }


def check_folder(config: RunConfig, folder: Path) -> None:
    """Refuse a folder that holds another run, or anything else; writes nothing."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file: choose another --out folder")
    path = folder / "config.yaml"
    if path.exists():
        # parsed, so that a run from before a key existed has that key's default; another device rounds otherwise,
        # as another processor does, and may go on
        if on_device(read_config(path), config.device) != config:
            raise FolderError(
                f"{folder} holds another run (its config.yaml differs): choose another --out folder, or remove it"
            )
        return
    if folder.exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise FolderError(f"{folder} is not empty and holds no run: choose another --out folder")


def run_experiment(
    config: RunConfig,
    folder: str | Path,
    progress: bool = True,
    *,
    engine: EngineName = "serial",
    workers: int | None = None,
    address: str | None = None,
    reuse: str | Path | None = None,
) -> RunResult:
    """Run a config in a folder; started again, it continues where it was.

    Args:
        reuse: the folder of another run; cells and rankings that are the same there are taken, not computed again.
        engine: "serial", or "processes" or "ray": cells are computed by so many ``workers`` (2), processes of their
            own on this machine, or on the nodes of the Ray cluster at ``address``.
    """
    choice = EngineChoice(engine, workers, address)
    return Run(config, Path(folder), progress, choice, None if reuse is None else Path(reuse)).execute()
