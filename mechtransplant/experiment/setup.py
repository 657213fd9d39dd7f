"""What a config asks to be worked on: two models, questions, candidates. Nothing is written.

Every process that computes cells of a run has a setup of its own, made from the same config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.evaluation.batches import check_lengths, encode
from mechtransplant.experiment.config import RunConfig, TaskSpec
from mechtransplant.experiment.gating import Gating, shut_out
from mechtransplant.grafting import get_operator
from mechtransplant.pair import Pair, load_pair
from mechtransplant.tasks import Splits, Task, list_tasks, load_task


def pair_of(config: RunConfig) -> Pair:
    """The pair that a config names, where and in the precision that it says."""
    keys = ("dtype", "device", "one_at_a_time", "device_map")
    options: dict[str, Any] = {key: getattr(config, key) for key in keys}
    named = config.pair
    return load_pair(named, **options) if isinstance(named, str) else load_pair(**named.model_dump(), **options)


def build_task(config: RunConfig, pair: Pair) -> Task:
    """The run's task; the pair's own where the config names none."""
    spec = config.task or pair.default_task
    if spec is None:
        raise UsageError("this pair has no task of its own: give `task:` a name or the path of a JSONL file")
    return load_task(spec) if isinstance(spec, str) else _specified(spec)


def check_task(config: RunConfig) -> None:
    """Raise UsageError where the task that a config names cannot be had or split: no weights are loaded for that."""
    spec, explore = config.task, exploring_task(config)
    if spec is not None:
        task = load_task(spec) if isinstance(spec, str) else _specified(spec)
        task.split(**config.split.model_dump(), explore=explore)


def exploring_task(config: RunConfig) -> Task | None:
    """The task that ``discover`` and ``choose`` are taken from, where it is another one than ``test`` is."""
    spec = config.task
    if not isinstance(spec, TaskSpec) or spec.explore is None:
        return None
    return _specified(spec.model_copy(update={"name": spec.explore}))


def _specified(spec: TaskSpec) -> Task:
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


def unrelated_task(config: RunConfig, pair: Pair, task: Task, explore: Task | None = None) -> Task | None:
    """The task whose ranking is a control: the config's, or the first of the pair's others; None without one."""
    name = config.unrelated
    own = {*task.keys, *(explore.keys if explore is not None else ())}
    if name is None:
        others = [t for t in pair.tasks if t != task.name and not set(load_task(t).keys) & own]
        if not others:
            return None
        name = others[0]
    elif name in (task.name, *(() if explore is None else (explore.name,))):
        raise UsageError(f"unrelated: {name!r} is the run's own task: name another one")
    elif name not in list_tasks() and not Path(name).exists():
        raise UnknownNameError("task", name, list_tasks())
    other = load_task(name)
    shared = len(set(other.keys) & own)
    if shared:
        raise UsageError(f"unrelated: {name!r} asks {shared} of the run's own questions: name another task")
    return other


@dataclass(frozen=True)
class Parts:
    """What a setup is made of: the pair, turned or not, the task, the unrelated one, and the one that explores.

    ``shut``: questions that a gate is closed for.
    """

    pair: Pair
    turned: bool
    task: Task
    other: Task | None
    explore: Task | None = None
    shut: tuple[Task, ...] = ()


class Setup:
    """The models and questions of a config; a wrong operator is refused before any weights are loaded.

    ``parts``: where a process has them already, and no files to make them of.
    """

    def __init__(self, config: RunConfig, parts: Parts | None = None) -> None:
        get_operator(config.operator)
        self.config = config
        if config.threads:
            import torch

            torch.set_num_threads(config.threads)
        made = self._made() if parts is None else parts
        self.pair, self.turned, self.task, self.other = made.pair, made.turned, made.task, made.other
        self.explore, self.shut = made.explore, made.shut
        self.splits: Splits = self.task.split(**config.split.model_dump(), explore=made.explore)
        self.candidates = self.pair.modules(config.kinds)
        self.counts = config.counts(len(self.candidates))
        self.budgets = list(config.budgets or (self.task.max_new_tokens,))
        # a prompt that cannot be written is refused before anything is
        prompts = [p for split in self.splits for p in encode(split, self.pair.target.tokenizer).prompts]
        check_lengths(self.pair.target.hf, max(map(len, prompts)) + max(self.budgets))
        self.fingerprints = {"source": self.pair.source.fingerprint, "target": self.pair.target.fingerprint}
        self.gating = self._gating()

    def _made(self) -> Parts:
        """The parts that the config names."""
        check_task(self.config)
        pair = pair_of(self.config)
        task, explore = build_task(self.config, pair), exploring_task(self.config)
        other = unrelated_task(self.config, pair, task, explore) if "unrelated" in self.config.controls else None
        shut = () if self.config.gate is None else shut_out(self.config.gate, task, explore)
        return Parts(pair, False, task, other, explore, shut)

    def _gating(self) -> Gating | None:
        config = self.config
        if config.gate is None:
            return None
        return Gating(config.gate, self.pair, self.splits, self.shut, config.seed, config.batch_size)

    @property
    def budget(self) -> int:
        """The token budget that decides: the largest."""
        return max(self.budgets)

    @property
    def ancestor(self) -> dict[str, str]:
        """The fingerprint of the pair's common ancestor, where it has one."""
        return {} if self.pair.base is None else {"base": self.pair.base.fingerprint}

    def turn(self) -> None:
        """Exchange source and target."""
        self.pair, self.turned = self.pair.reversed(), not self.turned
        self.fingerprints = {"source": self.fingerprints["target"], "target": self.fingerprints["source"]}
        self.gating = self._gating()
