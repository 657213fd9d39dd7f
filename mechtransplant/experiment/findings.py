"""What a run found, rule by rule: the graft that each chose, its outcome, and where it stands among its controls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.evaluation import Evaluation, Outcome, compare
from mechtransplant.evaluation.outcome import UNCONTROLLED
from mechtransplant.experiment.evaluator import graft_of
from mechtransplant.experiment.jobs import Job
from mechtransplant.experiment.random_weights import drawn_beside
from mechtransplant.grafting import Graft
from mechtransplant.ranking import get_rule
from mechtransplant.significance import SAME_NATS, CurveRank, curve_rank, mcnemar_exact, rank_among

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


#: what is told of a rank among controls
_RANK = ("n", "beaten", "p_value", "median", "low", "high")


@dataclass(frozen=True)
class Findings:
    """Per rule and token budget the chosen graft and its outcome; ``table`` has one row each."""

    grafts: dict[str, dict[int, Graft]]
    outcomes: dict[str, dict[int, Outcome]]
    table: pd.DataFrame

    def headline(self, rule: str) -> pd.Series:
        """A rule's row at the largest token budget."""
        return self.table[self.table["rule"] == rule].sort_values("budget").iloc[-1]


def find(run: Run) -> Findings:
    """Compare what the run's cells hold; computes no cell."""
    import pandas as pd

    grafts: dict[str, dict[int, Graft]] = {}
    outcomes: dict[str, dict[int, Outcome]] = {}
    rows = []
    for rule in run.config.rules:
        curve = _curve(run, rule)
        for budget in run.budgets:
            graft, outcome = _outcome(run, rule, budget)
            if budget == run.budget and curve is not None:
                outcome = replace(outcome, curve=curve)
            grafts.setdefault(rule, {})[budget] = graft
            outcomes.setdefault(rule, {})[budget] = outcome
            rows.append(_row(run, rule, budget, graft, outcome))
    return Findings(grafts, outcomes, pd.DataFrame(rows))


def _outcome(run: Run, rule: str, budget: int) -> tuple[Graft, Outcome]:
    k, strength = run.chosen[rule][budget]
    test = run.splits.test
    job = run.ranked(rule, k, strength)
    graft = run.cells.graft(job.modules, strength, job.strengths)
    controls = []
    if rule in run.config.with_controls:
        controls = [run.cells.of(j.cell(test))[budget] for j in run.controls.in_sets(rule, k, strength)]
    outcome = compare(
        run.baselines["target"][budget],
        run.baselines["source"][budget],
        run.cells.of(job.cell(test))[budget],
        seed=run.config.seed,
        controls=controls,
        graft=graft,
        pair=run.pair,
    )
    if budget == run.budget and k == len(run.candidates) and run.controls.reported_weights(rule):
        # of all modules no set is random: what is, stands beside it
        does = drawn_beside(run.config.operator).does
        said = f"no random set of modules exists: compared are grafts of the same modules that {does}, drawn at random"
        notes = tuple(said if note == UNCONTROLLED else note for note in outcome.notes)
        outcome = replace(outcome, notes=notes)
    return graft, outcome


def _curve(run: Run, rule: str) -> CurveRank | None:
    """The rule's K-curve on ``test`` among those of its random orders, at the largest budget."""
    ks = [k for k in run.counts if k < len(run.candidates)]
    if rule not in run.config.with_controls or not run.config.curve_sets or not ks:
        return None
    strength, test = run.chosen[rule][run.budget][1], run.splits.test

    def height(job: Job) -> float:
        return run.cells.of(job.cell(test))[run.budget].accuracy

    heights = [height(run.ranked(rule, k, strength)) for k in ks]
    controls = [[height(job) for job in curve] for curve in run.controls.along(rule)]
    everything = height(Job("all", "", tuple(run.candidates), strength))
    ends = (run.baselines["target"][run.budget].accuracy, everything)
    return curve_rank(ks, heights, controls, len(run.candidates), ends)


#: how many random sets, or draws, say how far such grafts move the weights: they hardly differ
MEASURED = 10


def _moved(run: Run, rule: str, graft: Graft) -> dict[str, float]:
    """How long a graft's change of the weights is, and its random counterparts' (their median), of all there is.

    Of the difference between target and source in all candidates, whatever the operator. A length alone: a change of
    half the layers to the source's is 71 % as long as that of all, and what is left is as long.
    """
    whole = Graft(run.candidates, kv=run.config.kv).distance(run.pair)
    if whole == 0:
        return {}
    found = {"distance_share": graft.distance(run.pair) / whole}
    if rule not in run.config.with_controls:
        return found
    k, strength = run.chosen[rule][run.budget]
    controls = run.controls
    beside = {
        "random": controls.in_sets(rule, k, strength),
        "tuned": controls.tuned(rule),
        "weights": controls.reported_weights(rule),
    }
    for name, jobs in beside.items():
        grafts = [graft_of(run.config, j.modules, j.strength, j.strengths, j.operator) for j in jobs[:MEASURED]]
        if grafts:
            found[f"{name}_distance_share"] = median(g.distance(run.pair) for g in grafts) / whole
    return found


def _row(run: Run, rule: str, budget: int, graft: Graft, outcome: Outcome) -> dict[str, Any]:
    """One row of ``rules.csv``."""
    found: dict[str, Any] = {
        "rule": rule,
        "needs": get_rule(rule).needed(run.config.options_of(rule)),
        "budget": budget,
        "k": len(graft),
        "strength": run.chosen[rule][budget][1],
        "parameter_share": outcome.parameter_share,
        "target": outcome.target_accuracy,
        "source": outcome.source_accuracy,
        "after": outcome.after_accuracy,
        "n": outcome.n,
        "difference": outcome.difference,
        "difference_low": outcome.interval[0],
        "difference_high": outcome.interval[1],
        "p_mcnemar": outcome.p_value,
        "tir": outcome.tir,
        "recovery": outcome.recovery,
    }
    for name, ends in (("tir", outcome.tir_interval), ("recovery", outcome.recovery_interval)):
        found[f"{name}_low"], found[f"{name}_high"] = ends or (None, None)
    changed = graft.carried_count(run.pair)
    # a graft at strength 0 keeps nothing, by whichever operator
    if 0 < changed < graft.parameter_count(run.pair) and outcome.parameter_share is not None:
        found["changed_share"] = outcome.parameter_share * changed / graft.parameter_count(run.pair)
    if budget == run.budget:
        found |= _moved(run, rule, graft)
        if rule in run.config.with_controls:
            found |= _shared(run, rule)
    change, ranks, curve = outcome.log_probability, outcome.controls, outcome.curve
    found["log_probability_change"] = None if change is None else change.change
    for name in _RANK:
        found[f"random_{name}"] = None if ranks is None else getattr(ranks, name)
    more = outcome.log_probability_controls
    found["random_p_value_log_probability"] = None if more is None else more.p_value
    found["curve_area"] = None if curve is None else curve.area
    found["curve_p_area"] = None if curve is None else curve.area_rank.p_value
    found["curve_p_max"] = None if curve is None else curve.p_value
    found["curve_n"] = None if curve is None else curve.n
    if budget == run.budget and rule in run.config.with_controls and run.config.refitted_sets:
        jobs = run.controls.refitted(rule)
        again = [run.cells.of(job.cell(run.splits.test))[budget].accuracy for job in jobs]
        rank = rank_among(outcome.after_accuracy, again) if again else None
        for name in ("n", "beaten", "p_value", "median"):
            found[f"refitted_{name}"] = None if rank is None else getattr(rank, name)
    more_controls = {"tuned": run.controls.tuned, "weights": run.controls.reported_weights}
    for what, asked in more_controls.items() if budget == run.budget else ():
        jobs = asked(rule)
        if jobs:
            cells = [run.cells.of(job.cell(run.splits.test))[budget] for job in jobs]
            rank = rank_among(outcome.after_accuracy, [cell.accuracy for cell in cells])
            found |= {f"{what}_{name}": getattr(rank, name) for name in _RANK} | {f"{what}_strength": jobs[0].strength}
            # of free-form answers, and of draws that overflow, it is not compared
            nats = [float(c.log_probability.mean()) for c in cells if c.log_probability is not None]
            if change is not None and len(nats) == len(cells) and all(map(isfinite, nats)):
                by_nats = rank_among(change.after, nats, SAME_NATS)
                found |= {f"{what}_{name}_log_probability": getattr(by_nats, name) for name in ("beaten", "p_value")}
    for role in ("bottom", "unrelated", "reverse"):
        at = run.rows.where(split="test", role=role, rule=rule, budget=budget)
        found[role] = at[0]["accuracy"] if at and budget == run.budget else None
        if role == "unrelated" and found[role] is not None:
            found |= _specific(run, rule, at[0])
    return found


def _shared(run: Run, rule: str) -> dict[str, Any]:
    """How many of a graft's modules its random sets (in the median) and the modules picked on another task have too.

    Two halves of all modules share half of them, and grafts that are nearly one can hardly differ in what they do.
    """
    k = run.chosen[rule][run.budget][0]
    own, drawn = set(run.rankings.top(rule, k)), run.controls.sets(rule, k).sets
    found: dict[str, Any] = {"random_shared": median(len(own & set(s)) for s in drawn)} if drawn else {}
    other = run.controls.elsewhere(rule, k)
    return found if other is None else {**found, "unrelated_shared": len(own & set(other.module[:k]))}


def _specific(run: Run, rule: str, other: dict[str, Any]) -> dict[str, Any]:
    """How a graft of the modules that a rule picks on another task does, beside its random sets and its own graft.

    Layers that do as well whatever task picked them are not specific to the run's.
    """
    k, strength = run.chosen[rule][run.budget]

    def asked(job: Job) -> Evaluation:
        return run.cells.of(job.cell(run.splits.test))[run.budget]

    sets = [asked(job).accuracy for job in run.controls.in_sets(rule, k, strength)]
    own = asked(run.ranked(rule, k, strength)).correct
    theirs = np.array([bit == "1" for bit in other["correct"]])
    return {
        "unrelated_beaten": sum(other["accuracy"] > accuracy for accuracy in sets) if sets else None,
        "unrelated_gained": int((own & ~theirs).sum()),
        "unrelated_lost": int((theirs & ~own).sum()),
        "unrelated_p_value": mcnemar_exact(theirs, own),
    }
