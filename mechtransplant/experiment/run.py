"""A config becomes a run: baselines, rankings, a sweep on ``choose``, curves, controls and a report on ``test``.

A run is a folder: ``config.yaml``, ``environment.json``, ``compatibility.csv`` (what matches in the two models),
``cells.jsonl`` (finished cells), ``ranking.csv`` and ``rankings/``, ``results.parquet`` (one row a cell and token
budget), ``rules.csv``, ``plane.csv`` (side effects, one row a graft), ``outcome.json``, ``summary.md`` and
``figures/``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechtransplant.errors import FolderError, UsageError
from mechtransplant.evaluation import Evaluation
from mechtransplant.experiment.asked import check_asked, settings_of, tokens_of
from mechtransplant.experiment.cells import CellStore, cell_key, write_atomically
from mechtransplant.experiment.config import RunConfig, on_device, read_config
from mechtransplant.experiment.elsewhere import Elsewhere, labelled
from mechtransplant.experiment.estimate import Estimate, estimate
from mechtransplant.experiment.evaluator import Body, Cell, Evaluator
from mechtransplant.experiment.findings import find
from mechtransplant.experiment.folder import Starts, locked, write_compatibility
from mechtransplant.experiment.jobs import Job
from mechtransplant.experiment.random_weights import check_ancestor, check_random_weights
from mechtransplant.experiment.rankings import STEPS, Rankings
from mechtransplant.experiment.result import RunResult, write_report
from mechtransplant.experiment.reused import Reused
from mechtransplant.experiment.rows import Rows
from mechtransplant.experiment.run_controls import TRIED, Controls
from mechtransplant.experiment.setup import Setup
from mechtransplant.experiment.words import counted_in_words
from mechtransplant.experiment.worker import EngineChoice, EngineName
from mechtransplant.grafting import get_operator
from mechtransplant.modules import share_no_weights
from mechtransplant.progress import announce, bar
from mechtransplant.ranking import get_rule
from mechtransplant.significance import paired_difference_interval
from mechtransplant.tasks import Task


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
        check_strengths(config)
        check_random_strengths(config)
        check_random_weights(config)
        # before any weights are loaded
        check_folder(config, folder)
        self.reused = Reused.of(reuse, config)
        super().__init__(config)
        check_ancestor(config, self.pair)
        self.tokens = tokens_of(self.pair, self.splits)
        check_asked(self.pair, self.tokens, self.splits, self.reused.began, reuse)
        self.folder, self.progress, self.where = folder, progress, engine or EngineChoice()
        self.elsewhere, self.controls = Elsewhere(self), Controls(self)
        self.starts: Starts | None = None

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
            self.store = CellStore(self.folder / "cells.jsonl", self.reused.cells, self._note)
            return self._execute()

    def _execute(self) -> RunResult:
        self.cells = Evaluator(self, self.store)
        if self.config.direction == "better":
            self._turn_to_better()
        start = self.where.start | ({} if self.config.device == "cpu" else {"device": self.config.device})
        added = ("elsewhere", "pair", "asked")
        self.starts = Starts(self.folder, depends_on(self), ("weights", "splits"), added, start)
        if self.store.computed:
            self.starts.note()
        write_compatibility(self.folder, self.pair)
        if self.gating is not None:
            self.gating.settle(self.folder, self.reused.gate_for(depends_on(self)))
        self.engine = self.where.make(self, self.elsewhere)
        try:
            result = self._steps()
        finally:
            self.engine.close()
        # all rankings are there: of a start that was killed between a ranking and this some may be left
        (self.folder / STEPS).unlink(missing_ok=True)
        return result

    def _note(self, taken: bool) -> None:
        """Before a result is written: this start is one that results come from, or the other run's are."""
        # the two models' cells that say which is better come before what was begun is known
        if self.starts is not None:
            self.starts.note(*(self.reused.starts if taken else ()))

    def estimate(self) -> Estimate:
        """What is left to be computed, and how long it takes here; writes nothing."""
        path = self.folder / "cells.jsonl"
        return estimate(self, path.read_bytes().count(b"\n") if path.exists() else 0)

    def _steps(self) -> RunResult:
        if self.progress:
            announce(lambda: str(self.estimate()))
        taken = self.reused.rankings_for(depends_on(self))
        self.rankings = Rankings(
            self.config, self.pair, self.splits, self.budget, self.folder, self.progress, self.fingerprints, taken,
            self._note,
        )  # fmt: skip
        self.rows = Rows()
        choose, test = self.splits.choose, self.splits.test
        self._baselines(choose)
        sweep = [
            self.ranked(rule, k, strength)
            for rule in self.config.rules
            for k in self.counts
            for strength in self.config.strengths
        ]
        self._do(choose, sweep, "sweep on choose")
        # as in the paper, every token budget has its own best K
        self.chosen = {rule: {b: self._choose(rule, b) for b in self.budgets} for rule in self.config.rules}
        self._do(choose, self.controls.tuned_on_choose(), "strengths of random sets on choose")
        self._do(choose, self.controls.weights_on_choose(), "random weights on choose")
        self.baselines = self._baselines(test)
        self._do(test, self._curves(), "K-curves on test")
        for rule in self.config.with_controls:
            self._do(test, self.controls.random(rule), f"random sets of {rule}")
        self._do(test, self.controls.others(), "other controls")
        self.side_effects = self._side_effects()
        return write_report(self, find(self))

    def ranked(self, rule: str, k: int, strength: float) -> Job:
        """The graft of a rule's K highest."""
        return Job("graft", rule, self.rankings.top(rule, k), strength, self.rankings.strengths(rule, k))

    def _curves(self) -> list[Job]:
        """Every rule at every K, at the strength that it chose, and everything grafted at those strengths."""
        jobs: list[Job] = []
        for rule in self.config.rules:
            strength = self.chosen[rule][self.budget][1]
            points = [(k, strength) for k in self.counts if k < len(self.candidates)]
            for k, s in dict.fromkeys([*points, *self.chosen[rule].values()]):
                jobs.append(self.ranked(rule, k, s))
        for strength in dict.fromkeys(self.chosen[rule][self.budget][1] for rule in self.config.rules):
            jobs.append(Job("all", "", tuple(self.candidates), strength))
        return jobs

    def _side_effects(self) -> list[dict[str, Any]]:
        """Of every rule's graft, of everything grafted, of the headline's whole curve, and of some random sets."""
        elsewhere = self.elsewhere
        if not elsewhere.wanted:
            return []
        jobs = [self.ranked(rule, *self.chosen[rule][self.budget]) for rule in self.config.rules]
        headline = self.config.rules[0]
        k, strength = self.chosen[headline][self.budget]
        jobs.append(Job("all", "", tuple(self.candidates), strength))
        others = [size for size in self.counts if size not in (k, len(self.candidates))]
        jobs += [self.ranked(headline, size, strength) for size in others]
        spec = self.config.side_effects
        if headline in self.config.with_controls and spec is not None:
            jobs += self.controls.in_sets(headline, k, strength)[: spec.random]
        cells = [job.cell(self.splits.test) for job in jobs]
        keys = [cell_key(elsewhere.content(cell)) for cell in cells]
        self._compute(cells, "side effects")
        wanted: dict[str, dict[str, Any]] = {}
        alone = {role: self._stored(role) for role in ("target", "source")}
        for key, cell in zip(keys, cells, strict=True):
            wanted[key] = elsewhere.job(cell, {**alone, "after": self._held(cell)})
        self._run_jobs(wanted, "side effects")
        return [
            labelled(self.store.cells[key], job, self._gain(cell))
            for key, cell, job in zip(keys, cells, jobs, strict=True)
        ]

    def _gain(self, cell: Cell) -> dict[str, float]:
        """What a cell gains on ``test`` at this run's largest budget; another run's cell may have had another."""
        before, after = self.baselines["target"][self.budget], self.cells.of(cell)[self.budget]
        low, high = paired_difference_interval(before.correct, after.correct)
        return {"gain": after.accuracy - before.accuracy, "gain_low": low, "gain_high": high}

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

    def _baselines(self, split: Task) -> dict[str, dict[int, Evaluation]]:
        found = {
            role: self.cells.cell(split, role, body="source" if role == "source" else "graft")
            for role in ("target", "source")
        }
        for role, evaluations in found.items():
            self.rows.note(split, role, evaluations, digest=self.cells.digests[role,])
        return found

    def _do(self, split: Task, jobs: Sequence[Job], what: str) -> None:
        cells = [job.cell(split) for job in jobs]
        self._compute(cells, what)
        for cell, job in zip(cells, jobs, strict=True):
            found = self.cells.of(cell)
            key = (job.role, *job.modules)
            self.rows.note(
                split, job.role, found, len(job.modules), job.strength, rule=job.rule, set=job.set,
                depth_matched=job.depth, digest=self.cells.digests[key], beside=self.cells.beside[key],
            )  # fmt: skip

    def _turn_to_better(self) -> None:
        """Exchange the two where the named target is better on ``choose``: the better model is the source."""
        bodies: dict[str, Body] = {"target": "graft", "source": "source"}
        accuracy = {r: self.cells.cell(self.splits.choose, r, body=b)[self.budget].accuracy for r, b in bodies.items()}
        if accuracy["target"] > accuracy["source"]:
            self.turn()
            self.cells = Evaluator(self, self.store)

    def _choose(self, rule: str, budget: int) -> tuple[int, float]:
        """K and strength that are best on ``choose`` at a token budget; the smallest among equals.

        A graft that overflows has no log-probability, and is not chosen by it.
        A graft of every candidate selects nothing and has no random control: it is always reported as ``all``, and
        chosen only where the config names no smaller K.
        """
        by = self.config.choose_by
        options = self.rows.where(role="graft", split="choose", budget=budget, rule=rule)
        options = [r for r in options if self._small_enough(rule, r["k"])]
        if not options:
            do = counted_in_words(get_operator(self.config.operator))
            raise UsageError(
                f"parameters: all grafts of {rule} {do} more than {self.config.parameters:.1%} of the parameters: "
                "give smaller k, or a larger share"
            )
        if any(r[by] is None for r in options):
            raise UsageError(f"choose_by: {by} is not known of this task's answers: choose by accuracy")
        # first: where every selective graft overflows, one of all candidates is none to choose instead
        options = [r for r in options if r["k"] < len(self.candidates)] or options
        options = [r for r in options if math.isfinite(r[by])]
        if not options:
            raise UsageError(f"strengths: all grafts of {rule} overflow on choose: give smaller ones")
        best = min(options, key=lambda r: (-r[by], r["k"], abs(r["strength"] - 1)))
        return best["k"], best["strength"]

    def _small_enough(self, rule: str, k: int) -> bool:
        """Whether a rule's K modules are within the config's share of the parameters."""
        limit = self.config.parameters
        if limit is None:
            return True
        whole, graft = (self.cells.graft(m, 1.0) for m in (self.pair.modules("linear"), self.rankings.top(rule, k)))
        return graft.carried_count(self.pair) <= limit * whole.parameter_count(self.pair)


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
        "asked": {"tokens": run.tokens, "settings": settings_of(run.pair)},
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


def check_strengths(config: RunConfig) -> None:
    """Refuse what rules that fit strengths do not go with, and refitted sets where no rule fits any."""
    operator = config.operator if isinstance(config.operator, str) else config.operator.get("name")
    for rule in (r for r in config.rules if get_rule(r).refit is not None):
        if operator != "replace":
            raise UsageError(
                f"rule {rule!r} fits strengths for the operator replace: leave operator out, got {operator!r}"
            )
        if not share_no_weights(config.kinds):
            raise UsageError(
                f"rule {rule!r} gives every module a strength of its own, and modules of kind "
                f"{' and '.join(config.kinds)} may share weights: give one kind, head and mlp, or head and neuron"
            )
        if "head" in config.kinds and config.options_of(rule).get("kv", config.kv) != "never":
            raise UsageError(
                f"rule {rule!r} gives every head a strength of its own, and K and V are shared by several: leave kv out"
            )
    if config.refitted_sets and not any(get_rule(r).refit for r in config.with_controls):
        raise UsageError("refitted_sets: no rule with controls fits strengths (pruned does): leave it out")
    if config.refitted_sets > config.random_sets:
        raise UsageError(
            f"refitted_sets: {config.refitted_sets} of {config.random_sets} random sets cannot be fitted to: give as "
            "many random_sets, or fewer"
        )


def check_random_strengths(config: RunConfig) -> None:
    """Refuse strengths for random sets where there are too few to try them on."""
    if config.random_strengths and (config.random_sets < TRIED or not config.with_controls):
        raise UsageError(
            f"random_strengths: they are tried on {TRIED} random sets, and there are {config.random_sets} of "
            f"{len(config.with_controls)} rules: give random_sets and controlled, or leave random_strengths out"
        )


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
