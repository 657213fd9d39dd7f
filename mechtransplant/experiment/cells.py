"""The finished cells of a run: one JSON line each, appended and synced, so that a killed run loses nothing finished.

A cell is one evaluation. Its key is a hash of everything that decides its value, so a run that is started again finds
what it has done, and nothing is computed twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError


def cell_key(content: dict[str, Any]) -> str:
    """Twenty hexadecimal digits of a cell's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


class CellStore:
    """An append-only file of finished cells; open it only while the run's lock is held.

    ``others``: finished cells of another run, by key, which are taken instead of being computed again. ``before``:
    called before a cell is written, with whether it is one of those.
    """

    def __init__(
        self,
        path: Path,
        others: Mapping[str, dict[str, Any]] | None = None,
        before: Callable[[bool], None] = lambda taken: None,
    ) -> None:
        self.path, self.others, self.before = path, others or {}, before
        self.computed = 0
        if path.exists():
            whole = path.read_bytes()
            # a kill in the middle of a write leaves a line without its end: cut it off
            intact = whole[: whole.rfind(b"\n") + 1]
            if intact != whole:
                with path.open("r+b") as file:
                    file.truncate(len(intact))
        self.cells = finished_cells(path)

    def has(self, key: str) -> bool:
        """Whether a cell is there; where another run has it, it is now."""
        if key not in self.cells and key in self.others:
            self.before(True)
            self._append(self.others[key])
        return key in self.cells

    def get(self, content: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell's values: stored ones, or computed now and stored."""
        key = cell_key(content)
        if not self.has(key):
            self.put(key, compute())
        return self.cells[key]

    def put(self, key: str, values: dict[str, Any]) -> None:
        """Store a cell that was computed."""
        self.before(False)
        self._append({"key": key, **values})
        self.computed += 1

    def _append(self, cell: dict[str, Any]) -> None:
        """Write a cell; it is on the disk before this returns."""
        begins = not self.path.exists()
        with self.path.open("ab") as file:
            file.write((json.dumps(cell) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        if begins:
            _sync_names(self.path.parent)
        self.cells[cell["key"]] = cell


def finished_cells(path: Path) -> dict[str, dict[str, Any]]:
    """The cells of a file that may be growing, by key; raises UsageError for a whole line that is none."""
    found = {}
    whole = path.read_bytes() if path.exists() else b""
    for at, line in enumerate(whole[: whole.rfind(b"\n") + 1].splitlines(), 1):
        try:
            cell = json.loads(line)
            found[cell["key"]] = cell
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} line {at} is no finished cell ({error}): remove that line, and it is computed again"
            ) from error
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all; it is on the disk before this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # or a power cut could leave the new name with nothing behind it
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_names(path.parent)


def _sync_names(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system and the file system do that (POSIX, most of them)."""
    if os.name != "posix":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
