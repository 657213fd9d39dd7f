"""What a finished run leaves behind: tables, the outcome as JSON, figures and the summary, and the same in memory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.evaluation import Outcome
from mechtransplant.experiment.cells import write_atomically
from mechtransplant.experiment.drawing import draw
from mechtransplant.experiment.elsewhere import side_effect_tables
from mechtransplant.experiment.findings import Findings
from mechtransplant.experiment.summary import summarise
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

    def _repr_html_(self) -> str:
        budget = max(self.outcomes)
        return f"<p>Run in {escape(str(self.folder))}</p>" + self.outcomes[budget]._repr_html_()

    @property
    def graft(self) -> Graft:
        """The graft chosen at the largest token budget."""
        return self.grafts[max(self.grafts)]


def write_report(run: Run, findings: Findings) -> RunResult:
    """Write the tables (results.parquet, rules.csv, …), outcome.json, summary.md and figures/; the same in memory."""
    import pandas as pd

    plane = effects = None
    if run.side_effects:
        plane, effects = side_effect_tables(run.side_effects)
        write_atomically(run.folder / "side_effects.csv", effects.to_csv(index=False, float_format="%.8g"))
        write_atomically(run.folder / "plane.csv", plane.to_csv(index=False))

    results = pd.DataFrame(run.rows.rows)
    temporary = run.folder / ".results.tmp"
    results.to_parquet(temporary, index=False)
    temporary.replace(run.folder / "results.parquet")
    write_atomically(run.folder / "rules.csv", findings.table.to_csv(index=False, float_format="%.8g"))
    # before anything says that the run is finished
    summary = summarise(run, results, findings, plane, effects)
    headline = run.config.rules[0]
    grafts, outcomes = findings.grafts[headline], findings.outcomes[headline]
    gating = run.gating
    gate: dict[str, Any] = {}
    if gating is not None:
        others = {task.name: [gating.open_for(task), len(task)] for task in run.elsewhere.tasks}
        gate = {"gate": {"layer": gating.gate.layer, "open": gating.open, "elsewhere": others}}
    chosen = run.chosen[headline]
    content = {str(b): {**_saved(graft, chosen[b][1], outcomes[b]), **gate} for b, graft in grafts.items()}
    write_atomically(run.folder / "outcome.json", json.dumps(_strict(content), indent=1, allow_nan=False) + "\n")
    write_atomically(run.folder / "summary.md", summary)
    draw(run.folder)
    ranking = run.rankings.frame(headline, chosen[run.budget][0])
    return RunResult(run.folder, results, ranking, grafts, outcomes, summary, findings.table, findings, plane)


def _saved(graft: Graft, strength: float, outcome: Outcome) -> dict[str, Any]:
    fitted = {"strengths": list(graft.strengths)} if set(graft.strengths) != {strength} else {}
    return {
        "modules": list(graft.modules),
        "strength": strength,
        **fitted,
        "kv": graft.kv,
        "operator": {"name": graft.operator.name, **options_of(graft.operator)},
        # so that an export of the run, and what is compared with it, know what selected
        "selected_on": sorted(q for s in graft.selections for q in s.questions),
        **asdict(outcome),
    }


def _strict(value: Any) -> Any:
    """The same value for strict JSON: an unbounded end of an interval becomes null, and so does what is no number."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
