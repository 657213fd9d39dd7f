"""One strength a module, fitted by gradient ascent: of given modules, or of those that are left as others are dropped.

L, the mean log-probability of the gold answer with every module m grafted at its own strength λ_m, has the derivative
∂L/∂λ_m = ⟨∂L/∂W_m, W_source − W_target⟩. Adam (Kingma and Ba 2015) climbs it over samples of the questions. No weight
is trained: what is fitted is one number a module, on questions of ``discover``, and it says how much of a change that
the source made is wanted when its other changes are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError, check_count, check_seed, finite_number
from mechtransplant.grafting import KV, Graft
from mechtransplant.progress import track
from mechtransplant.ranking.registry import Fitted, Kinds, register_rule
from mechtransplant.ranking.sensitivity import WeightChanges, weight_effects
from mechtransplant.ranking.steps import kept
from mechtransplant.selection import remembering, selections_of
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import Pair

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: strengths stay between these: below the first a module does nothing, and far above 1 the straight line means little
LEAST, MOST = 0.01, 5.0
#: Adam's decay of the gradients' mean and square: short, since there are few steps
DECAYS = (0.8, 0.95)


class Climb:
    """Strengths of modules on their way up; ``values`` are 0 for modules that were dropped, ``last`` what they had."""

    def __init__(
        self,
        pair: Pair,
        task: Task,
        modules: Sequence[str],
        sample: int,
        rate: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.pair, self.task, self.modules, self.batch_size = pair, task, list(map(str, modules)), batch_size
        self.sample, self.rate, self.rng = min(sample, len(task)), rate, np.random.default_rng(seed)
        self.changes = WeightChanges(pair, self.modules).keep()
        self.values = self.last = np.ones(len(self.modules))
        self.mean, self.square = np.zeros_like(self.values), np.zeros_like(self.values)
        #: running mean of λ ∂L/∂λ: to first order, what dropping a module would lose
        self.loss = np.zeros_like(self.values)
        self.count = 0

    @property
    def alive(self) -> Bools:
        """Which modules were not dropped."""
        return np.asarray(self.values > 0)

    def step(self) -> None:
        """One step of Adam on a sample of the questions."""
        rows = sorted(int(i) for i in self.rng.permutation(len(self.task))[: self.sample])
        gradient = kept({"strengths": [float(v) for v in self.values], "questions": rows}, lambda: self._gradient(rows))
        self.count += 1
        first, second = DECAYS
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient**2
        self.loss = 0.7 * self.loss + 0.3 * gradient * self.values
        moved = self.mean / (1 - first**self.count) / (np.sqrt(self.square / (1 - second**self.count)) + 1e-8)
        self.values = np.where(self.alive, np.clip(self.values + self.rate * moved, LEAST, MOST), 0.0)
        self.last = np.where(self.alive, self.values, self.last)

    @property
    def importance(self) -> Floats:
        """What a module does at its strength λ, shape (modules,), in nats: |λ ∂L/∂λ| + λ √mean((∂L/∂λ)²).

        At the top of the climb the first is 0 whatever the module does, and the second is not: samples differ.
        """
        spread = np.sqrt(self.square / (1 - DECAYS[1] ** max(1, self.count)))
        return np.asarray(np.abs(self.loss) + spread * self.values)

    def drop(self, gone: Bools) -> None:
        """Leave modules out from now on."""
        self.values = np.where(gone, 0.0, self.values)

    def _gradient(self, rows: list[int]) -> Floats:
        names = [m for m, alive in zip(self.modules, self.alive, strict=True) if alive]
        with Graft(names, list(self.values[self.alive])).applied(self.pair):
            return weight_effects(self.changes, self.task.subset(rows), self.batch_size)[0]


def fit_strengths(
    pair: Pair,
    task: Task,
    modules: Sequence[str],
    *,
    steps: int = 48,
    sample: int = 16,
    rate: float = 0.15,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> pd.Series:
    """One strength a module that raises the gold answer's log-probability when all are grafted together.

    Args:
        task: the ``discover`` split: what strengths were fitted to cannot report.
        modules: for example the first K of a ranking.
        steps: of gradient ascent, each one forward and one backward pass over ``sample`` questions.
        rate: the length of a step.

    Returns:
        strengths by module, from 0.01 to 5, for ``Graft(modules, strengths)``.

    Raises:
        UsageError: no modules, a test split, or counts that make no sense.
    """
    import pandas as pd

    _check(task, steps=steps, sample=sample, batch_size=batch_size, rate=rate, seed=seed)
    names = list(dict.fromkeys(modules))
    if not names:
        raise UsageError("no modules were named: give those whose strengths are wanted")
    climb = Climb(pair, task, names, sample, rate, batch_size, seed)
    for _ in track(range(steps), "strengths", progress):
        climb.step()
    # the names remember these questions, and those that ranked them
    seen = {q for selection in selections_of(names) for q in selection.questions} | set(task.keys)
    return pd.Series(
        climb.values, index=pd.Index(remembering(names, seen), dtype=object, name="module"), name="strength"
    )


def fit_as_pruned(
    pair: Pair,
    task: Task,
    modules: Sequence[str],
    seed: int,
    *,
    rounds: int = 12,
    steps: int = 3,
    settle: int = 12,
    k: int | None = None,
    share: float = 1.0,
    kv: KV = "never",
    **options: Any,
) -> pd.Series:
    """Strengths of given modules, after as many steps as the rule ``pruned`` takes with these options.

    ``k``, ``share`` and ``kv`` are about which modules, and change nothing here.
    """
    return fit_strengths(pair, task, modules, steps=rounds * steps + settle, seed=seed, **options)


@register_rule(
    "pruned",
    "λ maximises L(target with every m at λ_m) by ∂L/∂λ_m = ⟨∂L/∂W_m, ΔW_m⟩, while the m of least effect are dropped",
    needs="gradients",
    cost="`rounds` × `steps` + `settle` forward and backward passes over `sample` questions",
    sign="it stayed long; beside scores it gives every module a strength",
    refit=fit_as_pruned,
)
def pruned(
    pair: Pair,
    task: Task,
    kind: Kinds,
    *,
    k: int | None = None,
    share: float = 1.0,
    rounds: int = 12,
    steps: int = 3,
    settle: int = 12,
    sample: int = 16,
    rate: float = 0.15,
    kv: KV = "never",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Fitted:
    """Everything grafted, then module after module dropped while the strengths of those that stay are fitted.

    From all modules at strength 1 down to ``k`` (1 without it), which together have at most a ``share`` of the
    parameters: below 1, what a module does is weighed against the root of its size. A module that was dropped has the
    strength that it had then.
    """
    modules = pair.modules(kind)
    if kv != "never" and any(pair.layout.check(m).kind == "head" for m in modules):
        raise UsageError(
            "heads that share K and V cannot move them at strengths of their own: fit strengths with kv='never'"
        )
    _check(task, sample=sample, batch_size=batch_size, rate=rate, seed=seed)
    if k is not None and k > len(modules):
        raise UsageError(f"k = {k} is above the {len(modules)} modules: ask for at most that many")
    sizes = np.array([Graft([m]).parameter_count(pair) for m in modules])
    wanted = k or 1
    if not 0 < finite_number("share", share) <= 1 or np.sort(sizes)[:wanted].sum() > share * sizes.sum():
        raise UsageError(f"share: no {wanted} modules have together at most {share:g} of the parameters: give more")
    climb = Climb(pair, task, modules, sample, rate, batch_size, seed)
    weight = np.sqrt(sizes) if share < 1 else np.ones(len(sizes))
    score = np.zeros(len(modules))
    for turn in track(range(rounds), "pruning", progress):
        for _ in range(steps):
            climb.step()
        done = (turn + 1) / rounds
        size = max(wanted, round(len(modules) ** (1 - done) * wanted**done))
        does = climb.importance / weight
        # in whole numbers how long it stayed, and among those that left together what it did
        score[climb.alive] = turn + 0.5 * (does / max(float(does.max()), 1e-12))[climb.alive]
        climb.drop(~_fitting(does, climb.alive, sizes, size, share**done * sizes.sum()))
    for _ in track(range(settle), "strengths", progress):
        climb.step()
    does = climb.importance / weight
    score[climb.alive] = rounds + 0.5 * (does / max(float(does.max()), 1e-12))[climb.alive]
    return Fitted(score, climb.last)


def _fitting(value: Floats, alive: Bools, sizes: NDArray[np.int64], count: int, limit: float) -> Bools:
    """``count`` modules, or all that are alive, of high value that have together at most ``limit`` numbers.

    By value, passing over those after which the smallest others would not fit any more.
    """
    stay, left = np.zeros(len(value), dtype=bool), [int(i) for i in np.argsort(-value, kind="stable") if alive[i]]
    missing = min(count, len(left))
    # modules have few sizes, and neurons are thousands: how many of each are left is enough
    each, waiting = np.unique(sizes[left], return_counts=True)

    def smallest(wanted: int) -> float:
        """What so many of the smallest that are waiting have together."""
        before = np.concatenate([[0], np.cumsum(waiting)[:-1]])
        return float((each * np.clip(wanted - before, 0, waiting)).sum())

    room = max(limit, smallest(missing))
    for i in left:
        waiting[np.searchsorted(each, sizes[i])] -= 1
        if missing and sizes[i] + smallest(missing - 1) <= room:
            stay[i], missing, room = True, missing - 1, room - float(sizes[i])
    return stay


def _check(task: Task, *, rate: float, seed: int, **counts: int) -> None:
    if not isinstance(task, Task) or task.role not in ("discover", "choose"):
        raise UsageError("strengths are fitted to questions that do not report: pass task.split(…).discover")
    for name, value in counts.items():
        check_count(name, value)
    check_seed(seed)
    if finite_number("rate", rate) <= 0:
        raise UsageError(f"rate must be above 0, got {rate:g}")
