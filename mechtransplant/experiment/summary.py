"""The one-page summary of a finished run, in words and Markdown tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation import Outcome
from mechtransplant.experiment.config import PAPER_SHARES, RunConfig
from mechtransplant.experiment.findings import Findings
from mechtransplant.grafting import Graft
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


# --- words ------------------------------------------------------------------------------------------------------------


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %"


def _band(values: Any) -> str:
    """Median (lowest – highest)."""
    return f"{_percent(values.median())} ({_percent(values.min())} – {_percent(values.max())})"


_RATIOS = ("TIR", "Recovery")


def _row(cells: Sequence[Any]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def _head(columns: Sequence[str]) -> list[str]:
    return [_row(columns), _row(["---"] * len(columns))]


def _ratios(outcome: Outcome) -> list[str]:
    """TIR and Recovery as text."""
    return [
        "undefined" if outcome.tir is None else f"{outcome.tir:.3f}",
        "withheld" if outcome.recovery is None else f"{outcome.recovery:.1f} %",
    ]


def _interval(pair: tuple[float, float] | None, unit: str = " %", scale: float = 100) -> str:
    if pair is None:
        return "–"
    low, high = ("∞" if end == math.inf else "−∞" if end == -math.inf else f"{scale * end + 0.0:.3g}" for end in pair)
    return f"[{low}, {high}]{unit}"


def _points(share: float) -> str:
    """A change of a share in percentage points; nothing is +0.0."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


# --- the page ---------------------------------------------------------------------------------------------------------


def label_of(row: Mapping[Any, Any]) -> str:
    """A graft's name in figures and tables."""
    if row["role"] == "all":
        return f"all {row['k']}"
    return f"random {row['k']}" if row["role"] == "random" else f"{row['rule']} {row['k']}"


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
        f"Found on {len(run.splits.discover)} `discover` questions{explored}, K and strength chosen on "
        f"{len(run.splits.choose)} `choose` questions{explored}{_chosen_by(config)}, reported on "
        f"{len(run.splits.test)} `test` questions that selected nothing.",
        "",
        f"**Verdict.** {verdict(run, headline, findings)}{_against_lowest(run, results, findings)}",
        "",
        *_devices(run),
        *_result(run, results, findings),
        *_controls(run, results, findings),
    ]
    if len(config.rules) > 1:
        lines += _rules(run, findings)
    if plane is not None and effects is not None:
        lines += _side_effects(run, plane, effects)
    if len(outcomes) > 1:
        lines += _budgets(run, findings)
    lines += _sweep(run, results, findings)
    lines += _searches(run, results)
    lines += _consequences(run, findings.grafts[headline][run.budget], outcomes[run.budget])
    return "\n".join(lines) + "\n"


def _chosen_by(config: RunConfig) -> str:
    said = " by the gold answer's log-probability" if config.choose_by == "log_probability" else ""
    within = (
        "" if config.parameters is None else f" among grafts of at most {_percent(config.parameters)} of the parameters"
    )
    return said + within


def verdict(run: Run, rule: str, findings: Findings) -> str:
    """One plain sentence: where a rule's graft stands among matched random sets on ``test``, and its whole curve."""
    graft, outcome = findings.grafts[rule][run.budget], findings.outcomes[rule][run.budget]
    ranks, curve = outcome.controls, outcome.curve
    if ranks is None:
        if rule not in run.config.with_controls:
            return f"`{rule}` has no random sets of its own (`controlled` names the rules that have)."
        said = f"no matched random set at K = {len(graft)}: {_no_sets(run)}"
        if curve is not None:
            said += f"; over the whole K-curve p = {curve.p_value:.2g} ({curve.n} random orders, max-statistic)"
        return f"`{rule}` has {said}."
    sets = run.random_sets(rule, len(graft))
    said = (
        f"`{rule}` beats {ranks.beaten} of {ranks.n} matched random sets at K = {len(graft)} (depth {sets.depth}; "
        f"one-sided permutation p = {ranks.p_value:.2g}, of which the smallest possible is {1 / (ranks.n + 1):.2g})"
    )
    if curve is not None:
        said += f"; over the whole K-curve p = {curve.p_value:.2g} ({curve.n} random orders, max-statistic)"
    return f"{said}."


def _against_lowest(run: Run, results: pd.DataFrame, findings: Findings) -> str:
    """A sentence where the modules that the headline ranks lowest do better than its highest; else nothing."""
    headline = run.config.rules[0]
    k, after = len(findings.grafts[headline][run.budget]), findings.outcomes[headline][run.budget].after_accuracy
    rows = results[(results.role == "bottom") & (results["rule"] == headline) & (results.budget == run.budget)]
    if rows.empty or rows.accuracy.iloc[0] <= after:
        return ""
    return (
        f" The {k} modules that it ranks lowest reach {_percent(rows.accuracy.iloc[0])}, its graft {_percent(after)}."
    )


def _devices(run: Run) -> list[str]:
    """A warning where a folder was begun on one kind of device and went on with another."""
    starts = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))["starts"]
    kinds = sorted({str(start.get("device", "cpu")).partition(":")[0] for start in starts})
    if len(kinds) == 1:
        return []
    said = f"Cells of this run were computed on {' and '.join(kinds)}, which round otherwise: verdicts that hang on a "
    return [f"{said}near tie may differ between them.", ""]


def _result(run: Run, results: pd.DataFrame, findings: Findings) -> list[str]:
    headline, budget = run.config.rules[0], run.budget
    outcome, graft = findings.outcomes[headline][budget], findings.grafts[headline][budget]
    k, candidates = len(graft), len(run.candidates)
    tir, recovery = _ratios(outcome)
    tir += "" if outcome.tir is None else f" {_interval(outcome.tir_interval, '', 1)}"
    recovery += "" if outcome.recovery is None else f" {_interval(outcome.recovery_interval, ' %', 1)}"
    lines = [
        f"## Result of `{headline}` at {budget} tokens",
        "",
        f"- **TIR** (after / target): {tir}",
        f"- **Recovery** (share of the gap to the source): {recovery}",
        f"- difference {100 * outcome.difference:+.1f} points {_interval(outcome.interval, ' points')}; "
        f"exact McNemar p = {outcome.p_value:.3g}; "
        f"{outcome.gained} questions gained, {outcome.lost} lost",
        f"- best K = {k} of {candidates} ({_percent(k / candidates)} of the candidates, "
        f"{_percent(outcome.parameter_share)} of the numbers in linear layers)",
    ]
    change = outcome.log_probability
    if change is not None:
        ranks = outcome.log_probability_controls
        among = f"; {ranks} among the random sets" if ranks is not None else ""
        lines.append(
            f"- log-probability of the gold answer {change.target:.2f} → {change.after:.2f} nats (source "
            f"{change.source:.2f}): {change.change:+.2f} {_interval(change.interval, ' nats', 1)}{among}"
        )
    if outcome.curve is not None:
        area = outcome.curve
        lines.append(
            f"- area under the K-curve (mean accuracy over the share of modules grafted): {_percent(area.area)}; "
            f"random orders {_percent(area.area_rank.median)} ({_percent(area.area_rank.low)} – "
            f"{_percent(area.area_rank.high)}), p = {area.area_rank.p_value:.2g}"
        )
    return lines + [f"- {note}" for note in outcome.notes]


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


def _controls(run: Run, results: pd.DataFrame, findings: Findings) -> list[str]:
    headline, budget = run.config.rules[0], run.budget
    graft = findings.grafts[headline][budget]
    k, strength = len(graft), graft.strengths[0]
    rows = results[(results.split == "test") & (results.budget == budget) & results.rule.isin(["", headline])]
    other = "" if run.other is None else run.other.name
    lines = ["", "## Controls", "", *_head(["", "accuracy", "95 % interval"])]
    for role, label in _ROLES.items():
        found = rows[rows.role == role]
        if role in ("graft", "all"):
            found = found[(found.strength == strength) & ((found.k == k) | (role == "all"))]
        if len(found):
            row = found.iloc[0]
            said = label.format(k=k, strength=strength, all=len(run.candidates), other=other)
            lines.append(_row([said, _percent(row.accuracy), _interval((row.low, row.high))]))
    drawn = rows[(rows.role == "random") & (rows.k == k) & (rows.strength == strength)]
    drawn = drawn[drawn.set.str.startswith("set")]
    if len(drawn):
        said = f"target + random, {len(drawn)} matched sets of {k}: median (lowest – highest)"
        lines.append(_row([said, _band(drawn.accuracy), ""]))
    same = self_graft_is_identical(run)
    if same is not None:
        lines += ["", f"The self-graft's answers and log-probabilities are {'' if same else 'NOT '}bit-identical."]
    wanted = run.config.controls if headline in run.config.with_controls else ()
    left_out = [c for c in ("bottom", "reverse", "unrelated", "self") if c not in wanted]
    if left_out:
        lines += ["", f"Left out, as the config asked: {', '.join(left_out)}."]
    if "unrelated" in wanted and run.other is None:
        lines += ["", "No unrelated ranking: the pair names no other task (give `unrelated:`)."]
    elif "unrelated" in wanted and not run.unrelated_rules(headline):
        lines += ["", f"No unrelated ranking: `{headline}` looks at no task."]
    return lines


def self_graft_is_identical(run: Run) -> bool | None:
    """Whether the target with its own modules grafted answers exactly as the target, to the last bit of every
    log-probability; None where it was not asked."""
    found = run.rows.where(split="test", role="self")
    if not found:
        return None
    return all(r["digest"] == r["beside"] for r in found)


def _rules(run: Run, findings: Findings) -> list[str]:
    columns = [
        "rule", "needs", "K", "graft", *_RATIOS, "nats", "random sets: median (range)", "beaten", "p", "p (curve)",
        "area", "bottom", "unrelated", "reverse",
    ]  # fmt: skip
    lines = ["", f"## Rules, each with its own K (test, {run.budget} tokens)", "", *_head(columns)]
    for rule in run.config.rules:
        outcome = findings.outcomes[rule][run.budget]
        row = findings.table[(findings.table.rule == rule) & (findings.table.budget == run.budget)].iloc[0]
        ranks, curve, change = outcome.controls, outcome.curve, outcome.log_probability
        random = "–" if ranks is None else f"{_percent(ranks.median)} ({_percent(ranks.low)} – {_percent(ranks.high)})"
        others = ["–" if v is None or math.isnan(v) else _percent(v) for v in (row.bottom, row.unrelated, row.reverse)]
        cells = [f"`{rule}`", row.needs, row.k, _percent(row.after), *_ratios(outcome)]
        cells += ["–" if change is None else f"{change.change:+.2f}", random]
        cells += ["–", "–"] if ranks is None else [f"{ranks.beaten} of {ranks.n}", f"{ranks.p_value:.2g}"]
        cells += ["–", "–"] if curve is None else [f"{curve.p_value:.2g}", _percent(curve.area)]
        lines.append(_row([*cells, *others]))
    lines += [
        "",
        f"{len(run.config.rules)} rules are compared: by chance alone one in twenty has p ≤ 0.05. p is the rank among "
        "random sets matched to that rule's own; p (curve) covers every K at once. Nats: change of the gold answer's "
        "mean log-probability.",
        "",
        *(f"- {verdict(run, rule, findings)}" for rule in run.config.rules),
    ]
    return lines


def _side_effects(run: Run, plane: pd.DataFrame, effects: pd.DataFrame) -> list[str]:
    columns = ["graft", "gain (points)", "accuracy elsewhere (points)", "worst task (points)", "perplexity"]
    columns += ["KL (nats a token)", "Pareto front"]
    tasks = ", ".join(dict.fromkeys(effects[effects.kind == "task"].what)) or "none"
    said = f"Other tasks: {tasks}. With 95 % intervals, paired.{_texts(run, effects)}"
    lines = ["", "## Side effects", "", said, "", *_head(columns)]
    for graft in plane[plane.role != "random"].to_dict("records"):
        own = effects[(effects.role == graft["role"]) & (effects.rule == graft["rule"]) & (effects.k == graft["k"])]
        lines.append(_row(_side_effects_of({str(k): v for k, v in graft.items()}, own.to_dict("records"))))
    notes = dict.fromkeys(note for c in run.side_effects for note in c["notes"])
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    random = plane[plane.role == "random"]
    if len(random) and "harm" in plane:
        gain, kept = random.gain, -random.harm
        lines += [
            "",
            f"{len(random)} of the random sets: gain {_points(gain.min())} to {_points(gain.max())} points, accuracy "
            f"elsewhere {_points(kept.min())} to {_points(kept.max())} points.",
        ]
    return lines


def _texts(run: Run, effects: pd.DataFrame) -> str:
    """Which texts perplexity and KL are measured on."""
    read, spec = effects[effects.kind == "text"], run.config.side_effects
    if read.empty or spec is None:
        return ""
    n = int(read.n.max())
    if spec.file is not None:
        return f" Perplexity and KL: on {n} texts of {spec.file}."
    return f" Perplexity and KL: on {n} texts that the target wrote, so whatever changes its habits raises them."


def _side_effects_of(graft: dict[str, Any], effects: list[Any]) -> list[str]:
    gain, mean, worst, perplexity, kl = _points(graft["gain"]), "–", "–", "–", "–"
    tasks = sorted((e for e in effects if e["kind"] == "task"), key=lambda e: e["change"])
    if tasks:
        gain += f" {_interval((graft['gain_low'], graft['gain_high']), '')}"
        ends = (-graft["harm_high"], -graft["harm_low"])
        mean = f"{_points(-graft['harm'])} {_interval(ends, '')}"
        low = tasks[0]
        worst = f"{low['what']} {_points(low['change'])} {_interval((low['low'], low['high']), '')}"
    for read in (e for e in effects if e["kind"] == "text"):
        ends = (read["low"], read["high"])
        if read["what"] == "KL":
            kl = f"{read['change']:.3g} {_interval(ends, '', 1)}"
        else:
            perplexity = f"{100 * read['change']:+.1f} % {_interval(ends)}"
    return [label_of(graft), gain, mean, worst, perplexity, kl, "yes" if graft["front"] else ""]


def _budgets(run: Run, findings: Findings) -> list[str]:
    headline = run.config.rules[0]
    columns = ["tokens", "answered by the target", "by the source", "by the graft", "right when answered (graft)"]
    columns += ["target", "source", "best K", "graft", "random median", *_RATIOS]
    lines = ["", "## Token budgets (test; each with its own best K)", "", *_head(columns)]
    for budget, o in findings.outcomes[headline].items():
        split = o.truncation or {}
        answered = [_percent(split[r].answered) if r in split else "–" for r in ("target", "source", "after")]
        right = split["after"].right_given_answered if "after" in split else None
        cells = [budget, *answered, "–" if right is None else _percent(right)]
        cells += [_percent(o.target_accuracy), _percent(o.source_accuracy), len(findings.grafts[headline][budget])]
        cells += [_percent(o.after_accuracy), "–" if o.controls is None else _percent(o.controls.median), *_ratios(o)]
        lines.append(_row(cells))
    return lines


def _sweep(run: Run, results: pd.DataFrame, findings: Findings) -> list[str]:
    headline, candidates = run.config.rules[0], len(run.candidates)
    at = results[(results.budget == run.budget) & (results.rule == headline)]
    choose, test = (at[(at.split == split)] for split in ("choose", "test"))
    columns = ["K", "strength", "accuracy on choose", "on test", "random orders on test: median (lowest – highest)"]
    lines = ["", f"## K sweep of `{headline}`", "", *_head(columns)]
    for point in choose[choose.role == "graft"].sort_values(["k", "strength"]).itertuples():
        same = test[(test.k == point.k) & (test.strength == point.strength)]
        grafted = same[same.role == "graft"].accuracy
        sets = same[(same.role == "random") & same.set.str.startswith("order")].accuracy
        band = f"{_band(sets)}, {len(sets)} sets" if len(sets) else _no_sets(run) if len(grafted) else "–"
        if point.k == candidates:
            band = "a control: all of them select nothing, so this K is never chosen"
        cells = [point.k, f"{point.strength:g}", _percent(point.accuracy)]
        lines.append(_row([*cells, _percent(grafted.iloc[0]) if len(grafted) else "–", band]))
    if run.config.kinds == ("linear",):
        paper = sorted({max(1, round(share * candidates)) for share in PAPER_SHARES})
        lines += ["", "## Feed-forward / attention layers among the K highest, at the paper's five shares", ""]
        lines.append(", ".join(f"K = {n}: {f}/{a}" for n, f, a in selected_counts(run, paper)))
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
    lines = ["", "## Searches on `choose`: log-probability of the gold answer, nats", "", *_head(columns)]
    for k in grid.index:
        found = [f"{grid.loc[k, r]:.3f} ({grid.loc[k, r] - best[k]:+.3f})" for r in searches]
        lines.append(_row([k, f"{best[k]:.3f} `{names[k]}`", *found]))
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
        ancestor = "" if run.pair.base is None else f"; ancestor b: {run.pair.base.name}"
        consequences.insert(0, f"operator {graft.operator.name}{said}: {graft.operator.equation}{ancestor}")
    if graft.kv != "never" and "head" in run.config.kinds and outcome.controls is not None:
        consequences.append("random sets have as many heads, but K/V that follow them may be more or fewer")
    if consequences:
        lines += ["", "## What the graft does to the model", "", *(f"- {text}" for text in consequences)]
    lines += ["", "## What stays the target's", ""]
    return lines + ([f"- {text}" for text in run.pair.compatibility.stays] or ["- nothing differs outside the layers"])


def _no_sets(run: Run) -> str:
    """Why there is no random set."""
    return "no other set has this make-up" if run.config.random_sets else "no random set was asked for"
