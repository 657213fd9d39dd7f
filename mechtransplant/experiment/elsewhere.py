"""Side effects of a run's grafts, as cells: what each costs on other tasks and neutral text, beside what it gains."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation import compare
from mechtransplant.side_effects import Baseline, measure_side_effects, pareto_front, side_effect_baseline

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


class Elsewhere:
    """The side effects of a run's grafts; the target's own are measured once, and only if a cell is missing."""

    def __init__(self, run: Run) -> None:
        self.run, self.spec = run, run.config.side_effects

    @property
    def tasks(self) -> list[str]:
        """The names of the other tasks."""
        if self.spec is None or not self.spec.questions:
            return []
        own = {self.run.task.name, self.run.pair.default_task}
        return (
            list(self.spec.tasks) if self.spec.tasks is not None else [t for t in self.run.pair.tasks if t not in own]
        )

    @property
    def text(self) -> Any:
        """A file, neutral text yet to be sampled, or False."""
        if self.spec is None:
            return False
        return self.spec.file or (None if self.spec.texts else False)

    @property
    def wanted(self) -> bool:
        """Whether anything is measured."""
        return bool(self.tasks) or self.text is not False

    @cached_property
    def baseline(self) -> Baseline:
        from mechtransplant.side_effects import neutral_texts

        run, spec = self.run, self.spec
        assert spec is not None
        text = self.text
        if text is None:
            text = neutral_texts(run.pair.target, spec.texts, spec.tokens, run.config.seed)
        return side_effect_baseline(
            run.pair,
            tasks=self.tasks,
            text=text,
            n=max(1, spec.questions),
            seed=run.config.seed,
            batch_size=run.config.batch_size,
        )

    def of(self, role: str, rule: str, modules: tuple[str, ...], strength: float, **labels: Any) -> dict[str, Any]:
        """{"row": gain against harm, "effects": one record a task and text measure} of one graft."""
        run, spec = self.run, self.spec
        assert spec is not None
        content = {
            "what": "side effects",
            **run.fingerprints,
            **spec.model_dump(mode="json"),
            "tasks": self.tasks,
            "text_file": _content_of(spec.file),
            "seed": run.config.seed,
            "modules": sorted(modules),
            "strength": strength,
            "test": run.splits.test.fingerprint,
            **{key: getattr(run.config, key) for key in ("kv", "operator", "dtype", "batch_size")},
        }

        def compute() -> dict[str, Any]:
            found = measure_side_effects(
                run.pair, run.cells.graft(modules, strength), before=self.baseline, seed=run.config.seed
            )
            whole = role != "random"
            after = run.cells.cell(run.splits.test, role, modules, strength, whole=whole)[run.budget]
            target, source = (run.baselines[r][run.budget] for r in ("target", "source"))
            outcome = compare(target, source, after, resamples=200)
            row = found.against(outcome) if self.tasks else {"gain": outcome.difference}
            return {
                "split": "test",
                "role": f"side effects of {role}",
                "k": len(modules),
                "strength": strength,
                "row": row,
                "effects": _records(found.frame),
                "notes": list(found.notes),
                "text": None if found.text is None else found.text.origin,
            }

        cell = run.store.get(content, compute)
        more = {"role": role, "rule": rule, "k": len(modules), "strength": strength, **labels}
        return {**cell, "row": {**cell["row"], **more}, "effects": [{**more, **e} for e in cell["effects"]]}


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


def _content_of(file: str | None) -> str:
    """What is in a file of texts, as a hash: another text is another cell."""
    import hashlib
    from pathlib import Path

    if file is None:
        return ""
    path = Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else file
