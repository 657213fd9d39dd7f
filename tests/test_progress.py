"""What long work says: bars where somebody watches, lines with a time where somebody asks, and else nothing."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mechtransplant import progress


def test_a_loop_says_when_it_begins_goes_on_and_ends(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "mechtransplant"):
        assert list(progress.track("abcdef", "letters")) == list("abcdef")
        assert list(progress.track(iter("ab"), "unknown")) == ["a", "b"]
        list(progress.track("ab", "silent", show=False))
    assert caplog.messages == [
        "letters: begins (6 steps)",
        "letters: 3 of 6 after 75 s",
        "letters: 6 of 6 after 2.5 min",
        "letters: done after 2.9 min",
        "unknown: begins",
        "unknown: done after 75 s",
    ]


def test_a_bar_that_is_stopped_says_no_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mechtransplant"):
        with pytest.raises(ZeroDivisionError):
            for _ in progress.track("abc", "letters"):
                raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), progress.bar(2, "half") as advance:
            advance()
            raise ZeroDivisionError
        with progress.bar(2, "cells") as advance:
            assert caplog.messages[-1] == "cells: begins (2 steps)"
            advance()
            advance()
    assert caplog.messages == [
        "letters: begins (3 steps)", "half: begins (2 steps)", "cells: begins (2 steps)", "cells: done after 1 s",
    ]  # fmt: skip


def test_nobody_who_did_not_ask_sees_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress.track("abc", "letters"))
    progress.announce(lambda: pytest.fail("made for nobody"))
    assert capsys.readouterr() == ("", "")


def test_bars_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress.track("abc", "letters"))
    progress.announce(lambda: "three letters")
    assert "letters" in sys.stderr.getvalue() and "three letters\n" in sys.stderr.getvalue()


def test_verbose_gives_lines_with_the_time(tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "mechtransplant.cli", "--verbose", "shifts", "family/planted-mlps"]
    asked += ["--prompts", "8", "--permutations", "200", "--out", str(tmp_path / "out")]
    said = subprocess.run(asked, capture_output=True, text=True, check=True)
    lines = [line for line in said.stderr.splitlines() if re.match(r"\d\d:\d\d:\d\d \S.*: (begins|done after)", line)]
    assert len(lines) >= 2, said.stderr
