"""Cells of a run computed again from its config: the same verdicts, the same log-probabilities, or what differs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import FolderError, UsageError, check_count, check_seed
from mechtransplant.experiment.cells import cell_key, finished_cells
from mechtransplant.experiment.config import read_config
from mechtransplant.experiment.evaluator import Cell, Evaluator, bools
from mechtransplant.experiment.setup import Setup
from mechtransplant.progress import track

if TYPE_CHECKING:
    import pandas as pd

#: roles that are another body than the target under a graft of the source
_BODIES = {"source": "source", "reverse": "reverse", "self": "self"}


def recheck(folder: str | Path, cells: int = 1, seed: int = 0, progress: bool = False) -> pd.DataFrame:
    """Compute some of a run's evaluations again, drawn by a seed, and compare them with what the folder holds.

    The config, the weights and the questions decide a cell's key, so only what is the same cell is compared.

    Args:
        cells: how many; all where there are fewer. The ungrafted models count as cells.

    Returns:
        a row a cell and token budget: split, role, k, strength, budget, accuracy, again (both shares), differ (verdicts
        that differ), nats (largest difference of a question's log-probability, or of the mean where only that was kept;
        missing where none was), same (no verdict differs, and no log-probability to seven digits).

    Raises:
        UsageError: a folder without cells, or one whose weights or questions are others now.
    """
    import pandas as pd

    check_count("cells", cells)
    check_seed(seed)
    folder = Path(folder)
    if not (folder / "config.yaml").exists() or not (folder / "cells.jsonl").exists():
        raise FolderError(f"{folder} holds no run: give a folder that mechtransplant run wrote")
    known = {key: cell for key, cell in finished_cells(folder / "cells.jsonl").items() if "budgets" in cell}
    if not known:
        raise FolderError(f"{folder} holds no evaluation yet: start its run again first")
    setup = Setup(read_config(folder / "config.yaml"))
    evaluator = _evaluator(setup, folder)
    drawn = sorted(np.random.default_rng(seed).permutation(len(known))[:cells])
    rows: list[dict[str, Any]] = []
    for key in track([list(known)[int(i)] for i in drawn], "cells", progress):
        stored = known[key]
        wanted = _wanted(stored)
        if cell_key(evaluator.content(wanted)) != key:
            # a run that took the better model for its source began with the other one
            setup.turn()
            evaluator = _evaluator(setup, folder)
        if cell_key(evaluator.content(wanted)) != key:
            raise UsageError(
                f"the config of {folder} does not make its cell {key} any more (other weights, questions or version): "
                "its numbers and new ones cannot be compared"
            )
        again = evaluator.compute(wanted)
        for budget, old in stored["budgets"].items():
            rows.append({"budget": int(budget), **_compared(stored, old, again["budgets"][budget])})
    columns = ["split", "role", "k", "strength", "budget", "accuracy", "again", "differ", "nats", "same"]
    return pd.DataFrame(rows, columns=columns)


def _evaluator(setup: Setup, folder: Path) -> Evaluator:
    """An evaluator of the pair as it is turned now, with the gate of the folder."""
    if setup.gating is not None and (folder / "gate.json").exists():
        setup.gating.settle(folder)
    return Evaluator(setup)


def _wanted(stored: dict[str, Any]) -> Cell:
    """The cell that was asked for."""
    whole = any("digest" in found for found in stored["budgets"].values())
    body: Any = _BODIES.get(stored["role"], "graft")
    strengths = tuple(stored.get("strengths", ()))
    return Cell(
        stored["split"], stored["role"], tuple(stored["modules"]), stored["strength"], body, whole, strengths,
        stored.get("operator"),
    )  # fmt: skip


def _compared(stored: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    before, after = bools(old["correct"]), bools(new["correct"])
    name = next((n for n in ("log_probability", "log_probability_mean") if n in old and n in new), None)
    nats = None if name is None else float(np.max(np.abs(np.subtract(old[name], new[name]))))
    differ = int((before != after).sum())
    # kept to seven digits
    close = name is None or bool(np.allclose(old[name], new[name], rtol=2e-7, atol=0))
    return {
        **{key: stored[key] for key in ("split", "role", "k", "strength")},
        "accuracy": float(before.mean()),
        "again": float(after.mean()),
        "differ": differ,
        "nats": nats,
        "same": differ == 0 and close,
    }
