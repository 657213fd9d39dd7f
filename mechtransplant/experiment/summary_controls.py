"""The part of a run's page about controls: where a graft stands among them, in words and in a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mechtransplant.experiment.findings import Findings
from mechtransplant.experiment.jobs import WEIGHTS
from mechtransplant.experiment.make_up import others_make_up
from mechtransplant.experiment.random_weights import drawn_beside
from mechtransplant.experiment.words import head_of, interval_of, percent, range_of, row_of

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


#: how random sets are matched in depth, in words; with ``random_match: projection``, of each projection
_DEPTHS = {
    "thirds": "as many in each third of the layers",
    "halves": "as many in each half of the layers",
    "not matched": "depth not matched: too few different sets",
}


def verdict(run: Run, rule: str, findings: Findings) -> str:
    """One plain sentence: where a rule's graft stands among matched random sets on ``test``, and its whole curve."""
    graft, outcome = findings.grafts[rule][run.budget], findings.outcomes[rule][run.budget]
    ranks, curve = outcome.controls, outcome.curve
    if ranks is None:
        if rule not in run.config.with_controls:
            return f"`{rule}` has no random sets of its own (`controlled` names the rules that have)."
        none = "no other set has this make-up" if run.config.random_sets else "no random set was asked for"
        if len(graft) == len(run.candidates):
            none = "all candidates are grafted, so that it selects nothing"
        said = f"no matched random set at K = {len(graft)}: {none}"
        if curve is not None:
            said += f"; over the whole K-curve p = {curve.p_value:.2g} ({curve.n} random orders, max-statistic)"
        return f"`{rule}` has {said}.{_against_weights(run, rule, findings)}"
    sets = run.controls.sets(rule, len(graft))
    fits = bool(run.rankings.strengths(rule, len(graft)))
    what = " with its strengths dealt anew" if fits else ""
    said = (
        f"`{rule}` beats {ranks.beaten} of {ranks.n} matched random sets{what} at K = {len(graft)} "
        f"({_matched(run, sets.depth)}; one-sided permutation p = {ranks.p_value:.2g}, of which the smallest possible "
        f"is {1 / (ranks.n + 1):.2g})"
    )
    if curve is not None:
        said += f"; over the whole K-curve p = {curve.p_value:.2g} ({curve.n} random orders, max-statistic)"
    more = others_make_up(run.pair, list(graft.modules), sets.sets, run.config.random_match)
    more += _against_unrelated(run, rule, findings)
    more += _against_refitted(rule, findings) if fits else ""
    return f"{said}.{more}{_against_tuned(run, rule, findings)}{_against_weights(run, rule, findings)}"


def _matched(run: Run, depth: str) -> str:
    """How random sets are matched beside kind and parameters."""
    if run.config.random_match == "size":
        return _DEPTHS[depth]
    return "of each projection " + _DEPTHS[depth].replace("depth not", "as many, depth not")


def _against_tuned(run: Run, rule: str, findings: Findings) -> str:
    """Where a graft stands among random sets at the strength that suits those best on ``choose``; else a warning where
    its own was chosen."""
    row = findings.headline(rule)
    n = row.get("tuned_n")
    if n is None or math.isnan(n):
        if run.config.strengths == (1.0,):
            return ""
        return (
            f" Random sets have its strength, {row.strength:g}, which was chosen for it: `random_strengths` measures "
            "them at the one that suits them best as well."
        )
    if row.tuned_strength == row.strength:
        return " On `choose` its strength suits random sets best as well."
    return (
        f" At strength {row.tuned_strength:g}, which suits random sets best on `choose`, it beats "
        f"{row.tuned_beaten:.0f} of {n:.0f} of the random sets (median {percent(row.tuned_median)}, "
        f"p = {row.tuned_p_value:.2g}){_by_nats(row, 'tuned')}."
    )


def _against_unrelated(run: Run, rule: str, findings: Findings) -> str:
    """Whether modules that the rule picks on another task do as well; nothing where none were picked."""
    row = findings.headline(rule)
    beaten = row.get("unrelated_beaten")
    if beaten is None or math.isnan(beaten) or run.other is None:
        return ""
    shared = ""
    if not math.isnan(row.get("unrelated_shared", math.nan)):
        shared = f"shares {row.unrelated_shared:.0f} of its {row.k:.0f} modules with it"
        if not math.isnan(row.get("random_shared", math.nan)):
            shared += f" (random sets {row.random_shared:g} in the median)"
        shared += ", "
    return (
        f" What it picks on `{run.other.name}` {shared}reaches {percent(row.unrelated)} and beats {beaten:.0f} of "
        f"these sets; of the questions on which the two grafts differ its own has {row.unrelated_gained:.0f} right and "
        f"the other {row.unrelated_lost:.0f} (exact McNemar p = {row.unrelated_p_value:.2g})."
    )


def _by_nats(row: pd.Series, controls: str) -> str:
    """Where it stands among the same controls by the gold answer's log-probability."""
    beaten, p = (row.get(f"{controls}_{name}_log_probability") for name in ("beaten", "p_value"))
    return "" if beaten is None or math.isnan(beaten) else f", and by log-probability {beaten:.0f} (p = {p:.2g})"


def _against_weights(run: Run, rule: str, findings: Findings) -> str:
    """Where a graft of the largest changes, or directions, stands among as many at random; else nothing."""
    row = findings.headline(rule)
    n = row.get("weights_n")
    if n is None or math.isnan(n):
        return ""
    beside, graft = drawn_beside(run.config.operator), findings.grafts[rule][run.budget]
    return (
        f" It beats {row.weights_beaten:.0f} of {n:.0f} grafts of the same modules that {beside.does}, drawn at random "
        f"({beside.by}at strength {row.weights_strength:.3g}, the best on `choose`; p = {row.weights_p_value:.2g}, of "
        f"which the smallest possible is {1 / (n + 1):.2g}){_by_nats(row, 'weights')}.{beside.note(graft, run.pair)}"
    )


def _against_refitted(rule: str, findings: Findings) -> str:
    """Where a graft of fitted strengths stands among random sets whose strengths were fitted too, which is fair."""
    alone = (
        " Those strengths were not fitted to these sets, so this does not separate the choice of modules from the fit."
    )
    row = findings.headline(rule)
    n = row.get("refitted_n")
    if n is None or math.isnan(n):
        return alone
    return (
        f"{alone} With strengths fitted to them in as many steps, it beats {row.refitted_beaten:.0f} of {n:.0f} of "
        f"them (p = {row.refitted_p_value:.2g}, of which the smallest possible is {1 / (n + 1):.2g})."
    )


def against_lowest(run: Run, results: pd.DataFrame, findings: Findings) -> str:
    """A sentence where the modules that the headline ranks lowest do better than its highest; else nothing."""
    headline = run.config.rules[0]
    k, after = len(findings.grafts[headline][run.budget]), findings.outcomes[headline][run.budget].after_accuracy
    rows = results[(results.role == "bottom") & (results["rule"] == headline) & (results.budget == run.budget)]
    if rows.empty or rows.accuracy.iloc[0] <= after:
        return ""
    return f" The {k} modules that it ranks lowest reach {percent(rows.accuracy.iloc[0])}, its graft {percent(after)}."


_ROLES = {
    "target": "target",
    "source": "source",
    "graft": "target + the graft: K = {k} at strength {strength:g}",
    "bottom": "target + the {k} lowest-ranked",
    "unrelated": "target + the {k} highest-ranked on `{other}`",
    "all": "target + all {all}",
    "reverse": "source + the target's own {k} (reverse)",
    "self": "target + its own {k} (self)",
}


def controls_of(run: Run, results: pd.DataFrame, findings: Findings) -> list[str]:
    headline, budget = run.config.rules[0], run.budget
    graft = findings.grafts[headline][budget]
    k, strength = len(graft), run.chosen[headline][budget][1]
    rows = results[(results.split == "test") & (results.budget == budget) & results.rule.isin(["", headline])]
    other = "" if run.other is None else run.other.name
    lines = ["", "## Controls", "", *head_of(["", "accuracy", "95 % interval"])]
    for role, label in _ROLES.items():
        found = rows[rows.role == role]
        if role in ("graft", "all"):
            found = found[(found.strength == strength) & ((found.k == k) | (role == "all"))]
        if len(found):
            row = found.iloc[0]
            said = label.format(k=k, strength=strength, all=len(run.candidates), other=other)
            if role == "all" and (strength != 1 or graft.operator.name != "replace"):
                said += f" at strength {strength:g} ({graft.operator.name})"
            lines.append(row_of([said, percent(row.accuracy), interval_of((row.low, row.high))]))
    drawn = rows[(rows.role == "random") & (rows.k == k) & (rows.strength == strength)]
    drawn = drawn[drawn.set.str.startswith("set")]
    if len(drawn):
        said = f"target + random, {len(drawn)} matched sets of {k}: median (lowest – highest)"
        lines.append(row_of([said, range_of(drawn.accuracy), ""]))
    again = rows[(rows.role == "random") & rows.set.str.startswith("refitted")]
    if len(again):
        said = f"the same, {len(again)} of them with strengths fitted to them: median (lowest – highest)"
        lines.append(row_of([said, range_of(again.accuracy), ""]))
    tuned = rows[(rows.role == "random") & rows.set.str.startswith("tuned") & (rows.strength != strength)]
    if len(tuned):
        said = f"target + the same random sets at strength {tuned.strength.iloc[0]:g}, which suits them best on "
        said += "choose: median (lowest – highest)"
        lines.append(row_of([said, range_of(tuned.accuracy), ""]))
    weights = rows[rows.role == WEIGHTS]
    if len(weights):
        what = drawn_beside(run.config.operator).drawn
        said = f"target + as many random {what}, {len(weights)} draws at strength "
        said += f"{weights.strength.iloc[0]:.3g}: median (lowest – highest)"
        lines.append(row_of([said, range_of(weights.accuracy), ""]))
    same = self_graft_is_identical(run)
    if same is not None:
        lines += ["", f"The self-graft's answers and log-probabilities are {'' if same else 'NOT '}bit-identical."]
    wanted = run.config.controls if headline in run.config.with_controls else ()
    if k == len(run.candidates) and {"bottom", "unrelated"} & {*wanted}:
        lines += ["", "All candidates are grafted: the lowest-ranked, and another task's, would be the same graft."]
    left_out = [c for c in ("bottom", "reverse", "unrelated", "self") if c not in wanted]
    if left_out:
        lines += ["", f"Left out, as the config asked: {', '.join(left_out)}."]
    if "unrelated" in wanted and run.other is None:
        lines += ["", "No unrelated ranking: the pair names no other task (give `unrelated:`)."]
    elif "unrelated" in wanted and not run.controls.has_unrelated(headline):
        lines += ["", f"No unrelated ranking: `{headline}` looks at no task."]
    return lines


def self_graft_is_identical(run: Run) -> bool | None:
    """Whether the target with its own modules grafted answers exactly as the target, to the last bit of every
    log-probability; None where it was not asked."""
    found = run.rows.where(split="test", role="self")
    if not found:
        return None
    return all(r["digest"] == r["beside"] for r in found)
