"""Evaluations of a run as cells: of the source, the target, and the target with any graft, each computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mechtransplant.evaluation import Evaluation, evaluate_budgets
from mechtransplant.evaluation.forked import resuming
from mechtransplant.experiment.cells import CellStore
from mechtransplant.experiment.config import RunConfig
from mechtransplant.experiment.lower_layers import LowerLayers
from mechtransplant.experiment.setup import Setup
from mechtransplant.grafting import ConditionalGraft, Graft
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.tasks import Task
from mechtransplant.tasks.scorers import scoring_of

#: which model is evaluated: the target under a graft of the source ("graft"), the source ("source"), the source under
#: a graft of the target ("reverse"), or the target under a graft of itself ("self")
Body = Literal["graft", "source", "reverse", "self"]

#: the kind of job that an evaluation is
EVALUATION = "evaluation"


@dataclass(frozen=True)
class Cell:
    """One evaluation: ``role`` is what the result's row is called.

    ``whole``: keep every question's log-probability; of a random set, whose mean is enough, the verdicts alone.
    ``strengths``: the modules' own, which ``strength`` multiplies; () for 1.
    """

    split: str
    role: str
    modules: tuple[str, ...] = ()
    strength: float = 1.0
    body: Body = "graft"
    whole: bool = True
    strengths: tuple[float, ...] = ()
    #: another operator than the config's
    operator: dict[str, Any] | None = None

    @property
    def own_strengths(self) -> dict[str, Any]:
        """What the modules' own strengths add to what decides a value: nothing where there are none."""
        pairs = sorted(zip(map(str, self.modules), self.strengths, strict=True)) if self.strengths else []
        return {"strengths": pairs} if pairs else {}

    def job(self) -> dict[str, Any]:
        """As JSON, for an engine."""
        return {"what": EVALUATION, **asdict(self), "modules": list(map(str, self.modules))}

    @classmethod
    def of(cls, job: dict[str, Any]) -> Cell:
        """The opposite of :meth:`job`."""
        named = {key: value for key, value in job.items() if key != "what"}
        return cls(**{**named, "modules": tuple(job["modules"]), "strengths": tuple(job["strengths"])})


def graft_of(
    config: RunConfig,
    modules: Sequence[str],
    strength: float,
    strengths: Sequence[float] = (),
    operator: dict[str, Any] | None = None,
) -> Graft:
    """A graft as a config makes them; ``strengths`` are the modules' own, which ``strength`` multiplies."""
    each: Any = [strength * own for own in strengths] if strengths else strength
    return Graft(modules, each, kv=config.kv, operator=operator or config.operator)


class Evaluator:
    """The evaluations of one setup; ``cell`` looks one up in the store or computes it."""

    def __init__(self, setup: Setup, store: CellStore | None = None) -> None:
        self.setup, self.config, self.store = setup, setup.config, store
        self.digests: dict[tuple[str, ...], dict[int, str]] = {}
        #: of a self-graft: the ungrafted target's digests, from the same process
        self.beside: dict[tuple[str, ...], dict[int, str]] = {}
        pair = setup.pair
        own = make_pair(pair.target, pair.target, "self")
        # with the ancestor of the real pair, t + λ (s − b) would not be t
        own.base = None if pair.base is None else pair.target
        self.pairs: dict[Body, Pair] = {"graft": pair, "source": pair, "reverse": pair.reversed(), "self": own}
        self.splits = {str(split.role): split for split in setup.splits}
        self.lower = LowerLayers(setup)

    def graft(self, modules: Sequence[str], strength: float, strengths: Sequence[float] = ()) -> Graft:
        """A graft of the run's kind; ``strengths`` are the modules' own, which ``strength`` multiplies."""
        return graft_of(self.config, modules, strength, strengths)

    def content(self, cell: Cell) -> dict[str, Any]:
        """All that decides a cell's value."""
        content = {
            **self.setup.fingerprints,
            **self.setup.ancestor,
            "task": self.splits[cell.split].fingerprint,
            **scoring_of(self.splits[cell.split].scorer),
            "budgets": self.setup.budgets,
            "body": cell.body,
            "modules": sorted(cell.modules),
            "strength": cell.strength if cell.modules else 0,
            "dtype": self.config.dtype,
            "batch_size": self.config.batch_size,
            "whole": cell.whole,
            **{key: getattr(self.config, key) for key in ("kv", "operator")},
        }
        if cell.body == "self":
            content["beside"] = "target"
        content |= cell.own_strengths
        if cell.operator is not None:
            content["operator"] = cell.operator
        closed = self._closed(cell)
        if closed:
            content["closed"] = sorted(closed)
        return content

    def _closed(self, cell: Cell) -> list[str]:
        """Keys of the questions that a cell's graft is not in place for."""
        gating = self.setup.gating
        return [] if gating is None or not cell.modules else gating.closed(self.splits[cell.split])

    def _in_place(self, cell: Cell) -> Graft | ConditionalGraft:
        """A cell's graft; behind the run's gate where that is closed for any of its questions."""
        plain = graft_of(self.config, cell.modules, cell.strength, cell.strengths, cell.operator)
        gating = self.setup.gating
        return plain if gating is None or not self._closed(cell) else ConditionalGraft(plain, accepts=gating.gate)

    def compute(self, cell: Cell) -> dict[str, Any]:
        """A cell's values, as JSON."""
        pair, split = self.pairs[cell.body], self.splits[cell.split]
        model = pair.source if cell.body == "source" else pair.target
        graft = self._in_place(cell)
        remembered = cell.body == "graft" and isinstance(graft, Graft)
        memory, lowest = self.lower.under(split, cell.modules if remembered else ())
        with graft.applied(pair), resuming(model, memory, lowest):
            found = self._evaluate(model, split)
        # another processor rounds differently, and the target's own cell may be from another start: bits are
        # compared within one process
        beside = self._evaluate(model, split) if cell.body == "self" else {}
        return {
            "split": split.role,
            "role": cell.role,
            "k": len(cell.modules),
            "strength": cell.strength,
            "modules": list(map(str, cell.modules)),
            **({"strengths": list(cell.strengths)} if cell.strengths else {}),
            **({} if cell.operator is None else {"operator": cell.operator}),
            "budgets": {str(b): packed(e, cell.whole) for b, e in found.items()},
            **({"beside": {str(b): digest(e) for b, e in beside.items()}} if beside else {}),
        }

    def cell(self, split: Task, role: str, *, body: Body = "graft") -> dict[int, Evaluation]:
        """One evaluation per budget of a model without any graft, of an evaluator that has a store."""
        return self.of(Cell(str(split.role), role, body=body))

    def of(self, wanted: Cell) -> dict[int, Evaluation]:
        """One evaluation per budget, of an evaluator that has a store."""
        assert self.store is not None
        cell = self.store.get(self.content(wanted), lambda: self.compute(wanted))
        stored, key = cell["budgets"], (wanted.role, *wanted.modules)
        self.beside[key] = {int(b): d for b, d in cell.get("beside", {}).items()}
        self.digests[key] = {b: stored[str(b)].get("digest", "") for b in self.setup.budgets}
        return unpacked_budgets(self.splits[wanted.split], cell)

    def _evaluate(self, model: LanguageModel, split: Task) -> dict[int, Evaluation]:
        return evaluate_budgets(model, split, self.setup.budgets, self.config.batch_size, method="auto")


#: what is kept of the gold answer under teacher forcing
CONTINUOUS = ("log_probability", "logit_difference")


def packed(evaluation: Evaluation, whole: bool = True) -> dict[str, Any]:
    """An evaluation as JSON: bits as strings, continuous outcomes to seven digits (float32 has no more)."""
    found: dict[str, Any] = {"correct": bits(evaluation.correct), "method": evaluation.method}
    if whole:
        found["digest"] = digest(evaluation)
    for name in CONTINUOUS:
        values = getattr(evaluation, name)
        if values is not None:
            found[f"{name}_mean"] = float(values.mean())
            if whole:
                found[name] = [float(f"{v:.7g}") for v in values]
    for name in ("answered", "ended"):
        if getattr(evaluation, name) is not None:
            found[name] = bits(getattr(evaluation, name))
    return found


def digest(evaluation: Evaluation) -> str:
    """Twenty digits of the verdicts and of every bit of the continuous outcomes."""
    content = hashlib.sha256(bits(evaluation.correct).encode())
    for name in CONTINUOUS:
        values = getattr(evaluation, name)
        content.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
    return content.hexdigest()[:20]


def unpacked_budgets(split: Task, cell: dict[str, Any]) -> dict[int, Evaluation]:
    """The evaluations of a finished cell, by token budget."""
    return {int(b): unpacked(split, int(b), content) for b, content in cell["budgets"].items()}


def unpacked(split: Task, budget: int, content: dict[str, Any]) -> Evaluation:
    """The evaluation again; where every question's value was not kept, each is the mean."""
    n = len(content["correct"])
    continuous: dict[str, Any] = {}
    for name in CONTINUOUS:
        if name in content:
            continuous[name] = np.array(content[name])
        elif f"{name}_mean" in content:
            continuous[name] = np.full(n, content[f"{name}_mean"])
    written: dict[str, Any] = {name: bools(content[name]) for name in ("answered", "ended") if name in content}
    return Evaluation(
        split.name,
        split.role,
        split.fingerprint,
        bools(content["correct"]),
        content["method"],
        budget,
        questions=split.keys,
        **continuous,
        **written,
    )


def bits(values: Any) -> str:
    """Verdicts as a string of 0 and 1."""
    return "".join("1" if v else "0" for v in values)


def bools(text: str) -> NDArray[np.bool_]:
    """The opposite of :func:`bits`."""
    return np.array([c == "1" for c in text])
