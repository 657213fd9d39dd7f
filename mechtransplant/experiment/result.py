"""What a finished run leaves behind: tables, the outcome as JSON, figures and the summary, and the same in memory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation import Outcome
from mechtransplant.experiment.cells import write_atomically
from mechtransplant.experiment.elsewhere import side_effect_tables
from mechtransplant.experiment.findings import Findings
from mechtransplant.experiment.summary import label_of, summarise
from mechtransplant.figures import gain_against_harm, k_curve, rule_curves, save_figure, score_heatmap
from mechtransplant.grafting import Graft
from mechtransplant.grafting.operators import options_of

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, tidy tables, and per token budget the chosen graft and its outcome on ``test``.

    ``ranking``, ``grafts`` and ``outcomes`` are the headline rule's (the first); ``rules`` has one row a rule and
    budget, and ``findings`` every rule's graft and outcome.
    """

    folder: Path
    results: pd.DataFrame
    ranking: pd.DataFrame
    grafts: dict[int, Graft]
    outcomes: dict[int, Outcome]
    summary: str
    rules: pd.DataFrame
    findings: Findings
    #: one row a graft: what it gains, what it costs elsewhere, and whether it is on the Pareto front
    plane: pd.DataFrame | None = None

    @property
    def graft(self) -> Graft:
        """The graft chosen at the largest token budget."""
        return self.grafts[max(self.grafts)]


def write_report(run: Run, findings: Findings) -> RunResult:
    """Write results.parquet, rules.csv, side_effects.csv, outcome.json, summary.md and figures/; the same as a
    RunResult."""
    import pandas as pd

    plane = effects = None
    if run.side_effects:
        plane, effects = side_effect_tables(run.side_effects)
        write_atomically(run.folder / "side_effects.csv", effects.to_csv(index=False, float_format="%.8g"))

    results = pd.DataFrame(run.rows.rows)
    temporary = run.folder / ".results.tmp"
    results.to_parquet(temporary, index=False)
    temporary.replace(run.folder / "results.parquet")
    write_atomically(run.folder / "rules.csv", findings.table.to_csv(index=False, float_format="%.8g"))
    headline = run.config.rules[0]
    grafts, outcomes = findings.grafts[headline], findings.outcomes[headline]
    content = {str(budget): _saved(graft, outcomes[budget]) for budget, graft in grafts.items()}
    write_atomically(
        run.folder / "outcome.json", json.dumps(_without_infinity(content), indent=1, allow_nan=False) + "\n"
    )
    summary = summarise(run, results, findings, plane, effects)
    write_atomically(run.folder / "summary.md", summary)
    _draw(run, results, findings, plane)
    ranking = run.rankings.of(headline)
    return RunResult(run.folder, results, ranking, grafts, outcomes, summary, findings.table, findings, plane)


def _saved(graft: Graft, outcome: Outcome) -> dict[str, Any]:
    return {
        "modules": list(graft.modules),
        "strength": graft.strengths[0],
        "kv": graft.kv,
        "operator": {"name": graft.operator.name, **options_of(graft.operator)},
        # so that an export of the run, and what is compared with it, know what selected
        "selected_on": sorted(q for s in graft.selections for q in s.questions),
        **asdict(outcome),
    }


def _draw(run: Run, results: pd.DataFrame, findings: Findings, plane: pd.DataFrame | None) -> None:
    import pandas as pd

    from mechtransplant.side_effects import pareto_front

    folder, headline = run.folder / "figures", run.config.rules[0]
    data, test = results.drop(columns="correct"), results[results.split == "test"]
    ranking = run.rankings.of(headline)
    figure, _ = k_curve(test, "test", run.budget, len(ranking), rule=headline, title=run.pair.name)
    save_figure(figure, folder, "k_curve", data)
    if len(run.config.rules) > 1:
        figure, _ = rule_curves(test, run.budget, len(ranking), list(run.config.rules), title=run.pair.name)
        save_figure(figure, folder, "rule_curves", data)
    if plane is not None and "harm" in plane:
        named = plane.assign(label=[label_of(row) for row in plane.to_dict("records")])
        figure, _ = gain_against_harm(named, title=run.pair.name)
        save_figure(figure, folder, "gain_against_harm", named)
        if "kl" in named:
            grafts = pareto_front(named[named.role != "random"], harm="kl")
            both = pd.concat([grafts, named[named.role == "random"]], ignore_index=True)
            figure, _ = gain_against_harm(both, harm="kl", title=run.pair.name)
            save_figure(figure, folder, "gain_against_kl", both)
    if run.config.kinds == ("linear",):
        k = len(findings.grafts[headline][run.budget])
        ranking = run.rankings.frame(headline, k)
        figure, _ = score_heatmap(ranking, k, run.pair.name, f"score by {headline}")
        save_figure(figure, folder, "score_heatmap", ranking)


def _without_infinity(value: Any) -> Any:
    """The same value for strict JSON, which has no infinity: an unbounded end of an interval becomes null."""
    if isinstance(value, dict):
        return {key: _without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_without_infinity(inner) for inner in value]
    return None if isinstance(value, float) and math.isinf(value) else value
