"""What one run may take from another: finished cells and rankings, and the versions and devices that made them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechtransplant.errors import FolderError
from mechtransplant.experiment.cells import finished_cells
from mechtransplant.experiment.config import RunConfig, read_config


@dataclass(frozen=True)
class Reused:
    """Cells by key, rankings by name, and the starts of the folder that they are from."""

    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    rankings: dict[str, str] = field(default_factory=dict)
    starts: tuple[dict[str, Any], ...] = ()
    #: its gate, where it is fitted alike
    gate: str | None = None
    #: what the other run's numbers depend on, besides its config
    began: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path | None, config: RunConfig) -> Reused:
        """Those of a run's folder, finished or not; nothing of none. Raises FolderError for what is no run's folder.

        Rankings are taken where the other config agrees with this one in all that decides them.
        """
        if folder is None:
            return cls()
        try:
            environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
            starts = [{"reused": folder.name, **start} for start in environment["starts"]]
            other = read_config(folder / "config.yaml")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FolderError(
                f"{folder} holds no run whose cells could be used again: give a folder that mechtransplant run wrote"
            ) from error
        rankings = {}
        if all(getattr(config, key) == getattr(other, key) for key in _RANKED_BY):
            paths = [folder / "ranking.csv", *sorted((folder / "rankings").glob("*.csv"))]
            rankings = {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in paths if p.exists()}
        gate, path = None, folder / "gate.json"
        if path.exists() and all(getattr(config, key) == getattr(other, key) for key in _GATED_BY):
            gate = path.read_text(encoding="utf-8")
        return cls(finished_cells(folder / "cells.jsonl"), rankings, tuple(starts), gate, environment)

    def rankings_for(self, began: dict[str, Any]) -> dict[str, str]:
        """The rankings, where they are of the same weights and questions as a run's (see ``run.depends_on``)."""
        others = [content.get("elsewhere", {}).get("unrelated") for content in (self.began, began)]
        return self.rankings if self._same(began) and others[0] == others[1] else {}

    def gate_for(self, began: dict[str, Any]) -> str | None:
        """The gate, where it is of the same weights and questions."""
        return self.gate if self._same(began) else None

    def _same(self, began: dict[str, Any]) -> bool:
        return all(self.began.get(key) == began.get(key) for key in ("weights", "task", "splits", "explore"))


#: keys of a config that decide a gate, and a ranking
_GATED_BY = ("pair", "task", "split", "gate", "direction", "batch_size", "dtype", "seed")
_RANKED_BY = (
    "pair", "task", "split", "rule", "rule_options", "kind", "kv", "budgets", "unrelated", "direction", "batch_size",
    "dtype", "seed",
)  # fmt: skip
