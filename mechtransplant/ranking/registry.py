"""One registry of rules that score modules, highest first, and the function that ranks by one of them.

A rule is a function of (pair, task, kind, options) that returns one score a module, in the order of
``pair.modules(kind)``. Yours takes three lines::

    @register_rule("mine", equation="…", needs="prompts")
    def mine(pair, task, kind, **options):
        return [score(module) for module in pair.modules(kind)]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import TaskError, UnknownNameError, UsageError
from mechtransplant.modules import KINDS, Kind, module_frame
from mechtransplant.selection import note_ranking, remembering
from mechtransplant.tasks import Role, Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import Pair

Scores = Sequence[float] | NDArray[np.float64]
Needs = Literal["nothing", "prompts", "gold answers", "gradients"]
#: one kind of module, or several that are ranked together
Kinds = Kind | tuple[Kind, ...]
#: the splits that rules see: never the one that reports
DISCOVER: tuple[Role, ...] = ("discover",)
CHOOSE: tuple[Role, ...] = ("choose", "discover")


@dataclass(frozen=True)
class Fitted:
    """What a rule returns that gives every module a strength of its own too, in the same order."""

    scores: Scores
    strengths: Scores


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    ``needs``: "nothing", "prompts", "gold answers" or "gradients" (of the gold answer's log-probability). ``cost``:
    in forward and backward passes over the questions, N being the number of modules. ``sign``: what a high score
    means. ``alone``: kinds that it cannot rank beside others, with why. ``splits``: which questions it may see, its
    own first. ``refit``: of a rule that fits strengths, what fits those of given modules as well: a function of
    (pair, task, modules, seed, options) that returns them as a Series by module.
    """

    name: str
    score: Callable[..., Scores | Fitted]
    equation: str
    needs: Needs
    description: str
    kinds: tuple[str, ...] = KINDS
    cost: str = ""
    sign: str = ""
    splits: tuple[Role, ...] = DISCOVER
    refit: Callable[..., Any] | None = None
    alone: Mapping[str, str] | None = None

    def check(self, kind: Kinds, options: dict[str, Any]) -> None:
        """Raise UsageError for a kind that the rule cannot score, or an option that it does not take."""
        for each in kinds_of(kind):
            if each not in self.kinds:
                others = ", ".join(sorted(name for name, rule in RULES.items() if each in rule.kinds))
                known = " or ".join(filter(None, (", ".join(self.kinds[:-1]), self.kinds[-1])))
                raise UsageError(f"rule {self.name!r} scores kind {known}, not {each!r}: for {each!r} use {others}")
            why = (self.alone or {}).get(each)
            if why is not None and len(kinds_of(kind)) > 1:
                raise UsageError(f"rule {self.name!r} {why}: rank {each}s alone, or by another rule (lae, a gradient)")
        parameters = inspect.signature(self.score).parameters
        inner = self.made_of(options)
        if inner is not None:
            if inner.made_of({}) is not None:
                raise UsageError(f"rule {inner.name!r} is itself made of another rule: name a rule that scores modules")
            inner.check(kind, {k: v for k, v in options.items() if k not in parameters})
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        takes = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
        hints = get_type_hints(self.score, localns={"Pair": Any, "pd": Any})
        for name, value in options.items():
            if name in ("seed", "progress"):
                raise UsageError(f"{name} is no option of a rule: the run's own is used")
            if name not in takes:
                raise UnknownNameError(f"option of rule {self.name!r}", name, takes)
            choices = _choices(hints.get(name))
            if value is None and type(None) in get_args(hints.get(name)):
                continue
            if choices and value not in choices:
                raise UsageError(f"unknown {name} {value!r}: expected {' or '.join(map(str, choices))}")
            counts = int in (hints.get(name), *get_args(hints.get(name)))
            if counts and value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"option {name} of rule {self.name!r} is a whole number of at least 1, got {value!r}")

    def made_of(self, options: dict[str, Any]) -> Rule | None:
        """The rule that this one is made of, where it is."""
        parameters = inspect.signature(self.score).parameters
        return get_rule(options.get("of", parameters["of"].default)) if "of" in parameters else None

    def takes(self, option: str, options: dict[str, Any] | None = None) -> bool:
        """Whether the rule, or the one that it is made of, has an option of that name."""
        inner = self.made_of(options or {})
        inside = inner is not None and inner.takes(option)
        return inside or option in inspect.signature(self.score).parameters

    def sees(self, options: dict[str, Any]) -> tuple[Role, ...]:
        """The splits that it may see with these options."""
        inner = self.made_of(options)
        return self.splits if inner is None else inner.splits

    def needed(self, options: dict[str, Any]) -> Needs:
        """What it needs with these options: a rule made ``of`` another needs what that one needs."""
        inner = self.made_of(options)
        return self.needs if inner is None else inner.needs


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that an option may have, where its type names them."""
    parts = [hint] if get_origin(hint) is Literal else [a for a in get_args(hint) if get_origin(a) is Literal]
    return tuple(value for part in parts for value in get_args(part))


RULES: dict[str, Rule] = {}


Score = TypeVar("Score", bound=Callable[..., Any])


def register_rule(
    name: str,
    equation: str = "",
    needs: Needs = "prompts",
    kinds: tuple[str, ...] = KINDS,
    cost: str = "",
    sign: str = "",
    splits: tuple[Role, ...] = DISCOVER,
    refit: Callable[..., Any] | None = None,
    alone: Mapping[str, str] | None = None,
) -> Callable[[Score], Score]:
    """Decorator: make a scoring function available to :func:`rank_modules` under ``name``."""
    if needs not in get_args(Needs):
        raise UnknownNameError("need of a rule", needs, get_args(Needs))

    if name in RULES:
        raise UsageError(f"a rule named {name!r} exists already: choose another name")

    def add(function: Score) -> Score:
        summary = (function.__doc__ or "").strip().split("\n")[0]
        RULES[name] = Rule(name, function, equation, needs, summary, kinds, cost, sign, splits, refit, alone)
        return function

    return add


def list_rules() -> dict[str, str]:
    """Every rule with its equation, what it needs, what it costs and the kinds that it scores."""
    found = {}
    for rule in RULES.values():
        kinds = "all" if rule.kinds == KINDS else ", ".join(rule.kinds)
        facts = [f"needs {rule.needs}", f"kinds: {kinds}"]
        facts += [f"cost: {rule.cost}"] * bool(rule.cost) + [f"high: {rule.sign}"] * bool(rule.sign)
        facts += [f"ranks on {rule.splits[0]}"] * (rule.splits != DISCOVER)
        found[rule.name] = f"{rule.description} {rule.equation} ({'; '.join(facts)})"
    return found


def rules_frame() -> pd.DataFrame:
    """The registry as a table: rule, equation, needs, cost, sign, kinds, split."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "rule": r.name,
                "what": r.description,
                "equation": r.equation,
                "needs": r.needs,
                "cost": r.cost,
                "high": r.sign,
                "kinds": "all" if r.kinds == KINDS else ", ".join(r.kinds),
                "split": r.splits[0],
            }
            for r in RULES.values()
        ]
    )


def get_rule(name: str) -> Rule:
    """The rule of that name; raises UnknownNameError."""
    if name not in RULES:
        raise UnknownNameError("rule", name, RULES)
    return RULES[name]


def kinds_of(kind: Kinds | Sequence[Kind]) -> tuple[Kind, ...]:
    """One kind or several as a tuple; raises UnknownNameError, and UsageError for none."""
    kinds = (kind,) if isinstance(kind, str) else tuple(dict.fromkeys(kind))
    for each in kinds:
        if each not in KINDS:
            raise UnknownNameError("kind of module", each, KINDS)
    if {"linear", "part"} <= set(kinds):
        raise UsageError("kinds linear and part name the same weights twice: rank one of them")
    if not kinds:
        raise UsageError("no kind of module was named: expected head, mlp, linear, …, or several of them")
    return kinds


def plain_modules(ranking: pd.DataFrame, rule: str, what: str) -> list[str]:
    """A ranking's modules, best first, for what grafts them all at one strength.

    Raises UsageError for a rule that gives every module a strength of its own.
    """
    if "strength" in ranking:
        raise UsageError(
            f"rule {rule!r} gives every module a strength of its own, and {what} grafts all at one: use it in a run, "
            "or with Graft(modules, strengths)"
        )
    return [str(m) for m in ranking.module]


def scores_of(found: Scores | Fitted) -> Scores:
    """The scores in what a rule returned."""
    return found.scores if isinstance(found, Fitted) else found


def rank_modules(
    pair: Pair,
    task: Task | None = None,
    rule: str = "lae",
    kind: Kinds | Sequence[Kind] = "linear",
    *,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """Every module of a kind (or of several, together) with its score and rank.

    Rank 1 is the highest score; ties go to the earlier module. The module names remember the questions that ranked
    them: ``compare`` reports no effect of their grafts on those.

    Args:
        task: the ``discover`` split, or ``choose`` for rules that select on it (None for rules that need no prompts).
        options: passed to the rule, for example ``alignment="teacher-forced"`` for ``lae``.

    Returns:
        columns module, kind, layer, head, score, rank, sorted by rank; of a rule that fits strengths also strength.

    Raises:
        UnknownNameError: no such rule or kind. TaskError: questions of a split that the rule must not see.
    """
    entry = get_rule(rule)
    kinds = kinds_of(kind)
    entry.check(kinds, options)
    modules = pair.modules(kinds)
    if task is not None and not isinstance(task, Task):
        raise UsageError(f"expected a task's split, got {type(task).__name__}: pass task.split(…).{entry.splits[0]}")
    splits = entry.sees(options)
    if task is not None and task.role not in splits:
        what = "whole task, with the questions that report," if task.role == "all" else f"{task.role} split"
        raise TaskError(f"rule {rule!r} does not rank on the {what} of {task.name!r}: pass task.split(…).{splits[0]}")
    needs = entry.needed(options)
    if task is None and needs != "nothing":
        raise UsageError(f"rule {rule!r} needs {needs}: pass a task's {entry.splits[0]} split")
    if task is not None and needs in ("gold answers", "gradients") and not all(e.answer.strip() for e in task.examples):
        raise TaskError(f"rule {rule!r} needs {needs}, and a question of {task.name!r} has an empty answer: fill it in")
    given = kinds[0] if len(kinds) == 1 else kinds
    shown = {"progress": progress} if entry.takes("progress", options) else {}
    try:
        found = entry.score(pair, task, given, seed=seed, **shown, **options)
        scores = np.asarray(scores_of(found), dtype=float)
    except Exception as error:
        if not isinstance(error, UsageError):
            getattr(error, "add_note", str)(f"raised by the rule {rule!r}")
        raise
    if scores.shape != (len(modules),) or not np.isfinite(scores).all():
        raise UsageError(
            f"rule {rule!r} must give {len(modules)} finite scores, one a module, got shape {scores.shape}"
        )
    frame = module_frame(modules).assign(score=scores)
    if isinstance(found, Fitted):
        frame = frame.assign(strength=np.asarray(found.strengths, dtype=float))
    order = np.argsort(-scores, kind="stable")
    frame = frame.iloc[order].reset_index(drop=True)
    frame["module"] = remembering(frame.module, () if task is None or needs == "nothing" else task.keys)
    note_ranking(pair.target.hf, list(frame.module))
    return frame.assign(rank=np.arange(1, len(frame) + 1))
