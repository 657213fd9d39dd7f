"""The results that the method's paper reports (arXiv 2602.16189), as rows beside one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


def reported_results() -> pd.DataFrame:
    """The paper's ten rows, best K each: accuracies and Recovery in per cent, of 50 questions; Recovery NaN where the
    two baselines are equal."""
    import pandas as pd

    return pd.read_csv(Path(__file__).with_name("reported_results.csv"))


def beside_reported(runs: Sequence[str | Path] = ()) -> pd.DataFrame:
    """The paper's rows and those of finished runs (every token budget), as ``figures.reported_rows`` takes them.

    Returns:
        columns who ("paper", "this project"), label, n, target, after, source (shares).

    Raises:
        UsageError: a folder that holds no finished run.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for row in reported_results().to_dict("records"):
        label = f"{str(row['pair']).capitalize()}, {row['max_new_tokens']} tokens, K = {row['best_k']}"
        shares = {role: row[f"{role}_accuracy"] / 100 for role in ("target", "after", "source")}
        rows.append({"who": "paper", "label": label, "n": row["questions"], **shares})
    for folder in map(Path, runs):
        path = folder / "outcome.json"
        if not path.exists():
            raise UsageError(f"{folder} holds no finished run: give folders that mechtransplant run wrote")
        for budget, outcome in json.loads(path.read_text(encoding="utf-8")).items():
            label = f"{folder.name}, {budget} tokens, K = {len(outcome['modules'])}"
            shares = {role: outcome[f"{role}_accuracy"] for role in ("target", "after", "source")}
            rows.append({"who": "this project", "label": label, "n": outcome["n"], **shares})
    return pd.DataFrame(rows)
