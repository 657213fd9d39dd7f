"""The optimised ceiling: a gate for every module, learned by gradient on `choose`.

Forward passes run with hard sets (the K largest gates θ open), and ∂L/∂gate_m = ⟨∂L/∂W_m, W_source − W_target⟩ at that
set moves every gate, open or closed (straight-through). The set that was best on all questions is kept, and at the end
pairs at its boundary are exchanged as long as that helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import gold_scores
from mechtransplant.grafting import KV, Graft
from mechtransplant.progress import track
from mechtransplant.ranking.registry import CHOOSE, Kinds, Scores, register_rule
from mechtransplant.ranking.sensitivity import WeightChanges, weight_effects
from mechtransplant.ranking.steps import kept
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair

Floats = NDArray[np.float64]


@register_rule(
    "mask",
    "θ maximises L(target with the K largest θ grafted), by ∂L/∂gate_m = ⟨∂L/∂W_m, ΔW_m⟩ (straight-through)",
    needs="gradients",
    cost="`steps` forward and backward passes over `sample` questions, and some forwards over all",
    sign="its gate is open",
    splits=CHOOSE,
)
def mask(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    k: int | None = None,
    steps: int = 200,
    sample: int = 32,
    swaps: int = 32,
    kv: KV = "never",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """A learned sparse gate per module, for one ``k``, or for all sizes at once without it.

    ``swaps``: how many exchanges at the boundary of the best set are tried at the end (with ``k``).
    """
    modules = pair.modules(kind)
    if k is not None and k > len(modules):
        raise UsageError(f"k = {k} is above the {len(modules)} modules: ask for at most that many")
    gates = _Gates(pair, task, modules, kv, batch_size)
    sizes = np.unique(np.round(np.geomspace(1, max(len(modules) - 1, 1), 12)).astype(int))
    rng = np.random.default_rng(seed)
    theta = gates.start(k)
    ascent = Ascent(len(modules), 0.1)
    for step in track(range(steps), "mask", progress):
        size = int(rng.choice(sizes)) if k is None else k
        # noise that dies out lets neighbours of the boundary change places
        noise = 0.3 * max(0.0, 1 - step / (0.7 * steps)) * rng.gumbel(size=len(modules))
        rows = [int(i) for i in rng.permutation(len(task))[:sample]]
        theta = theta + ascent.step(gates.gradient(gates.largest(theta + noise, size), rows))
        theta = theta - theta.mean()
        if k is not None and step % 10 == 9:
            gates.consider(gates.largest(theta, k))
    if k is None:
        return theta
    gates.consider(gates.largest(theta, k))
    gates.exchange(swaps)
    # the chosen set first, in the order of its gates
    inside = np.isin(np.arange(len(modules)), gates.best)
    return theta - theta.min() + inside * (1 + theta.max() - theta.min())


class _Gates:
    """The search's state: what a set is worth on all questions, and the best set so far."""

    def __init__(self, pair: Pair, task: Task, modules: Sequence[str], kv: KV, batch_size: int) -> None:
        self.pair, self.task, self.modules, self.kv, self.batch_size = pair, task, list(modules), kv, batch_size
        self.changes = WeightChanges(pair, modules, kv).keep()
        self.best: tuple[int, ...] = ()
        self.worth = -np.inf
        self.known: dict[tuple[int, ...], float] = {}

    def largest(self, theta: Floats, size: int) -> tuple[int, ...]:
        return tuple(sorted(int(i) for i in np.argsort(-theta, kind="stable")[:size]))

    def gradient(self, chosen: tuple[int, ...], rows: list[int]) -> Floats:
        names = [self.modules[i] for i in chosen]

        def now() -> Floats:
            with Graft(names, kv=self.kv).applied(self.pair):
                return weight_effects(self.changes, self.task.subset(rows), self.batch_size)[0]

        return kept({"gradient at": names, "questions": rows}, now)

    def consider(self, chosen: tuple[int, ...]) -> bool:
        """Keep a set if it is the best so far."""
        if chosen not in self.known:
            names = [self.modules[i] for i in chosen]

            def now() -> Floats:
                with Graft(names, kv=self.kv).applied(self.pair):
                    return gold_scores(self.pair.target, self.task, 4 * self.batch_size)[1].mean(keepdims=True)

            self.known[chosen] = float(kept({"worth of": names}, now)[0])
        if self.known[chosen] <= self.worth:
            return False
        self.best, self.worth = chosen, self.known[chosen]
        return True

    def start(self, k: int | None) -> Floats:
        """First-order effects at the target, or their mean along the path, in units of the largest: the better one."""
        everything, points = list(range(len(self.task))), 4
        starts = [self.gradient((), everything)]
        path = np.zeros(len(self.modules))
        for point in range(points):
            path += kept({"path at": point}, partial(self._along, (point + 0.5) / points)) / points
        starts.append(path)
        chosen = starts[-1]
        if k is not None:
            for effect in starts:
                if self.consider(self.largest(effect, k)):
                    chosen = effect
        return np.asarray(chosen / max(float(np.abs(chosen).max()), 1e-12))

    def _along(self, strength: float) -> Floats:
        """The gradient with every module at a strength."""
        with Graft(self.modules, strength, kv=self.kv).applied(self.pair):
            return weight_effects(self.changes, self.task, self.batch_size)[0]

    def exchange(self, tries: int) -> None:
        """Exchange a module inside the best set for one outside while that helps, the most promising pairs first."""
        left = tries
        while left > 0:
            effect = self.gradient(self.best, list(range(len(self.task))))
            inside = sorted(self.best, key=lambda i: effect[i])
            outside = sorted(set(range(len(self.modules))) - set(self.best), key=lambda i: -effect[i])
            # as many as can be tried are among these
            first = range(min(left, len(inside))), range(min(left, len(outside)))
            pairs = sorted(((a, b) for a in first[0] for b in first[1]), key=lambda p: (p[0] + p[1], p[0]))
            for a, b in pairs[:left]:
                left -= 1
                if self.consider(tuple(sorted({*self.best, outside[b]} - {inside[a]}))):
                    break
            else:
                return


class Ascent:
    """Gradient ascent with momentum; a step has one length for all modules, so that small effects stay small."""

    def __init__(self, size: int, rate: float) -> None:
        self.rate, self.count, self.square = rate, 0, 0.0
        self.mean = np.zeros(size)

    def step(self, gradient: Floats) -> Floats:
        """What to add after one gradient: its running mean over its running root mean square."""
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.95 * self.square + 0.05 * float(np.square(gradient).mean())
        size = np.sqrt(self.square / (1 - 0.95**self.count))
        return np.asarray(self.rate * self.mean / (1 - 0.9**self.count) / (size + 1e-12))
