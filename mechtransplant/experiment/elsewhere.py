"""Side effects of a run's grafts, as cells: what each costs on other tasks and neutral text, beside what it gains."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import compare
from mechtransplant.experiment.config import SideEffectSpec
from mechtransplant.experiment.evaluator import Cell, graft_of, unpacked_budgets
from mechtransplant.experiment.jobs import Job
from mechtransplant.experiment.setup import Setup
from mechtransplant.grafting import ConditionalGraft
from mechtransplant.selection import remembering
from mechtransplant.side_effects import (
    Baseline,
    NeutralText,
    load_texts,
    measure_side_effects,
    neutral_texts,
    pareto_front,
    side_effect_baseline,
)
from mechtransplant.tasks import Task, list_tasks, load_task
from mechtransplant.tasks.scorers import scoring_of

if TYPE_CHECKING:
    import pandas as pd


#: the kind of job that side effects are
SIDE_EFFECTS = "side effects"


class Elsewhere:
    """The side effects of a run's grafts; the target's own are measured once, and only if a cell is missing.

    Names and files are looked up when it is made, before anything is computed. Raises UsageError for the run's own
    task, and for what cannot be found. ``found``: (tasks, a file's text), where they were looked up already.
    """

    def __init__(self, run: Setup, found: tuple[tuple[Task, ...], NeutralText | None] | None = None) -> None:
        self.run, self.spec = run, run.config.side_effects
        self.tasks, self.file = found or ((), None)
        if self.spec is None or found is not None:
            return
        if self.spec.questions:
            names = [t for t in run.pair.tasks if t != run.task.name] if self.spec.tasks is None else self.spec.tasks
            self.tasks = tuple(_asked(run, name, self.spec) for name in names)
        if self.spec.file is not None:
            self.file = load_texts(self.spec.file)

    @property
    def text(self) -> Any:
        """A file's text, None for neutral text yet to be sampled, or False."""
        if self.spec is None:
            return False
        return self.file or (None if self.spec.texts else False)

    @property
    def wanted(self) -> bool:
        """Whether anything is measured."""
        return bool(self.tasks) or self.text is not False

    @property
    def fingerprints(self) -> dict[str, Any]:
        """What the numbers depend on besides the config."""
        return {
            "side_effect_tasks": {t.name: t.fingerprint for t in self.tasks},
            "text_file": None if self.file is None else self.file.fingerprint,
        }

    @cached_property
    def baseline(self) -> Baseline:
        run, spec = self.run, self.spec
        assert spec is not None
        text = self.text
        if text is None:
            text = neutral_texts(run.pair.target, spec.texts, spec.tokens, run.config.seed)
        return side_effect_baseline(
            run.pair, tasks=self.tasks, text=text, seed=run.config.seed, batch_size=run.config.batch_size
        )

    def content(self, cell: Cell) -> dict[str, Any]:
        """All that decides the side effects of a cell's graft."""
        run, spec = self.run, self.spec
        assert spec is not None
        return {
            "what": SIDE_EFFECTS,
            **run.fingerprints,
            **spec.model_dump(mode="json"),
            **self.fingerprints,
            **run.ancestor,
            "seed": run.config.seed,
            "modules": sorted(cell.modules),
            "strength": cell.strength,
            **cell.own_strengths,
            "test": run.splits.test.fingerprint,
            **scoring_of(run.task.scorer, *(task.scorer for task in self.tasks)),
            **({} if run.gating is None else {"gate": run.gating.fingerprint}),
            **{key: getattr(run.config, key) for key in ("kv", "operator", "dtype", "batch_size")},
        }

    def job(self, cell: Cell, evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What an engine is told; ``evaluations`` are the finished cells of target, source, and the graft on `test`."""
        named = {"role": cell.role, "modules": list(map(str, cell.modules)), "strength": cell.strength}
        return {"what": SIDE_EFFECTS, **named, "strengths": list(cell.strengths), "evaluations": evaluations}

    def compute(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"row": gain against harm, "effects": one record a task and text measure} of one graft."""
        run = self.run
        # what selected them, and not a ranking on another task that has the same ones highest
        selecting = [q for split in (run.splits.discover, run.splits.choose) for q in split.keys]
        modules = tuple(remembering(job["modules"], selecting))
        plain = graft_of(run.config, modules, job["strength"], job["strengths"])
        graft = plain if run.gating is None else ConditionalGraft(plain, accepts=run.gating.gate)
        found = measure_side_effects(run.pair, graft, before=self.baseline, seed=run.config.seed)
        cells = job["evaluations"]
        target, source, after = (
            unpacked_budgets(run.splits.test, cells[name])[run.budget] for name in ("target", "source", "after")
        )
        outcome = compare(target, source, after, resamples=200)
        row = found.against(outcome) if self.tasks else {"gain": outcome.difference}
        return {
            "split": "test",
            "role": f"side effects of {job['role']}",
            "k": len(modules),
            "strength": job["strength"],
            "row": row,
            "effects": _records(found.frame),
            "notes": list(found.notes),
            "text": None if found.text is None else found.text.origin,
        }


def labelled(cell: dict[str, Any], job: Job, gain: dict[str, float]) -> dict[str, Any]:
    """A finished cell with whose it is in its row and its effects, and what that gains."""
    more = {"role": job.role, "rule": job.rule, "k": len(job.modules), "strength": job.strength}
    gains = {key: value for key, value in gain.items() if key in cell["row"]}
    return {**cell, "row": {**cell["row"], **gains, **more}, "effects": [{**more, **e} for e in cell["effects"]]}


def side_effect_tables(cells: list[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(one row a graft with its place on the Pareto front, one row a graft and measure)."""
    import pandas as pd

    plane = pd.DataFrame([c["row"] for c in cells])
    # a random set is a control, not a recipe that anyone would choose
    grafts, controls = plane[plane.role != "random"], plane[plane.role == "random"]
    parts = [pareto_front(grafts) if "harm" in plane else grafts.assign(front=False), controls.assign(front=False)]
    return pd.concat([p for p in parts if len(p)], ignore_index=True), pd.DataFrame(
        [e for c in cells for e in c["effects"]]
    )


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows for JSON: what is missing becomes None."""
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(k): _number(v) for k, v in row.items()} for row in plain.to_dict("records")]


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _asked(run: Setup, name: str, spec: SideEffectSpec) -> Task:
    """The questions of another task: as many as asked, none of which selected."""
    task = load_task(name, max(1024, spec.questions + 128)) if name in list_tasks() else load_task(name)
    if task.name == run.task.name:
        raise UsageError(f"side_effects.tasks: {name!r} is the run's own task, whose effect is the gain: leave it out")
    known = {q for split in (*run.splits, *run.shut) for q in split.keys}
    first_of = {key: i for key, i in task.askable.items() if key not in known}
    n = min(spec.questions, len(first_of) - 2)
    if n < 1:
        raise UsageError(f"side_effects.tasks: {name!r} has no question that the run's own task has not: leave it out")
    return task.subset(sorted(first_of.values())).split(1, 1, n, run.config.seed).test
