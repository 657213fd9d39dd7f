"""A config becomes a run: baselines, ranking on ``discover``, a sweep on ``choose``, a report on ``test``.

A run is a folder: ``config.yaml``, ``environment.json``, ``cells.jsonl`` (finished cells), ``ranking.csv``,
``results.parquet`` (one row a cell and token budget), ``outcome.json``, ``summary.md`` and ``figures/``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.controls import RandomSets, random_matched
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import Evaluation, compare, evaluate, evaluate_budgets
from mechtransplant.evaluation.batches import check_lengths, encode
from mechtransplant.experiment.cells import CellStore, write_atomically
from mechtransplant.experiment.config import RunConfig, read_config
from mechtransplant.experiment.environment import versions
from mechtransplant.experiment.summary import RunResult, write_report
from mechtransplant.grafting import Graft, get_operator
from mechtransplant.pair import LanguageModel, Pair, load_pair
from mechtransplant.progress import track
from mechtransplant.ranking import get_rule, rank_modules
from mechtransplant.tasks import Splits, Task, load_task

if TYPE_CHECKING:
    import pandas as pd


def build_task(config: RunConfig, pair: Pair) -> Task:
    """The run's task; the pair's own where the config names none."""
    spec = config.task or pair.default_task
    if spec is None:
        raise UsageError("this pair has no task of its own: give `task:` a name or the path of a JSONL file")
    if isinstance(spec, str):
        return load_task(spec)
    fields = {key: getattr(spec, key) for key in ("question_field", "answer_field", "template_field")}
    task = load_task(spec.name, spec.n, spec.seed, **{key: name for key, name in fields.items() if name is not None})
    changes = {key: getattr(spec, key) for key in ("scorer", "max_new_tokens", "stop", "short_answer")}
    changes = {key: value for key, value in changes.items() if value is not None}
    if spec.format is not None:
        changes["format"] = replace(task.format, **spec.format.model_dump(exclude_unset=True))
    # one forward decides a short answer only for the scorer and the format that the task was made for
    if {"scorer", "format", "stop"} & changes.keys():
        changes.setdefault("short_answer", False)
    return replace(task, **changes)


class Run:
    """One configured run in one folder; ``execute`` does the work, skipping what the folder already holds."""

    def __init__(self, config: RunConfig, folder: Path, progress: bool = True) -> None:
        # before any weights are loaded, and before anything is written
        get_rule(config.rule).check(config.kind, config.rule_options)
        get_operator(config.operator)
        self.config, self.folder, self.progress = config, folder, progress
        if config.threads:
            import torch

            torch.set_num_threads(config.threads)
        self.pair = self._load_pair()
        self.task = build_task(config, self.pair)
        self.splits: Splits = self.task.split(**config.split.model_dump())
        self.counts = config.counts(len(self.pair.modules(config.kind)))
        self.budgets = list(config.budgets or (self.task.max_new_tokens,))
        # a prompt that cannot be written is refused before anything is
        prompts = [p for split in self.splits for p in encode(split, self.pair.target.tokenizer).prompts]
        check_lengths(self.pair.target.hf, max(map(len, prompts)) + max(self.budgets))
        self.fingerprints = {"source": self.pair.source.fingerprint, "target": self.pair.target.fingerprint}
        self._check_folder()

    def _note_environment(self) -> None:
        """Write what the numbers depend on; refuse other weights or questions than those that the folder began with.

        A later start with other versions or threads is noted beside the earlier ones, never instead of them.
        """
        path, now = self.folder / "environment.json", environment(self)
        if path.exists():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                for what in ("weights", "splits"):
                    if saved[what] != now[what]:
                        raise UsageError(
                            f"{self.folder} holds a run of the same config with other {what} (see its "
                            "environment.json): choose another --out folder, or remove it"
                        )
                now["starts"] = saved["starts"] + [start for start in now["starts"] if start not in saved["starts"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path} is broken ({error}): choose another --out folder, or remove it") from error
        write_atomically(path, json.dumps(now, indent=1) + "\n")

    def _load_pair(self) -> Pair:
        named = self.config.pair
        options: dict[str, Any] = {"dtype": self.config.dtype, "device": self.config.device}
        return load_pair(named, **options) if isinstance(named, str) else load_pair(**named.model_dump(), **options)

    @property
    def _config_text(self) -> str:
        import yaml

        return str(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))

    def _check_folder(self) -> None:
        """Refuse a folder that holds another run, or anything else; writes nothing."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file: choose another --out folder")
        path = self.folder / "config.yaml"
        if path.exists():
            # parsed, so that a run from before a key existed has that key's default
            if read_config(path) != self.config:
                raise UsageError(
                    f"{self.folder} holds another run (its config.yaml differs): choose another --out folder, "
                    "or remove it"
                )
            return
        if self.folder.exists() and any(p.name != ".lock" for p in self.folder.iterdir()):
            raise UsageError(f"{self.folder} is not empty and holds no run: choose another --out folder")

    # --- cells ---------------------------------------------------------------------------------------------------

    def cell(self, split: Task, role: str, modules: Sequence[str] = (), strength: float = 1.0) -> dict[int, Evaluation]:
        """One evaluation per budget: of the source, the target, or the target with a graft in place."""
        model = self.pair.source if role == "source" else self.pair.target
        content = {
            **self.fingerprints,
            "task": split.fingerprint,
            "budgets": self.budgets,
            "source_model": role == "source",
            "modules": sorted(modules),
            "strength": strength if modules else 0,
            "dtype": self.config.dtype,
            "batch_size": self.config.batch_size,
        }

        # named where they are not the default, so that runs from before they were options go on
        content |= {key: getattr(self.config, key) for key in ("kv", "operator") if not self._is_default(key)}

        def compute() -> dict[str, Any]:
            with self._graft(modules, strength).applied(self.pair):
                found = self._evaluate(model, split)
            return {
                "split": split.role,
                "role": role,
                "k": len(modules),
                "strength": strength,
                "modules": list(modules),
                "budgets": {str(b): _packed(e) for b, e in found.items()},
            }

        stored = self.store.get(content, compute)["budgets"]
        return {b: _unpacked(split, b, stored[str(b)]) for b in self.budgets}

    def _is_default(self, key: str) -> bool:
        return bool(getattr(self.config, key) == RunConfig.model_fields[key].default)

    def _graft(self, modules: Sequence[str], strength: float) -> Graft:
        return Graft(modules, strength, kv=self.config.kv, operator=self.config.operator)

    def _evaluate(self, model: LanguageModel, split: Task) -> dict[int, Evaluation]:
        if split.short_answer:
            return {
                b: evaluate(model, split, max_new_tokens=b, batch_size=self.config.batch_size) for b in self.budgets
            }
        return evaluate_budgets(model, split, self.budgets, self.config.batch_size)

    @cached_property
    def ranking(self) -> pd.DataFrame:
        """The rule's ranking on ``discover``; computed once and kept in the folder."""
        import pandas as pd

        path = self.folder / "ranking.csv"
        if not path.exists():
            rule, config = get_rule(self.config.rule), self.config
            own = {"batch_size": config.batch_size, "max_new_tokens": max(self.budgets)}
            options = {key: value for key, value in own.items() if rule.takes(key)} | config.rule_options
            frame = rank_modules(self.pair, self.splits.discover, config.rule, config.kind, seed=config.seed, **options)
            # 17 significant digits: the file gives back the very same numbers
            write_atomically(path, frame.to_csv(index=False, float_format="%.17g"))
        return pd.read_csv(path)

    def random_sets(self, k: int) -> RandomSets:
        """The matched control sets of the K highest-ranked modules."""
        return random_matched(
            self.pair, list(self.ranking.module[:k]), self.config.random_sets, seed=self.config.seed + k
        )

    # --- the flow ------------------------------------------------------------------------------------------------

    def execute(self) -> RunResult:
        """Do what is left to do, and write every table and figure."""
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=0):
                # again under the lock: another start may have come first
                self._check_folder()
                write_atomically(self.folder / "config.yaml", self._config_text)
                self.store = CellStore(self.folder / "cells.jsonl")
                return self._execute()
        except Timeout as error:
            raise UsageError(
                f"another process is running in {self.folder}: wait for it, or choose another --out folder"
            ) from error
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another --out folder"
            ) from error

    def _execute(self) -> RunResult:
        if self.config.direction == "better":
            self._turn_to_better()
        self._note_environment()
        rows: list[dict[str, Any]] = []
        choose, test = self.splits.choose, self.splits.test
        for role in ("target", "source"):
            self._note(rows, choose, role, self.cell(choose, role))
        jobs: list[tuple[str, int, float, tuple[str, ...], str]] = []
        for k in self.counts:
            top, controls = tuple(self.ranking.module[:k]), self.random_sets(k)
            for strength in self.config.strengths:
                jobs.append(("graft", k, strength, top, ""))
                jobs += [("random", k, strength, drawn, controls.depth) for drawn in controls.sets]
        for role, k, strength, modules, depth in track(jobs, "sweep on choose", self.progress):
            self._note(rows, choose, role, self.cell(choose, role, modules, strength), k, strength, depth)

        # as in the paper, every token budget has its own best K
        chosen = {budget: self._choose(rows, budget) for budget in self.budgets}
        grafts = {b: self._graft(list(self.ranking.module[:k]), strength) for b, (k, strength) in chosen.items()}
        jobs = []
        for k, strength in dict.fromkeys(chosen.values()):
            controls = self.random_sets(k)
            jobs.append(("graft", k, strength, tuple(self.ranking.module[:k]), ""))
            jobs += [("random", k, strength, drawn, controls.depth) for drawn in controls.sets]
        everything = tuple(self.ranking.module)
        jobs.append(("all", len(everything), chosen[max(self.budgets)][1], everything, ""))
        baselines = {role: self.cell(test, role) for role in ("target", "source")}
        for role, found in baselines.items():
            self._note(rows, test, role, found)
        after: dict[tuple[int, float], dict[int, Evaluation]] = {}
        for role, k, strength, modules, depth in track(jobs, "report on test", self.progress):
            found = self.cell(test, role, modules, strength)
            if role == "graft":
                after[k, strength] = found
            self._note(rows, test, role, found, k, strength, depth)
        outcomes = {
            b: compare(baselines["target"][b], baselines["source"][b], after[chosen[b]][b], seed=self.config.seed)
            for b in self.budgets
        }
        return write_report(self, rows, grafts, outcomes)

    def _turn_to_better(self) -> None:
        """Exchange the two where the named target is better on ``choose``: the better model is the source."""
        budget = max(self.budgets)
        accuracy = {role: self.cell(self.splits.choose, role)[budget].accuracy for role in ("target", "source")}
        if accuracy["target"] > accuracy["source"]:
            self.pair = self.pair.reversed()
            self.fingerprints = {"source": self.fingerprints["target"], "target": self.fingerprints["source"]}

    def _choose(self, rows: list[dict[str, Any]], budget: int) -> tuple[int, float]:
        """K and strength with the best accuracy on ``choose`` at a token budget; the smallest among equals.

        A graft of every candidate selects nothing and has no random control: it is always reported as ``all``, and
        chosen only where the config names no smaller K.
        """
        options = [r for r in rows if r["role"] == "graft" and r["split"] == "choose" and r["budget"] == budget]
        selective = [r for r in options if r["k"] < len(self.ranking)]
        best = min(selective or options, key=lambda r: (-r["accuracy"], r["k"], abs(r["strength"] - 1)))
        return best["k"], best["strength"]

    def _note(
        self,
        rows: list[dict[str, Any]],
        split: Task,
        role: str,
        found: dict[int, Evaluation],
        k: int = 0,
        strength: float = 0.0,
        depth: str = "",
    ) -> None:
        for budget, evaluation in found.items():
            low, high = evaluation.interval
            rows.append(
                {
                    "split": split.role,
                    "role": role,
                    "k": k,
                    "strength": strength,
                    "budget": budget,
                    "accuracy": evaluation.accuracy,
                    "low": low,
                    "high": high,
                    "n": len(evaluation),
                    "depth_matched": depth,
                    "method": evaluation.method,
                    "answered": None if evaluation.answered is None else float(evaluation.answered.mean()),
                    "ended": None if evaluation.ended is None else float(evaluation.ended.mean()),
                    "correct": _bits(evaluation.correct),
                }
            )


def _bits(values: Any) -> str:
    return "".join("1" if v else "0" for v in values)


def _bools(text: str) -> Any:
    return np.array([c == "1" for c in text])


def _packed(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON: bits as strings, log-probabilities at full precision."""
    packed: dict[str, Any] = {"correct": _bits(evaluation.correct), "method": evaluation.method}
    if evaluation.log_probability is not None:
        packed["log_probability"] = evaluation.log_probability.tolist()
    for name in ("answered", "ended"):
        if getattr(evaluation, name) is not None:
            packed[name] = _bits(getattr(evaluation, name))
    return packed


def _unpacked(split: Task, budget: int, packed: dict[str, Any]) -> Evaluation:
    scores = packed.get("log_probability")
    return Evaluation(
        split.name,
        split.role,
        split.fingerprint,
        _bools(packed["correct"]),
        packed["method"],
        budget,
        None if scores is None else np.array(scores),
        **{name: _bools(packed[name]) for name in ("answered", "ended") if name in packed},
    )


def environment(run: Run) -> dict[str, Any]:
    """What the run's numbers depend on besides the config: versions, machine, weights, task."""
    return {
        "starts": [versions()],
        "weights": run.fingerprints,
        "task": {"name": run.task.name, "fingerprint": run.task.fingerprint},
        "splits": {s.role: {"n": len(s), "fingerprint": s.fingerprint} for s in run.splits},
    }


def run_experiment(config: RunConfig, folder: str | Path, progress: bool = True) -> RunResult:
    """Run a config in a folder; started again, it continues where it was."""
    return Run(config, Path(folder), progress).execute()
