"""Which modules to graft: one registry of rules that score every module of a kind, highest first.

A rule is a function of (pair, task, kind, options) that returns one score a module, in the order of
``pair.modules(kind)``. Yours takes three lines::

    @register_rule("mine", equation="…", needs="prompts")
    def mine(pair, task, kind, **options):
        return [score(module) for module in pair.modules(kind)]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from mechtransplant.activations import Text
from mechtransplant.errors import TaskError, UnknownNameError, UsageError
from mechtransplant.modules import KINDS, Kind, module_frame
from mechtransplant.shifts import Alignment, decoding_shifts
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import Pair

Scores = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """A registered rule: its function, its equation, what it needs ("nothing" or "prompts"), the kinds it can score."""

    name: str
    score: Callable[..., Scores]
    equation: str
    needs: str
    description: str
    kinds: tuple[str, ...] = KINDS

    def check(self, kind: str, options: dict[str, Any]) -> None:
        """Raise UsageError for a kind that the rule cannot score, or an option that it does not take."""
        if kind not in KINDS:
            raise UnknownNameError("kind of module", kind, KINDS)
        if kind not in self.kinds:
            others = ", ".join(sorted(name for name, rule in RULES.items() if kind in rule.kinds))
            raise UsageError(
                f"rule {self.name!r} scores kind {' or '.join(self.kinds)}, not {kind!r}: for {kind!r} use {others}"
            )
        parameters = inspect.signature(self.score).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        takes = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
        hints = get_type_hints(self.score, localns={"Pair": Any, "pd": Any})
        for name, value in options.items():
            if name in ("seed", "progress"):
                raise UsageError(f"{name} is no option of a rule: the run's own is used")
            if name not in takes:
                raise UnknownNameError(f"option of rule {self.name!r}", name, takes)
            choices = get_args(hints[name]) if get_origin(hints.get(name)) is Literal else ()
            if choices and value not in choices:
                raise UsageError(f"unknown {name} {value!r}: expected {' or '.join(map(str, choices))}")
            counts = int in (hints.get(name), *get_args(hints.get(name)))
            if counts and value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"option {name} of rule {self.name!r} is a whole number of at least 1, got {value!r}")

    def takes(self, option: str) -> bool:
        """Whether the rule has an option of that name."""
        return option in inspect.signature(self.score).parameters


RULES: dict[str, Rule] = {}


def register_rule(
    name: str, equation: str = "", needs: str = "prompts", kinds: tuple[str, ...] = KINDS
) -> Callable[[Callable[..., Scores]], Callable[..., Scores]]:
    """Decorator: make a scoring function available to :func:`rank_modules` under ``name``."""

    def add(function: Callable[..., Scores]) -> Callable[..., Scores]:
        summary = (function.__doc__ or "").strip().split("\n")[0]
        RULES[name] = Rule(name, function, equation, needs, summary, kinds)
        return function

    return add


def list_rules() -> dict[str, str]:
    """Every rule with its equation, what it needs and the kinds that it scores."""
    kinds = {r.name: "all" if r.kinds == KINDS else ", ".join(r.kinds) for r in RULES.values()}
    return {r.name: f"{r.description} {r.equation} (needs {r.needs}; kinds: {kinds[r.name]})" for r in RULES.values()}


def get_rule(name: str) -> Rule:
    """The rule of that name; raises UnknownNameError."""
    if name not in RULES:
        raise UnknownNameError("rule", name, RULES)
    return RULES[name]


def rank_modules(
    pair: Pair, task: Task | None = None, rule: str = "lae", kind: Kind = "linear", *, seed: int = 0, **options: Any
) -> pd.DataFrame:
    """Every module of a kind with its score and rank (1 is the highest score; ties go to the earlier module).

    Args:
        task: the ``discover`` split (None for rules that need no prompts).
        options: passed to the rule, for example ``alignment="teacher-forced"`` for ``lae``.

    Returns:
        columns module, kind, layer, head, score, rank, sorted by rank.

    Raises:
        UnknownNameError: no such rule or kind. TaskError: any questions but a ``discover`` split.
    """
    entry = get_rule(rule)
    entry.check(kind, options)
    modules = pair.modules(kind)
    if task is not None and task.role != "discover":
        what = "whole task, with the questions that report," if task.role == "all" else f"{task.role} split"
        raise TaskError(f"modules are not ranked on the {what} of {task.name!r}: pass task.split(…).discover")
    if task is None and entry.needs != "nothing":
        raise UsageError(f"rule {rule!r} needs {entry.needs}: pass a task's discover split")
    scores = np.asarray(entry.score(pair, task, kind, seed=seed, **options), dtype=float)
    if scores.shape != (len(modules),) or not np.isfinite(scores).all():
        raise UsageError(
            f"rule {rule!r} must give {len(modules)} finite scores, one a module, got shape {scores.shape}"
        )
    frame = module_frame(modules).assign(score=scores)
    order = np.argsort(-scores, kind="stable")
    frame = frame.iloc[order].reset_index(drop=True)
    return frame.assign(rank=np.arange(1, len(frame) + 1))


@register_rule(
    "lae", "s(m) = mean over prompts and steps of |a_source(t) − a_target(t)|, a = ‖h‖₁/d", kinds=("linear",)
)
def lae(
    pair: Pair,
    task: Task,
    kind: Kind,
    *,
    alignment: Alignment = "own-text",
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """The seed paper's layer-wise activation evaluation (eqs. 5 and 6)."""
    shifts = decoding_shifts(pair, task, alignment, text, max_new_tokens, batch_size, progress)
    return shifts.groupby("module", sort=False).value.mean().reindex(pair.modules(kind)).to_numpy()


@register_rule("weight_delta", "s(m) = ‖W_source − W_target‖ (Frobenius)", needs="nothing")
def weight_delta(pair: Pair, task: Task | None, kind: Kind, *, seed: int = 0) -> Scores:
    """How far the weights moved; needs no data."""
    theirs, ours = pair.source_parameters, pair.target_parameters
    scores = []
    for module in pair.modules(kind):
        regions = pair.layout.regions(module, ours)
        squares = [
            float((r.of(theirs[r.parameter]).float() - r.of(ours[r.parameter]).float()).square().sum()) for r in regions
        ]
        scores.append(float(np.sqrt(sum(squares))))
    return scores


@register_rule("random", "s(m) uniform on [0, 1)", needs="nothing")
def random(pair: Pair, task: Task | None, kind: Kind, *, seed: int = 0) -> Scores:
    """No information: what any other rule must beat."""
    return np.random.default_rng(seed).random(len(pair.modules(kind)))
