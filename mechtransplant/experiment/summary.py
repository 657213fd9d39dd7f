"""The one-page summary of a finished run, in words and Markdown tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mechtransplant.evaluation import Outcome
from mechtransplant.experiment.config import PAPER_SHARES, RunConfig
from mechtransplant.experiment.findings import Findings
from mechtransplant.experiment.summary_controls import against_lowest, controls_of, verdict
from mechtransplant.experiment.summary_effects import side_effects_of
from mechtransplant.experiment.words import (
    RATIOS,
    counted_in_words,
    head_of,
    interval_of,
    kept_in_words,
    moved_in_words,
    percent,
    range_of,
    ratios,
    row_of,
)
from mechtransplant.grafting import Graft, get_operator
from mechtransplant.grafting.operators import options_of
from mechtransplant.ranking import get_rule

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


def selected_counts(run: Run, ks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(K, feed-forward, attention) of the K highest-ranked linear layers, as in the paper's table."""
    counts = []
    for k in ks:
        feed_forward = sum(run.pair.layout.is_feed_forward(m) for m in run.rankings.top(run.config.rules[0], k))
        counts.append((k, feed_forward, k - feed_forward))
    return counts


def summarise(
    run: Run,
    results: pd.DataFrame,
    findings: Findings,
    plane: pd.DataFrame | None = None,
    effects: pd.DataFrame | None = None,
) -> str:
    """The one-page summary, in Markdown."""
    config, headline = run.config, run.config.rules[0]
    outcomes = findings.outcomes[headline]
    explored = "" if run.explore is None else f" of {run.explore.name}"
    named = f"rule {headline}" if len(config.rules) == 1 else f"{len(config.rules)} rules"
    lines = [
        f"# {config.name}: {run.pair.name or 'pair'}, {run.task.name}, {named}",
        "",
        f"Source `{run.pair.source.name}`, target `{run.pair.target.name}`; {len(run.candidates)} candidates "
        f"({', '.join(config.kinds)}). "
        f"Found on {len(run.splits.discover)} `discover` questions{explored}, {_chosen_how(run, explored)}, reported "
        f"on {len(run.splits.test)} `test` questions that selected nothing.",
        "",
        f"**Verdict.** {verdict(run, headline, findings)}{against_lowest(run, results, findings)}",
        "",
        *_starts(run),
        *_gate(run),
        *_result(run, results, findings),
        *controls_of(run, results, findings),
    ]
    if len(config.rules) > 1:
        lines += _rules(run, findings)
    if plane is not None and effects is not None:
        lines += side_effects_of(run, plane, effects)
    if len(outcomes) > 1:
        lines += _budgets(run, findings)
    lines += _sweep(run, results, findings)
    lines += _searches(run, results)
    lines += _consequences(run, findings.grafts[headline][run.budget], outcomes[run.budget])
    return "\n".join(lines) + "\n"


def _chosen_how(run: Run, explored: str) -> str:
    """What K and strength were chosen on, where there was a choice."""
    if len(run.counts) * len(run.config.strengths) == 1:
        return "K and strength as the config gives them"
    return f"K and strength chosen on {len(run.splits.choose)} `choose` questions{explored}{_chosen_by(run.config)}"


def _chosen_by(config: RunConfig) -> str:
    said = " by the gold answer's log-probability" if config.choose_by == "log_probability" else ""
    if config.parameters is None:
        return said
    do = counted_in_words(get_operator(config.operator))
    return f"{said} among grafts that {do} at most {percent(config.parameters)} of the parameters"


def _starts(run: Run) -> list[str]:
    """A warning where a folder was begun on one kind of device, or by one version, and went on with another."""
    starts = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))["starts"]
    kinds = sorted({str(start.get("device", "cpu")).partition(":")[0] for start in starts})
    lines: list[str] = []
    if len(kinds) > 1:
        said = f"Cells of this run were computed on {' and '.join(kinds)}, which round otherwise: verdicts that hang "
        lines += [f"{said}on a near tie may differ between them.", ""]
    for what, used in (
        ("mechtransplant", {str(start["mechtransplant"]) for start in starts}),
        ("torch", {str(start["packages"]["torch"]).partition("+")[0] for start in starts}),
    ):
        if len(used) > 1:
            said = f"Cells of this run were computed by {what} {' and '.join(sorted(used))}: where the two compute"
            lines += [f"{said} otherwise, they do not belong together (see environment.json).", ""]
    return lines


def _gate(run: Run) -> list[str]:
    """What the gate of conditional grafts was fitted on, and how many questions it lets through."""
    if run.gating is None:
        return []
    gate, spec, n = run.gating.gate, run.gating.spec, len(run.splits.test)
    against = [f"{spec.texts} neutral texts", *(f"{len(t)} questions of {t.name}" for t in run.gating.others)]
    said = (
        f"**Conditional.** Every graft is in place only for questions that a gate lets through: {run.gating.open} of "
        f"the {n} `test` questions. It reads the target's residual stream after layer {gate.layer}, and was fitted on "
        f"the `discover` questions against {' and '.join(against)}."
    )
    if run.elsewhere.tasks:
        open_for = [f"{run.gating.open_for(t)} of {len(t)} questions of {t.name}" for t in run.elsewhere.tasks]
        said += f" It is open for {', '.join(open_for)}."
    harm = run.config.side_effects
    if harm is not None and harm.texts and harm.file is None:
        said += " Side effects on texts are measured on other texts of the same making."
    return [said, ""]


def _result(run: Run, results: pd.DataFrame, findings: Findings) -> list[str]:
    headline, budget = run.config.rules[0], run.budget
    outcome, graft = findings.outcomes[headline][budget], findings.grafts[headline][budget]
    k, candidates = len(graft), len(run.candidates)
    tir, recovery = ratios(outcome)
    tir += "" if outcome.tir is None else f" {interval_of(outcome.tir_interval, '', 1)}"
    recovery += "" if outcome.recovery is None else f" {interval_of(outcome.recovery_interval, ' %', 1)}"
    lines = [
        f"## Result of `{headline}` at {budget} tokens",
        "",
        f"- **TIR** (after / target): {tir}",
        f"- **Recovery** (share of the gap to the source): {recovery}",
        f"- difference {100 * outcome.difference:+.1f} points {interval_of(outcome.interval, ' points')}; "
        f"exact McNemar p = {outcome.p_value:.3g}; "
        f"{outcome.gained} questions gained, {outcome.lost} lost",
        f"- best K = {k} of {candidates} ({percent(k / candidates)} of the candidates, "
        f"{percent(outcome.parameter_share)} of the numbers in linear layers)",
    ]
    changed = findings.headline(headline).get("changed_share")
    if changed is not None and not math.isnan(changed):
        lines.append(f"- {kept_in_words(graft.operator, changed)}")
    lines += moved_in_words(findings.headline(headline).to_dict())
    own = run.rankings.strengths(headline, k)
    if own:
        lines.append(
            f"- strengths are fitted on `discover`, one a module: {min(own):.2f} to {max(own):.2f}, median "
            f"{sorted(own)[k // 2]:.2f}; random sets have the same ones, dealt anew within classes of modules"
        )
    change = outcome.log_probability
    if change is not None:
        ranks = outcome.log_probability_controls
        among = f"; {ranks} among the random sets" if ranks is not None else ""
        lines.append(
            f"- log-probability of the gold answer {change.target:.2f} → {change.after:.2f} nats (source "
            f"{change.source:.2f}): {change.change:+.2f} {interval_of(change.interval, ' nats', 1)}{among}"
        )
    if outcome.curve is not None:
        area = outcome.curve
        lines.append(
            f"- area under the K-curve (mean accuracy over the share of modules grafted): {percent(area.area)}; "
            f"random orders {percent(area.area_rank.median)} ({percent(area.area_rank.low)} – "
            f"{percent(area.area_rank.high)}), p = {area.area_rank.p_value:.2g}"
        )
    return lines + [f"- {note}" for note in outcome.notes]


def _rules(run: Run, findings: Findings) -> list[str]:
    columns = [
        "rule", "needs", "K", "graft", *RATIOS, "nats", "random sets: median (range)", "beaten", "p", "p (curve)",
        "area", "bottom", "unrelated", "reverse",
    ]  # fmt: skip
    lines = ["", f"## Rules, each with its own K (test, {run.budget} tokens)", "", *head_of(columns)]
    for rule in run.config.rules:
        outcome = findings.outcomes[rule][run.budget]
        row = findings.table[(findings.table.rule == rule) & (findings.table.budget == run.budget)].iloc[0]
        ranks, curve, change = outcome.controls, outcome.curve, outcome.log_probability
        random = "–" if ranks is None else f"{percent(ranks.median)} ({percent(ranks.low)} – {percent(ranks.high)})"
        others = ["–" if v is None or math.isnan(v) else percent(v) for v in (row.bottom, row.unrelated, row.reverse)]
        cells = [f"`{rule}`", row.needs, row.k, percent(row.after), *ratios(outcome)]
        cells += ["–" if change is None else f"{change.change:+.2f}", random]
        cells += ["–", "–"] if ranks is None else [f"{ranks.beaten} of {ranks.n}", f"{ranks.p_value:.2g}"]
        cells += ["–", "–"] if curve is None else [f"{curve.p_value:.2g}", percent(curve.area)]
        lines.append(row_of([*cells, *others]))
    lines += [
        "",
        f"{len(run.config.rules)} rules are compared: by chance alone one in twenty has p ≤ 0.05. p is the rank among "
        "random sets matched to that rule's own; p (curve) covers every K at once. Nats: change of the gold answer's "
        "mean log-probability.",
        "",
        *(f"- {verdict(run, rule, findings)}" for rule in run.config.rules),
    ]
    return lines


def _budgets(run: Run, findings: Findings) -> list[str]:
    headline = run.config.rules[0]
    columns = ["tokens", "answered by the target", "by the source", "by the graft", "right when answered (graft)"]
    columns += ["target", "source", "best K", "graft", "random median", *RATIOS]
    lines = ["", "## Token budgets (test; each with its own best K)", "", *head_of(columns)]
    for budget, o in findings.outcomes[headline].items():
        split = o.truncation or {}
        answered = [percent(split[r].answered) if r in split else "–" for r in ("target", "source", "after")]
        right = split["after"].right_given_answered if "after" in split else None
        cells = [budget, *answered, "–" if right is None else percent(right)]
        cells += [percent(o.target_accuracy), percent(o.source_accuracy), len(findings.grafts[headline][budget])]
        cells += [percent(o.after_accuracy), "–" if o.controls is None else percent(o.controls.median), *ratios(o)]
        lines.append(row_of(cells))
    return lines


def _sweep(run: Run, results: pd.DataFrame, findings: Findings) -> list[str]:
    headline, candidates = run.config.rules[0], len(run.candidates)
    at = results[(results.budget == run.budget) & (results.rule == headline)]
    choose, test = (at[(at.split == split)] for split in ("choose", "test"))
    columns = ["K", "strength", "accuracy on choose", "on test", "random orders on test: median (lowest – highest)"]
    lines = ["", f"## K sweep of `{headline}`", "", *head_of(columns)]
    none = f"random orders are at strength {run.chosen[headline][run.budget][1]:g} alone"
    if headline not in run.config.with_controls:
        none = "this rule has no controls (`controlled`)"
    elif not run.config.curve_sets:
        none = "no random order was asked for"
    for point in choose[choose.role == "graft"].sort_values(["k", "strength"]).itertuples():
        same = test[(test.k == point.k) & (test.strength == point.strength)]
        grafted = same[same.role == "graft"].accuracy
        sets = same[(same.role == "random") & same.set.str.startswith("order")].accuracy
        band = f"{range_of(sets)}, {len(sets)} sets" if len(sets) else none if len(grafted) else "–"
        if point.k == candidates:
            only = "all of them select nothing"
            band = only if run.counts == [candidates] else f"a control: {only}, so this K is never chosen"
        cells = [point.k, f"{point.strength:g}", percent(point.accuracy)]
        lines.append(row_of([*cells, percent(grafted.iloc[0]) if len(grafted) else "–", band]))
    if run.config.kinds == ("linear",):
        shown, said = (
            sorted({max(1, round(share * candidates)) for share in PAPER_SHARES}),
            ("K at the paper's five shares of the layers: 6.25, 12.5, 25, 50 and 100 %."),
        )
        if run.rankings.by_k(headline):
            # there are rankings for the run's own K alone
            shown, said = run.counts, "K of this run, each with a ranking of its own."
        lines += ["", "## Feed-forward / attention layers among the K highest", "", said, ""]
        lines.append(", ".join(f"K = {n}: {f}/{a}" for n, f, a in selected_counts(run, shown)))
    return lines


def _searches(run: Run, results: pd.DataFrame) -> list[str]:
    """What searching sets on ``choose`` adds there to the rules that look at each module once; [] without both."""
    searches = [r for r in run.config.rules if get_rule(r).splits[0] == "choose"]
    others = [r for r in run.config.rules if r not in searches]
    rows = results[(results.split == "choose") & (results.role == "graft") & (results.budget == run.budget)]
    if not searches or not others or rows.log_probability.isna().any():
        return []
    grid = rows.pivot_table(index="k", columns="rule", values="log_probability", aggfunc="max")
    best, names = grid[others].max(axis=1), grid[others].idxmax(axis=1)
    said = {r: ", ".join(f"{key} = {value}" for key, value in run.config.options_of(r).items()) for r in searches}
    columns = ["K", "best other rule", *(f"`{r}`" + f" ({said[r]})" * bool(said[r]) for r in searches)]
    lines = ["", "## Searches on `choose`: log-probability of the gold answer, nats", "", *head_of(columns)]
    for k in grid.index:
        found = [f"{grid.loc[k, r]:.3f} ({grid.loc[k, r] - best[k]:+.3f})" for r in searches]
        lines.append(row_of([k, f"{best[k]:.3f} `{names[k]}`", *found]))
    caution = (
        "In brackets: the search less the best other rule. Searches optimise this quantity on these questions, and the "
        "other rules rank on `discover`, so a positive difference is no finding: a negative one would be a failed "
        "search, or one that stopped before that K (`stop`: the rest follow one gradient)."
    )
    return [*lines, "", caution]


def _consequences(run: Run, graft: Graft, outcome: Outcome) -> list[str]:
    lines: list[str] = []
    consequences = graft.consequences(run.pair)
    if graft.operator.name != "replace":
        options = ", ".join(f"{key} = {value}" for key, value in options_of(graft.operator).items())
        said = f" ({options})" if options else ""
        alone = "; no ancestor, so b = t" if " b" in graft.operator.equation else ""
        ancestor = alone if run.pair.base is None else f"; ancestor b: {run.pair.base.name}"
        consequences.insert(0, f"operator {graft.operator.name}{said}: {graft.operator.equation}{ancestor}")
    if graft.kv != "never" and "head" in run.config.kinds and outcome.controls is not None:
        consequences.append("random sets have as many heads, but K/V that follow them may be more or fewer")
    if consequences:
        lines += ["", "## What the graft does to the model", "", *(f"- {text}" for text in consequences)]
    lines += ["", "## What stays the target's", ""]
    return lines + ([f"- {text}" for text in run.pair.compatibility.stays] or ["- nothing differs outside the layers"])
