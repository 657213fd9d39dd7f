"""What one run may take from another: its finished cells, and the versions and devices that made them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError
from mechtransplant.experiment.cells import finished_cells


@dataclass(frozen=True)
class Reused:
    """Cells by key, and the starts of the folder that they are from."""

    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, folder: Path | None) -> Reused:
        """Those of a run's folder, finished or not; nothing of none. Raises UsageError for what is no run's folder."""
        if folder is None:
            return cls()
        try:
            environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
            starts = [{**start, "reused": folder.name} for start in environment["starts"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{folder} holds no run whose cells could be used again: give a folder that mechtransplant run wrote"
            ) from error
        return cls(finished_cells(folder / "cells.jsonl"), tuple(starts))
