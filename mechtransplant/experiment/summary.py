"""The tables, figures and one-page summary of a finished run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation import Outcome
from mechtransplant.experiment.cells import write_atomically
from mechtransplant.experiment.config import PAPER_SHARES
from mechtransplant.figures import k_curve, save_figure, score_heatmap
from mechtransplant.grafting import Graft
from mechtransplant.grafting.operators import options_of
from mechtransplant.significance import rank_p_value

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, tidy tables, and per token budget the chosen graft and its outcome on ``test``."""

    folder: Path
    results: pd.DataFrame
    ranking: pd.DataFrame
    grafts: dict[int, Graft]
    outcomes: dict[int, Outcome]
    summary: str

    @property
    def graft(self) -> Graft:
        """The graft chosen at the largest token budget."""
        return self.grafts[max(self.grafts)]


def write_report(
    run: Run, rows: list[dict[str, Any]], grafts: dict[int, Graft], outcomes: dict[int, Outcome]
) -> RunResult:
    """Write results.parquet, outcome.json, summary.md and figures/, and return them as a RunResult."""
    import pandas as pd

    results = pd.DataFrame(rows)
    temporary = run.folder / ".results.tmp"
    results.to_parquet(temporary, index=False)
    temporary.replace(run.folder / "results.parquet")
    content = {
        str(budget): {
            "modules": list(graft.modules),
            "strength": graft.strengths[0],
            "kv": graft.kv,
            "operator": {"name": graft.operator.name, **options_of(graft.operator)},
            "parameter_share": parameter_share(run, graft),
            **asdict(outcomes[budget]),
        }
        for budget, graft in grafts.items()
    }
    write_atomically(
        run.folder / "outcome.json", json.dumps(_without_infinity(content), indent=1, allow_nan=False) + "\n"
    )
    summary = summarise(run, results, grafts, outcomes)
    write_atomically(run.folder / "summary.md", summary)
    budget = max(run.budgets)
    figure, _ = k_curve(results, "choose", budget, len(run.ranking))
    save_figure(figure, run.folder / "figures", "k_curve", results.drop(columns="correct"))
    if run.config.kind == "linear":
        figure, _ = score_heatmap(run.ranking, len(grafts[budget]), f"{run.pair.name}: rule {run.config.rule}")
        save_figure(figure, run.folder / "figures", "score_heatmap", run.ranking)
    return RunResult(run.folder, results, run.ranking, grafts, outcomes, summary)


def controls_of(results: pd.DataFrame, split: str, budget: int, graft: Graft) -> pd.DataFrame:
    """The rows of the random sets that a graft is compared with: same split, budget, K and strength."""
    rows = results[(results.split == split) & (results.budget == budget) & (results.role == "random")]
    return rows[(rows.k == len(graft)) & (rows.strength == graft.strengths[0])]


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


_RATIOS = ("TIR", "Recovery")


def _row(cells: Sequence[Any]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def _ratios(outcome: Outcome) -> list[str]:
    """TIR and Recovery as text."""
    return [
        "undefined" if outcome.tir is None else f"{outcome.tir:.3f}",
        "withheld" if outcome.recovery is None else f"{outcome.recovery:.1f} %",
    ]


def _interval(pair: tuple[float, float] | None, unit: str = " %", scale: float = 100) -> str:
    if pair is None:
        return "–"
    low, high = ("∞" if math.isinf(end) else f"{scale * end:.3g}" for end in pair)
    return f"[{low}, {high}]{unit}"


def _without_infinity(value: Any) -> Any:
    """The same value for strict JSON, which has no infinity: an unbounded end of an interval becomes null."""
    if isinstance(value, dict):
        return {key: _without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_without_infinity(inner) for inner in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def summarise(run: Run, results: pd.DataFrame, grafts: dict[int, Graft], outcomes: dict[int, Outcome]) -> str:
    """The one-page summary, in Markdown."""
    config, pair = run.config, run.pair
    budget = max(run.budgets)
    outcome, graft = outcomes[budget], grafts[budget]
    candidates = len(run.ranking)
    k, strength = len(graft), graft.strengths[0]
    at_budget = results[results.budget == budget]
    test = at_budget[at_budget.split == "test"]
    test = test[(test.role != "graft") | ((test.k == len(graft)) & (test.strength == graft.strengths[0]))]
    random = controls_of(results, "test", budget, graft)
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
        columns = ["tokens", "answered by the target", "target", "source", "best K", "graft", "random median", *_RATIOS]
        lines += [
            "",
            "## Token budgets (test; each with its own best K)",
            "",
            _row(columns),
            _row(["---"] * len(columns)),
        ]
        for b, o in outcomes.items():
            row = results[(results.split == "test") & (results.budget == b) & (results.role == "target")].iloc[0]
            sets = controls_of(results, "test", b, grafts[b]).accuracy
            lines.append(
                _row(
                    [
                        b,
                        "–" if row.answered is None else _percent(row.answered),
                        _percent(o.target_accuracy),
                        _percent(o.source_accuracy),
                        len(grafts[b]),
                        _percent(o.after_accuracy),
                        _percent(sets.median()) if len(sets) else "–",
                        *_ratios(o),
                    ]
                )
            )
    lines += [
        "",
        "## K sweep (choose)",
        "",
        "| K | strength | accuracy | random sets: median (lowest – highest) |",
        "|---|---|---|---|",
    ]
    choose = at_budget[at_budget.split == "choose"]
    for point in choose[choose.role == "graft"].sort_values(["k", "strength"]).itertuples():
        same = (choose.role == "random") & (choose.k == point.k) & (choose.strength == point.strength)
        sets = choose[same].accuracy
        band = f"{_band(sets)}, {len(sets)} sets" if len(sets) else _no_sets(run)
        lines.append(f"| {point.k} | {point.strength:g} | {_percent(point.accuracy)} | {band} |")
    if config.kind == "linear":
        paper = sorted({max(1, round(share * candidates)) for share in PAPER_SHARES})
        lines += ["", "## Feed-forward / attention layers among the K highest, at the paper's five shares", ""]
        lines.append(", ".join(f"K = {n}: {f}/{a}" for n, f, a in selected_counts(run, paper)))
    consequences = graft.consequences(pair)
    if graft.operator.name != "replace":
        options = ", ".join(f"{key} = {value}" for key, value in options_of(graft.operator).items())
        said = f" ({options})" if options else ""
        ancestor = "" if pair.base is None else f"; ancestor b: {pair.base.name}"
        consequences.insert(0, f"operator {graft.operator.name}{said}: {graft.operator.equation}{ancestor}")
    if graft.kv != "never" and config.kind == "head" and len(random):
        consequences.append("random sets have as many heads, but K/V that follow them may be more or fewer")
    if consequences:
        lines += ["", "## What the graft does to the model", "", *(f"- {text}" for text in consequences)]
    lines += ["", "## What stays the target's", ""]
    lines += [f"- {text}" for text in pair.compatibility.stays] or ["- nothing differs outside the linear layers"]
    return "\n".join(lines) + "\n"


def _no_sets(run: Run) -> str:
    """Why there is no random set."""
    return "no other set has this make-up" if run.config.random_sets else "no random set was asked for"


def verdict(run: Run, accuracy: float, random: pd.DataFrame, k: int) -> str:
    """One plain sentence: where the chosen set stands among the matched random sets on ``test``."""
    if random.empty:
        return f"no random control: {_no_sets(run)}"
    smallest = 1 / (len(random) + 1)
    beaten = int((random.accuracy < accuracy).sum())
    p = rank_p_value(accuracy, random.accuracy.to_numpy())
    return (
        f"`{run.config.rule}` beats {beaten} of {len(random)} matched random sets at K = {k} "
        f"(depth {random.depth_matched.iloc[0]}; one-sided permutation p = {p:.3g}, "
        f"of which the smallest possible is {smallest:.2g})"
    )
