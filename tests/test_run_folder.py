"""Folders of results: one writer at a time, one content, and errors that name the right file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mechtransplant.errors import UsageError
from mechtransplant.experiment.folder import Starts, begin, check_ours, locked


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to .*run: Not a directory"), locked(tmp_path / "file" / "run"):
        pass


def test_two_writers(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(UsageError, match="another process"), locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_no_room_names_the_folder(tmp_path: Path, code: int) -> None:
    with pytest.raises(UsageError, match=f"cannot write to .*/run: {os.strerror(code)}"), locked(tmp_path / "run"):
        raise OSError(code, os.strerror(code))


def test_an_error_about_another_file_is_not_the_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights"), locked(tmp_path / "run"):
        (tmp_path / "weights").read_bytes()
    elsewhere = OSError(errno.EROFS, os.strerror(errno.EROFS), "/cache/model")
    with pytest.raises(OSError, match="/cache/model"), locked(tmp_path / "run"):
        raise elsewhere
    inside = tmp_path / "run" / "table.csv"
    with pytest.raises(UsageError, match="cannot write to"), locked(tmp_path / "run"):
        inside.read_bytes()
    with pytest.raises(UsageError, match="cannot write to"), locked(tmp_path / "run"):
        os.replace(inside, inside.with_name("other"))


def test_a_relative_folder_is_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="cannot write to run: "), locked(Path("run")):
        (tmp_path / "run" / "table.csv").read_bytes()


def test_what_a_folder_began_with_decides(tmp_path: Path) -> None:
    began = {"config": {"seed": 1}, "weights": "a"}
    begin(tmp_path, began)
    begin(tmp_path, began)
    noted = json.loads((tmp_path / "environment.json").read_text())
    assert noted["weights"] == "a" and len(noted["starts"]) == 1
    with pytest.raises(UsageError, match="begun with different weights"):
        begin(tmp_path, {**began, "weights": "b"})
    # an entry that the folder lacks is another content, unless it was added later
    with pytest.raises(UsageError, match="begun with different questions"):
        begin(tmp_path, {**began, "questions": 3})
    Starts(tmp_path, {**began, "questions": 3}, ("weights",), added=("questions",))
    with pytest.raises(UsageError, match="begun with different questions"):
        Starts(tmp_path, {**began, "questions": 4}, ("weights",), added=("questions",))
    assert json.loads((tmp_path / "environment.json").read_text())["questions"] == 3


def test_another_version_is_noted_beside(tmp_path: Path) -> None:
    begin(tmp_path, {"config": {}})
    path = tmp_path / "environment.json"
    noted = json.loads(path.read_text())
    noted["starts"][0]["threads"] = 99
    path.write_text(json.dumps(noted))
    begin(tmp_path, {"config": {}})
    threads = [start["threads"] for start in json.loads(path.read_text())["starts"]]
    assert len(threads) == 2 and threads[0] == 99


@pytest.mark.parametrize("content", ["{", "[]", '{"config": {}}', "3"])
def test_a_broken_note_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(UsageError, match=r"environment\.json is broken"):
        begin(tmp_path, {"config": {}})
    assert (tmp_path / "environment.json").read_text() == content


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="holds no such analysis"):
        check_ours(tmp_path, "analysis")
    for content in ("[]", "{", '{"what": "a run"}', "{}"):
        (tmp_path / "environment.json").write_text(content)
        check_ours(tmp_path, "analysis")
        with pytest.raises(UsageError, match="holds no such benchmark"):
            check_ours(tmp_path, "benchmark", what="a benchmark")
