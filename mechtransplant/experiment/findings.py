"""What a run found, rule by rule: the graft that each chose, its outcome, and where it stands among its controls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.evaluation import Evaluation, Outcome, compare
from mechtransplant.grafting import Graft
from mechtransplant.ranking import get_rule
from mechtransplant.significance import CurveRank, curve_rank

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


@dataclass(frozen=True)
class Findings:
    """Per rule and token budget the chosen graft and its outcome; ``table`` has one row each."""

    grafts: dict[str, dict[int, Graft]]
    outcomes: dict[str, dict[int, Outcome]]
    table: pd.DataFrame


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
    top, test = run.rankings.top(rule, k), run.splits.test
    strengths = run.rankings.strengths(rule, k)
    graft = run.cells.graft(top, strength, strengths)
    controls = []
    if rule in run.config.with_controls:
        controls = [_drawn(run, rule, drawn, strength)[budget] for drawn in run.random_sets(rule, k).sets]
    outcome = compare(
        run.baselines["target"][budget],
        run.baselines["source"][budget],
        run.cells.cell(test, "graft", top, strength, strengths=strengths)[budget],
        seed=run.config.seed,
        controls=controls,
        graft=graft,
        pair=run.pair,
    )
    return graft, outcome


def _drawn(run: Run, rule: str, modules: tuple[str, ...], strength: float) -> dict[int, Evaluation]:
    """A random set's evaluation on ``test``."""
    strengths = run.dealt(rule, modules)
    return run.cells.cell(run.splits.test, "random", modules, strength, whole=False, strengths=strengths)


def _curve(run: Run, rule: str) -> CurveRank | None:
    """The rule's K-curve on ``test`` among those of its random orders, at the largest budget."""
    ks = [k for k in run.counts if k < len(run.candidates)]
    if rule not in run.config.with_controls or not run.config.curve_sets or not ks:
        return None
    strength, test = run.chosen[rule][run.budget][1], run.splits.test
    own = [(run.rankings.top(rule, k), run.rankings.strengths(rule, k)) for k in ks]
    heights = [run.cells.cell(test, "graft", top, strength, strengths=s)[run.budget].accuracy for top, s in own]
    controls = [
        [_drawn(run, rule, drawn[k], strength)[run.budget].accuracy for k in ks] for drawn in run.random_curves(rule)[0]
    ]
    everything = run.cells.cell(test, "all", run.candidates, strength)[run.budget].accuracy
    ends = (run.baselines["target"][run.budget].accuracy, everything)
    return curve_rank(ks, heights, controls, len(run.candidates), ends)


def _refitted(run: Run, modules: tuple[str, ...], strength: float, strengths: tuple[float, ...]) -> float:
    """Accuracy on ``test`` of a random set whose strengths were fitted to it."""
    found = run.cells.cell(run.splits.test, "random", modules, strength, whole=False, strengths=strengths)
    return found[run.budget].accuracy


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
    change, ranks, curve = outcome.log_probability, outcome.controls, outcome.curve
    found["log_probability_change"] = None if change is None else change.change
    for name in ("n", "beaten", "p_value", "median", "low", "high"):
        found[f"random_{name}"] = None if ranks is None else getattr(ranks, name)
    more = outcome.log_probability_controls
    found["random_p_value_log_probability"] = None if more is None else more.p_value
    found["curve_area"] = None if curve is None else curve.area
    found["curve_p_area"] = None if curve is None else curve.area_rank.p_value
    found["curve_p_max"] = None if curve is None else curve.p_value
    found["curve_n"] = None if curve is None else curve.n
    if budget == run.budget and run.config.refitted_sets and rule in run.config.with_controls:
        drawn = run.refitted(rule, len(graft))
        again = [_refitted(run, modules, found["strength"], strengths) for modules, strengths in drawn]
        found["refitted_n"], found["refitted_beaten"] = len(again), sum(a < outcome.after_accuracy for a in again)
        found["refitted_median"] = float(np.median(again)) if again else None
    for role in ("bottom", "unrelated", "reverse"):
        at = run.rows.where(split="test", role=role, rule=rule, budget=budget)
        found[role] = at[0]["accuracy"] if at and budget == run.budget else None
    return found
