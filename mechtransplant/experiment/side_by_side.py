"""Finished runs side by side: one row a run and rule, from the tables in their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.experiment.config import read_config
from mechtransplant.grafting import get_operator

if TYPE_CHECKING:
    import pandas as pd

#: of rules.csv; its other columns are about whole curves
_FROM_RULES = (
    "rule", "k", "strength", "parameter_share", "target", "source", "after", "n", "difference", "difference_low",
    "difference_high", "p_mcnemar", "tir", "tir_low", "tir_high", "recovery", "recovery_low", "recovery_high",
    "random_n", "random_beaten", "random_p_value", "random_median", "random_low", "random_high", "bottom", "unrelated",
    "reverse",
)  # fmt: skip
#: columns of grafts whose strengths are fitted, or whose operator drops changes
_SOMETIMES = (
    "refitted_n", "refitted_beaten", "refitted_median", "changed_share", "weights_n", "weights_beaten",
    "weights_p_value", "weights_median", "weights_low", "weights_high", "weights_strength", "tuned_n", "tuned_beaten",
    "tuned_p_value", "tuned_median", "tuned_low", "tuned_high", "tuned_strength",
    "weights_beaten_log_probability", "weights_p_value_log_probability", "tuned_beaten_log_probability",
    "tuned_p_value_log_probability", "distance_share", "random_distance_share", "tuned_distance_share",
    "weights_distance_share", "random_shared", "unrelated_shared", "unrelated_beaten", "unrelated_gained",
    "unrelated_lost", "unrelated_p_value",
)  # fmt: skip


def runs_table(folders: Sequence[str | Path]) -> pd.DataFrame:
    """What each rule of each run reports on ``test`` at the largest token budget, with its controls and side effects.

    Returns:
        a row a run and rule, in the order given: ``run``, ``pair``, ``seed`` (of the split), ``kind``, ``operator``,
        ``gate`` (whether grafts are conditional), ``budget`` (tokens), the columns of ``rules.csv`` about one K
        (accuracies, differences and ``parameter_share`` are shares, ``recovery`` is in per cent), ``candidates``,
        ``after_low``, ``after_high`` (Wilson's 95 %), and with side effects ``perplexity_change``, ``kl`` with ``_low``
        and ``_high``, and ``worst_task``, ``worst_change`` with its ends.

    Raises:
        UsageError: a folder that holds no finished run.
    """
    import pandas as pd

    if isinstance(folders, str | Path):
        folders = [folders]
    found = [row for folder in map(Path, folders) for row in _rows(folder)]
    return pd.DataFrame(found)


def _rows(folder: Path) -> list[dict[str, Any]]:
    import pandas as pd

    if not (folder / "outcome.json").exists():
        raise UsageError(f"{folder} holds no finished run: give folders that mechtransplant run wrote")
    config = read_config(folder / "config.yaml")
    rules, results = pd.read_csv(folder / "rules.csv"), pd.read_parquet(folder / "results.parquet")
    effects = folder / "side_effects.csv"
    harm = pd.read_csv(effects) if effects.exists() else None
    budget = rules.budget.max()
    results = results[results.budget == budget]
    test = results[results.split == "test"]
    everything = test[test.role == "all"]
    rows = []
    for rule in rules[rules.budget == budget].to_dict("records"):
        grafted = _same_graft(test[test.role == "graft"], rule).iloc[0]
        row = {
            "run": folder.name,
            # as it was turned, where the better model became the source
            "pair": json.loads((folder / "environment.json").read_text(encoding="utf-8"))["pair"],
            "seed": config.split.seed,
            "kind": "+".join(config.kinds),
            "operator": _operator(config.operator),
            "gate": config.gate is not None,
            "budget": int(budget),
            "candidates": int(everything.k.iloc[0]) if len(everything) else None,
            **{key: rule[key] for key in _FROM_RULES},
            **{key: rule[key] for key in _SOMETIMES if key in rule},
            "after_low": grafted.low,
            "after_high": grafted.high,
        }
        if harm is not None:
            row |= _harm(_same_graft(harm[harm.role == "graft"], rule))
        rows.append(row)
    return rows


def _same_graft(table: pd.DataFrame, rule: dict[str, Any]) -> pd.DataFrame:
    same = (table["rule"] == rule["rule"]) & (table.k == rule["k"])
    # strengths have fewer digits in a CSV file
    return table[same & ((table.strength - rule["strength"]).abs() < 1e-6)]


def _harm(rows: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, what in (("perplexity_change", "perplexity"), ("kl", "KL")):
        for row in rows[rows.what == what].itertuples():
            found |= {name: row.change, f"{name}_low": row.low, f"{name}_high": row.high}
    tasks = rows[rows.kind == "task"]
    if len(tasks):
        worst = tasks.iloc[int(tasks.change.argmin())]
        found |= {"worst_task": worst.what, "worst_change": worst.change}
        found |= {"worst_change_low": worst.low, "worst_change_high": worst.high}
    return found


def _operator(given: str | dict[str, Any]) -> str:
    """An operator's name, with the rank of one that has one: another rank is another recipe."""
    name = given if isinstance(given, str) else str(given["name"])
    rank = getattr(get_operator(given), "rank", None)
    return name if rank is None else f"{name} of rank {rank}"
