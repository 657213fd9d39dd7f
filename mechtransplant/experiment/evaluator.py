"""Evaluations of a run as cells: of the source, the target, and the target with any graft, each computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mechtransplant.evaluation import Evaluation, evaluate, evaluate_budgets
from mechtransplant.experiment.cells import CellStore
from mechtransplant.experiment.config import RunConfig
from mechtransplant.grafting import Graft
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.tasks import Task

#: which model is evaluated: the target under a graft of the source ("graft"), the source ("source"), the source under
#: a graft of the target ("reverse"), or the target under a graft of itself ("self")
Body = Literal["graft", "source", "reverse", "self"]


class Evaluator:
    """The evaluations of one run; ``cell`` looks one up or computes it."""

    def __init__(self, config: RunConfig, pair: Pair, budgets: Sequence[int], store: CellStore) -> None:
        self.config, self.pair, self.budgets, self.store = config, pair, list(budgets), store
        self.digests: dict[tuple[str, ...], dict[int, str]] = {}
        #: of a self-graft: the ungrafted target's digests, from the same process
        self.beside: dict[tuple[str, ...], dict[int, str]] = {}
        self.ancestor = {} if pair.base is None else {"base": pair.base.fingerprint}
        self.fingerprints = {"source": pair.source.fingerprint, "target": pair.target.fingerprint}
        own = make_pair(pair.target, pair.target, "self")
        # with the ancestor of the real pair, t + λ (s − b) would not be t
        own.base = None if pair.base is None else pair.target
        self.pairs: dict[Body, Pair] = {"graft": pair, "source": pair, "reverse": pair.reversed(), "self": own}

    def graft(self, modules: Sequence[str], strength: float) -> Graft:
        """A graft of the run's kind."""
        return Graft(modules, strength, kv=self.config.kv, operator=self.config.operator)

    def cell(
        self,
        split: Task,
        role: str,
        modules: Sequence[str] = (),
        strength: float = 1.0,
        *,
        body: Body = "graft",
        whole: bool = True,
    ) -> dict[int, Evaluation]:
        """One evaluation per budget.

        Args:
            role: what the result's row is called.
            whole: keep every question's log-probability; of a random set, whose mean is enough, the verdicts alone.
        """
        content = {
            **self.fingerprints,
            **self.ancestor,
            "task": split.fingerprint,
            "budgets": self.budgets,
            "body": body,
            "modules": sorted(modules),
            "strength": strength if modules else 0,
            "dtype": self.config.dtype,
            "batch_size": self.config.batch_size,
            "whole": whole,
            **{key: getattr(self.config, key) for key in ("kv", "operator")},
        }
        if body == "self":
            content["beside"] = "target"

        def compute() -> dict[str, Any]:
            pair = self.pairs[body]
            model = pair.source if body == "source" else pair.target
            with self.graft(modules, strength).applied(pair):
                found = self._evaluate(model, split)
            # another processor rounds differently, and the target's own cell may be from another start: bits are
            # compared within one process
            beside = self._evaluate(model, split) if body == "self" else {}
            return {
                "split": split.role,
                "role": role,
                "k": len(modules),
                "strength": strength,
                "modules": list(map(str, modules)),
                "budgets": {str(b): packed(e, whole) for b, e in found.items()},
                **({"beside": {str(b): digest(e) for b, e in beside.items()}} if beside else {}),
            }

        cell = self.store.get(content, compute)
        stored = cell["budgets"]
        self.beside[(role, *modules)] = {int(b): d for b, d in cell.get("beside", {}).items()}
        self.digests[(role, *modules)] = {b: stored[str(b)].get("digest", "") for b in self.budgets}
        return {b: unpacked(split, b, stored[str(b)]) for b in self.budgets}

    def _evaluate(self, model: LanguageModel, split: Task) -> dict[int, Evaluation]:
        size = self.config.batch_size
        if split.short_answer:
            first = evaluate(model, split, max_new_tokens=max(self.budgets), batch_size=size)
            if len(self.budgets) == 1:
                return {first.budget: first}
            return {b: evaluate(model, split, max_new_tokens=b, batch_size=size) for b in self.budgets}
        return evaluate_budgets(model, split, self.budgets, size)


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
