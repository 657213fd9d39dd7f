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


def reported_power(questions: Sequence[int] = (50, 500)) -> pd.DataFrame:
    """How likely an exact McNemar test is to find each change that the paper reports, if it is true.

    Its answers are not paired in print, so each row has two probabilities a number of questions: ``kept`` where a graft
    loses no question that the target has right (the most that the test can have), and ``independent`` where what the
    graft answers has nothing to do with what the target answers.
    """
    from mechtransplant.significance import mcnemar_power

    rows = reported_results()
    for n in questions:
        kept, independent = [], []
        for before, after in zip(rows.target_accuracy / 100, rows.after_accuracy / 100, strict=True):
            kept.append(mcnemar_power(n, max(0.0, after - before), max(0.0, before - after)))
            independent.append(mcnemar_power(n, (1 - before) * after, before * (1 - after)))
        rows[f"kept_{n}"], rows[f"independent_{n}"] = kept, independent
    return rows


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
