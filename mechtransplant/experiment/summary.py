"""The tables, figures and one-page summary of a finished run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation import Outcome
from mechtransplant.experiment.cells import write_atomically
from mechtransplant.experiment.config import PAPER_SHARES
from mechtransplant.figures import k_curve, save_figure, score_heatmap
from mechtransplant.grafting import Graft
from mechtransplant.significance import rank_p_value

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the tidy tables, the chosen graft and its outcome on ``test`` per token budget."""

    folder: Path
    results: pd.DataFrame
    ranking: pd.DataFrame
    graft: Graft
    outcomes: dict[int, Outcome]
    summary: str


def write_report(run: Run, rows: list[dict[str, Any]], graft: Graft, outcomes: dict[int, Outcome]) -> RunResult:
    """Write results.parquet, outcome.json, summary.md and figures/, and return them as a RunResult."""
    import pandas as pd

    results = pd.DataFrame(rows)
    temporary = run.folder / ".results.tmp"
    results.to_parquet(temporary, index=False)
    temporary.replace(run.folder / "results.parquet")
    content = {
        "modules": list(graft.modules),
        "strength": graft.strengths[0],
        "parameter_share": parameter_share(run, graft),
        "outcomes": {str(b): asdict(o) for b, o in outcomes.items()},
    }
    write_atomically(run.folder / "outcome.json", json.dumps(content, indent=1) + "\n")
    summary = summarise(run, results, graft, outcomes)
    write_atomically(run.folder / "summary.md", summary)
    candidates = len(run.ranking)
    figure, _ = k_curve(results, "choose", max(run.budgets), candidates)
    save_figure(figure, run.folder / "figures", "k_curve", results.drop(columns="correct"))
    if run.config.kind == "linear":
        figure, _ = score_heatmap(run.ranking, len(graft), f"{run.pair.name}: rule {run.config.rule}")
        save_figure(figure, run.folder / "figures", "score_heatmap", run.ranking)
    return RunResult(run.folder, results, run.ranking, graft, outcomes, summary)


def parameter_share(run: Run, graft: Graft) -> float:
    """The graft's share of all candidates' parameters."""
    return graft.parameter_count(run.pair) / Graft(run.ranking.module).parameter_count(run.pair)


def selected_counts(run: Run, ks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(K, feed-forward, attention) of the K highest-ranked linear layers, as in the paper's table."""
    counts = []
    for k in ks:
        feed_forward = sum(run.pair.layout.is_feed_forward(m) for m in run.ranking.module[:k])
        counts.append((k, feed_forward, k - feed_forward))
    return counts


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %"


def _band(values: Any) -> str:
    """Median (lowest – highest)."""
    return f"{_percent(values.median())} ({_percent(values.min())} – {_percent(values.max())})"


def _ratios(outcome: Outcome) -> list[str]:
    """TIR and Recovery as text."""
    return [
        "undefined" if outcome.tir is None else f"{outcome.tir:.3f}",
        "withheld" if outcome.recovery is None else f"{outcome.recovery:.1f} %",
    ]


def _interval(pair: tuple[float, float] | None, unit: str = " %", scale: float = 100) -> str:
    return "–" if pair is None else f"[{scale * pair[0]:.3g}, {scale * pair[1]:.3g}]{unit}"


def summarise(run: Run, results: pd.DataFrame, graft: Graft, outcomes: dict[int, Outcome]) -> str:
    """The one-page summary, in Markdown."""
    config, pair = run.config, run.pair
    budget = max(run.budgets)
    outcome = outcomes[budget]
    candidates = len(run.ranking)
    k, strength = len(graft), graft.strengths[0]
    at_budget = results[results.budget == budget]
    test = at_budget[at_budget.split == "test"]
    random = test[test.role == "random"]
    lines = [
        f"# {config.name}: {pair.name or 'pair'}, {run.task.name}, rule {config.rule}",
        "",
        f"Source `{pair.source.name}`, target `{pair.target.name}`; {candidates} candidates ({config.kind}). "
        f"Found on {len(run.splits.discover)} `discover` questions, K and strength chosen on "
        f"{len(run.splits.choose)} `choose` questions, reported on "
        f"{len(run.splits.test)} `test` questions that selected nothing.",
        "",
        f"## Result at {budget} tokens",
        "",
        "| | accuracy | 95 % interval |",
        "|---|---|---|",
    ]
    for role, label in (
        ("target", "target"),
        ("source", "source"),
        ("graft", f"target + graft of K = {k} at strength {strength:g}"),
        ("all", f"target + all {candidates} at strength {strength:g}"),
    ):
        row = test[test.role == role].iloc[0]
        lines.append(f"| {label} | {_percent(row.accuracy)} | {_interval((row.low, row.high))} |")
    if len(random):
        label = f"random, {len(random)} matched sets of K = {k}: median (lowest – highest)"
        lines.append(f"| {label} | {_band(random.accuracy)} | |")
    tir, recovery = _ratios(outcome)
    tir += "" if outcome.tir is None else f" {_interval(outcome.tir_interval, '', 1)}"
    recovery += "" if outcome.recovery is None else f" {_interval(outcome.recovery_interval, ' %', 1)}"
    lines += [
        "",
        f"- **TIR** (after / target): {tir}",
        f"- **Recovery** (share of the gap to the source): {recovery}",
        f"- difference {100 * outcome.difference:+.1f} points {_interval(outcome.interval, ' points')}; "
        f"exact McNemar p = {outcome.p_value:.3g}; "
        f"{outcome.gained} questions gained, {outcome.lost} lost",
        f"- best K = {k} of {candidates} ({_percent(k / candidates)} of the candidates, "
        f"{_percent(parameter_share(run, graft))} of their parameters)",
    ]
    lines += [f"- {note}" for note in outcome.notes]
    lines.append(f"- {verdict(run, outcome.after_accuracy, random, k)}")
    if len(outcomes) > 1:
        lines += [
            "",
            "## Token budgets (test)",
            "",
            "| tokens | target | source | graft | TIR | Recovery |",
            "|---|---|---|---|---|---|",
        ]
        for b, o in outcomes.items():
            accuracies = [_percent(v) for v in (o.target_accuracy, o.source_accuracy, o.after_accuracy)]
            lines.append(f"| {' | '.join([str(b), *accuracies, *_ratios(o)])} |")
    lines += [
        "",
        "## K sweep (choose)",
        "",
        "| K | strength | accuracy | random sets: median (lowest – highest) |",
        "|---|---|---|---|",
    ]
    choose = at_budget[at_budget.split == "choose"]
    for point in choose[choose.role == "graft"].sort_values(["k", "strength"]).itertuples():
        sets = choose[(choose.role == "random") & (choose.k == point.k)].accuracy
        band = f"{_band(sets)}, {len(sets)} sets" if len(sets) else "none: only one such set"
        lines.append(f"| {point.k} | {point.strength:g} | {_percent(point.accuracy)} | {band} |")
    if config.kind == "linear":
        paper = sorted({max(1, round(share * candidates)) for share in PAPER_SHARES})
        lines += ["", "## Feed-forward / attention layers among the K highest, at the paper's five shares", ""]
        lines.append(", ".join(f"K = {n}: {f}/{a}" for n, f, a in selected_counts(run, paper)))
    lines += ["", "## What stays the target's", ""]
    lines += [f"- {text}" for text in pair.compatibility.stays] or ["- nothing differs outside the linear layers"]
    return "\n".join(lines) + "\n"


def verdict(run: Run, accuracy: float, random: pd.DataFrame, k: int) -> str:
    """One plain sentence: where the chosen set stands among the matched random sets on ``test``."""
    if random.empty:
        return f"no random control: K = {k} is every candidate, or none was asked for"
    beaten = int((random.accuracy < accuracy).sum())
    p = rank_p_value(accuracy, random.accuracy.to_numpy())
    return (
        f"`{run.config.rule}` beats {beaten} of {len(random)} matched random sets at K = {k} "
        f"(depth {random.depth_matched.iloc[0]}; one-sided permutation p = {p:.3g})"
    )
