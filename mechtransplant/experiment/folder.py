"""A folder that one process at a time writes, that says what its numbers depend on, and that can be continued."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import FolderError, UsageError
from mechtransplant.experiment.asked import same_asked
from mechtransplant.experiment.cells import write_atomically
from mechtransplant.experiment.environment import versions

if TYPE_CHECKING:
    from mechtransplant.pair import Pair

ELSEWHERE = "choose another --out folder"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock.

    Raises UsageError where another process holds it, and where the folder cannot be written; an error about another
    file passes as it is.
    """
    from filelock import FileLock, Timeout

    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = lock.exists()
        with FileLock(lock, timeout=0):
            try:
                yield
            except UsageError:
                # a folder that was refused is left as it was found
                if not there:
                    lock.unlink(missing_ok=True)
                raise
    except Timeout as error:
        raise FolderError(f"another process is running in {folder}: wait for it, or {ELSEWHERE}") from error
    except OSError as error:
        if not _is_about(folder, error):
            raise
        raise FolderError(f"cannot write to {folder}: {error.strerror or error}; {ELSEWHERE}") from error


def _is_about(folder: Path, error: OSError) -> bool:
    named = [Path(str(name)).absolute() for name in (error.filename, error.filename2) if name]
    whole = folder.absolute()
    # a write that finds no room names no file; making the folder may fail at one of its parents
    return not named or any(path.is_relative_to(whole) or whole.is_relative_to(path) for path in named)


def begin(folder: Path, began: dict[str, Any], compared: Sequence[str] = ()) -> None:
    """Note the config and what the numbers depend on; refuse a folder that holds something else.

    A later start with other versions or threads is noted beside the earlier ones, never instead of them. ``compared``:
    the entries in which an earlier start must agree, by default all.
    """
    import yaml

    check_ours(folder, "analysis")
    write_starts(folder, began, tuple(compared or began))
    write_atomically(folder / "config.yaml", str(yaml.safe_dump(began["config"], sort_keys=False)))


def write_compatibility(folder: Path, pair: Pair) -> None:
    """Write ``compatibility.csv``: what matches between the two models, and what stays the target's."""
    write_atomically(folder / "compatibility.csv", pair.compatibility.table.to_csv(index=False, na_rep="none"))


def check_begun(folder: Path, began: dict[str, Any]) -> None:
    """Refuse a folder that :func:`begin` would refuse; writes nothing."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file: {ELSEWHERE}")
    if folder.exists():
        check_ours(folder, "analysis")
        _earlier_starts(folder, began, tuple(began))


def check_ours(folder: Path, name: str, **wanted: str) -> None:
    """Refuse a folder that holds files and no ``environment.json``, or one without the wanted entries."""
    if all(p.name == ".lock" for p in folder.iterdir()):
        return
    path = folder / "environment.json"
    ours = path.exists()
    if ours and wanted:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            ours = all(saved.get(key) == value for key, value in wanted.items())
        except (ValueError, AttributeError):
            ours = False
    if not ours:
        raise FolderError(f"{folder} is not empty and holds no such {name}: {ELSEWHERE}")


def write_starts(folder: Path, began: dict[str, Any], compared: Sequence[str]) -> None:
    """Write ``environment.json`` with this start beside the earlier ones; see :class:`Starts`."""
    Starts(folder, began, compared).note()


class Starts:
    """``environment.json``: what was begun, and the versions of every start that its results come from.

    The first start is noted at once, a later one by :meth:`note`, before it computes anything: one that only writes
    pages again is none of those. ``compared``: the entries in which an earlier start must agree; ``added``: those that
    a folder may lack, since they were not always noted; ``start``: what this one adds to its versions. Raises
    UsageError where an entry differs, and for a file that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        began: dict[str, Any],
        compared: Sequence[str],
        added: Sequence[str] = (),
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.began = folder / "environment.json", began
        self.now = {**versions(), **(start or {})}
        self.noted = _earlier_starts(folder, began, compared, added)
        self._write(() if self.noted else (self.now,))

    def note(self, *others: dict[str, Any]) -> None:
        """Note this start, or those of another folder that something is taken from."""
        new = [one for one in others or (self.now,) if one not in self.noted]
        if new:
            self._write(new)

    def _write(self, new: Sequence[dict[str, Any]]) -> None:
        self.noted += new
        write_atomically(self.path, json.dumps({**self.began, "starts": self.noted}, indent=1) + "\n")


def _earlier_starts(
    folder: Path, began: dict[str, Any], compared: Sequence[str], added: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The starts that ``environment.json`` notes, where they agree with what is begun; see :func:`write_starts`."""
    path = folder / "environment.json"
    if not path.exists():
        return []
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        wanted = [*compared, *(what for what in added if what in saved)]
        alike = {"asked": same_asked}
        changed = [what for what in wanted if not alike.get(what, eq)(saved.get(what), began[what])]
        starts = list(saved["starts"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} is broken ({error}): {ELSEWHERE}, or remove it") from error
    if changed:
        what = "prompts, end tokens or model settings" if changed[0] == "asked" else changed[0]
        raise FolderError(
            f"{folder} was begun with different {what} (see its environment.json): {ELSEWHERE}, or remove it"
        )
    return starts
