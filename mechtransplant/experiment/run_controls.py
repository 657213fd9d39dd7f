"""The controls of a run's rules: random sets and orders, the lowest-ranked, another task's, reverse and self.

A rule that fits strengths has two kinds of random sets: all have its own strengths, dealt anew within classes of
modules; ``refitted_sets`` of them are measured again with strengths that are fitted to them as the rule fits its own.

Random sets have the graft's strength, which was chosen for the graft. With ``random_strengths`` the strength that suits
three of them best on ``choose`` is found, and all are measured at that one too.

A graft that keeps a part of every module's change has ``random_weights`` too (see the file of that name).
"""

from __future__ import annotations

from dataclasses import replace
from math import fsum, isfinite
from typing import TYPE_CHECKING, Any

from mechtransplant.controls import RandomOrders, RandomSets, deal, random_matched, random_orders
from mechtransplant.errors import UsageError
from mechtransplant.experiment.jobs import WEIGHTS, Job
from mechtransplant.experiment.random_weights import RandomDirections, RandomNumbers, random_weights
from mechtransplant.experiment.rankings import strengths_in
from mechtransplant.ranking import get_rule
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


#: random sets that strengths are tried on
TRIED = 3


class Controls:
    """What a run's grafts are compared with, as jobs; K and strength are those that each rule chose."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self._weights: dict[str, RandomNumbers | RandomDirections] = {}

    def sets(self, rule: str, k: int) -> RandomSets:
        """Random sets matched to a rule's K modules."""
        run, config = self.run, self.config
        chosen, match = run.rankings.top(rule, k), config.random_match
        return random_matched(run.pair, chosen, config.random_sets, config.seed + k, config.kv, match)

    def in_sets(self, rule: str, k: int, strength: float) -> list[Job]:
        """Those sets, with the rule's strengths dealt anew where it fits some."""
        run, found = self.run, self.sets(rule, k)
        own = run.rankings.strengths(rule, k)
        dealt: list[tuple[float, ...]] = [()] * len(found.sets)
        if own:
            dealt = deal(run.pair, run.rankings.top(rule, k), own, found.sets, self.config.random_match)
        return [
            Job("random", rule, drawn, strength, theirs, set=f"set-{number}", depth=found.depth)
            for number, (drawn, theirs) in enumerate(zip(found.sets, dealt, strict=True))
        ]

    def curves(self, rule: str) -> tuple[list[dict[int, tuple[str, ...]]], str]:
        """(random curves, each K → a set matched to the rule's own; how depth was matched).

        They are the beginnings of random orders; a rule that is learned for one K has orders of its own at each.
        """
        run, config, chosen = self.run, self.config, self.run.chosen[rule][self.run.budget][0]
        sizes = [k for k in run.counts if k < len(run.candidates)]
        orders: dict[int, RandomOrders] = {}
        for k in sizes:
            order = list(map(str, run.rankings.frame(rule, k).module))
            strictest = k if run.rankings.by_k(rule) else chosen
            known = next((o for size, o in orders.items() if not run.rankings.by_k(rule)), None)
            orders[k] = known or random_orders(
                run.pair, order, config.curve_sets, strictest, config.seed, config.kv, config.random_match
            )
        curves = [{k: orders[k].orders[i][:k] for k in sizes} for i in range(config.curve_sets)]
        return curves, ", ".join(dict.fromkeys(o.depth for o in orders.values()))

    def along(self, rule: str) -> list[list[Job]]:
        """The random curves as jobs, one list an order, K ascending."""
        strength, (curves, depth) = self.run.chosen[rule][self.run.budget][1], self.curves(rule)
        # an order has a module of the same class at every place, so that strengths keep theirs
        return [
            [
                Job(
                    "random", rule, drawn, strength, self.run.rankings.strengths(rule, k),
                    set=f"order-{number}", depth=depth,
                )
                for k, drawn in curve.items()
            ]
            for number, curve in enumerate(curves)
        ]  # fmt: skip

    def refitted(self, rule: str) -> list[Job]:
        """The first random sets of the reported K, each with strengths fitted to it; [] of a rule that fits none."""
        k, strength = self.run.chosen[rule][self.run.budget]
        if not self.config.refitted_sets or not self.run.rankings.strengths(rule, k):
            return []
        found = self.sets(rule, k)
        return [
            Job(
                "random", rule, drawn, strength, self.run.rankings.refitted(rule, k, number, drawn),
                set=f"refitted-{number}", depth=found.depth,
            )
            for number, drawn in enumerate(found.sets[: self.config.refitted_sets])
        ]  # fmt: skip

    def tuned_on_choose(self) -> list[Job]:
        """Three random sets of every rule's reported graft, at every strength that may suit them better."""
        jobs: list[Job] = []
        for rule in self.config.with_controls if self.config.random_strengths else ():
            k, own = self.run.chosen[rule][self.run.budget]
            for strength in dict.fromkeys((own, *self.config.random_strengths)):
                jobs += self._tuned(self.in_sets(rule, k, strength)[:TRIED])
        return jobs

    def tuned(self, rule: str) -> list[Job]:
        """The random sets of a rule's reported graft at the strength that suits them best on ``choose``.

        [] where none is asked for; where it is the graft's own, they are its random sets.
        """
        if not self.config.random_strengths or rule not in self.config.with_controls:
            return []
        k, own = self.run.chosen[rule][self.run.budget]
        rows = self.run.rows.where(role="random", split="choose", budget=self.run.budget, rule=rule)
        by: dict[float, list[float]] = {}
        for row in rows:
            by.setdefault(row["strength"], []).append(row[self.config.choose_by])
        if not by:
            return []
        # exact sums: equal numbers of right answers are equal
        sums = {strength: total for strength, values in by.items() if isfinite(total := fsum(values))}
        if not sums:
            raise UsageError(
                f"random_strengths: random sets of {rule} overflow on choose at every strength: give smaller ones"
            )
        best = max(sums, key=lambda strength: (sums[strength], strength == own))
        return self._tuned(self.in_sets(rule, k, best))

    @staticmethod
    def _tuned(jobs: list[Job]) -> list[Job]:
        return [replace(job, set=job.set.replace("set", "tuned")) for job in jobs]

    def _drawn(self, rule: str) -> RandomNumbers | RandomDirections:
        """What a rule's reported graft has beside it; remembered, because counting changes reads all numbers."""
        if rule not in self._weights:
            modules = self.run.rankings.top(rule, self.run.chosen[rule][self.run.budget][0])
            self._weights[rule] = random_weights(rule, modules, self.config.kv, self.config.operator, self.run.pair)
        return self._weights[rule]

    def weights(self, rule: str, strength: float, numbers: range) -> list[Job]:
        """The rule's chosen modules with as many of their changes as the operator keeps, drawn at random."""
        k = self.run.chosen[rule][self.run.budget][0]
        modules, own = self.run.rankings.top(rule, k), self.run.rankings.strengths(rule, k)
        drawn = self._drawn(rule)
        return [
            Job(
                WEIGHTS, rule, modules, strength, own, set=f"weights-{number}",
                operator=drawn.operator(self.config.seed + number),
            )
            for number in numbers
        ]  # fmt: skip

    def weights_on_choose(self) -> list[Job]:
        """One draw at every strength."""
        jobs: list[Job] = []
        for rule in self.config.with_controls if self.config.random_weights else ():
            scales = self._drawn(rule).scales
            strengths = dict.fromkeys(strength * scale for scale in scales for strength in self.config.strengths)
            jobs += [job for strength in strengths for job in self.weights(rule, strength, range(1))]
        return jobs

    def reported_weights(self, rule: str) -> list[Job]:
        """Other draws at the strength that was best on ``choose``; [] where none are wanted."""
        if not self.config.random_weights or rule not in self.config.with_controls:
            return []
        by = self.config.choose_by
        rows = self.run.rows.where(role=WEIGHTS, split="choose", budget=self.run.budget, rule=rule)
        rows = [row for row in rows if isfinite(row[by])]
        if not rows:
            raise UsageError(f"strengths: all random draws beside {rule} overflow on choose: give smaller ones")
        best = min(rows, key=lambda row: (-row[by], row["strength"]))
        return self.weights(rule, best["strength"], range(1, self.config.random_weights + 1))

    def random(self, rule: str) -> list[Job]:
        """Random orders for the whole curve, and random sets at the K that are reported."""
        jobs = [job for curve in self.along(rule) for job in curve]
        for k, strength in dict.fromkeys(self.run.chosen[rule].values()):
            jobs += self.in_sets(rule, k, strength)
        return [*jobs, *self.refitted(rule), *self.tuned(rule), *self.reported_weights(rule)]

    def others(self) -> list[Job]:
        """Bottom, unrelated, reverse and self."""
        run, config = self.run, self.config
        jobs: list[Job] = []
        for rule in config.with_controls:
            k, strength = run.chosen[rule][run.budget]
            ranked, order = run.ranked(rule, k, strength), run.rankings.frame(rule, k)
            # of everything the lowest-ranked are the highest-ranked, whatever the task
            some = k < len(run.candidates)
            if "bottom" in config.controls and some:
                lowest = order[::-1]
                jobs.append(Job("bottom", rule, tuple(lowest.module[:k]), strength, strengths_in(lowest, k)))
            names = self.elsewhere(rule, k)
            if names is not None:
                jobs.append(Job("unrelated", rule, tuple(names.module[:k]), strength, strengths_in(names, k)))
            if "reverse" in config.controls:
                jobs.append(Job("reverse", rule, ranked.modules, strength, ranked.strengths, "reverse"))
            if "self" in config.controls and rule == config.rules[0]:
                jobs.append(Job("self", rule, ranked.modules, strength, ranked.strengths, "self"))
        return jobs

    def elsewhere(self, rule: str, k: int) -> pd.DataFrame | None:
        """A rule's ranking on the unrelated task, as it is for a K; None where there is no such control."""
        other = self.run.other
        if not self.has_unrelated(rule) or other is None or k == len(self.run.candidates):
            return None
        return self.run.rankings.unrelated(rule, other.split(**self._other_sizes(other)), k)

    def has_unrelated(self, rule: str) -> bool:
        """Whether a ranking on another task is wanted, and would be another one."""
        needs = get_rule(rule).needed(self.config.options_of(rule))
        return "unrelated" in self.config.controls and needs != "nothing"

    def _other_sizes(self, other: Task) -> dict[str, Any]:
        """As many questions of the unrelated task as of the run's own, or what it has."""
        sizes = {key: getattr(self.config.split, key) for key in ("discover", "choose")}
        scale = min(1.0, (len(other.askable) - 1) / sum(sizes.values()))
        return {key: max(1, int(n * scale)) for key, n in sizes.items()} | {"test": 1, "seed": self.config.split.seed}
