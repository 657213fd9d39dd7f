"""How long work tells where it is: bars in terminals and notebooks, and lines of the logger "mechtransplant".

Bars are tqdm's, and quiet where nobody watches. Lines are Python's own logging at the level INFO: nothing shows them
until somebody asks, with ``logging.basicConfig(level="INFO")`` or ``mechtransplant --verbose``.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")

LOG = logging.getLogger("mechtransplant")
LOG.addHandler(logging.NullHandler())
#: seconds between two lines about one loop
EVERY = 60.0


def track(items: Iterable[Item], what: str, show: bool = True, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar on the error stream when it is a terminal (or a notebook), and lines in the log."""
    from tqdm.auto import tqdm

    shown = tqdm(items, desc=what, total=total, leave=False, disable=not (show and shows()))
    return _logged(shown, what) if show and LOG.isEnabledFor(logging.INFO) else shown


class Lines:
    """The log's lines about one loop: when it begins and ends, and one a minute between."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = self.last = time.monotonic()
        LOG.info("%s: begins%s", what, "" if total is None else f" ({total:,} steps)")

    def step(self) -> None:
        """Another step is done."""
        self.done += 1
        now = time.monotonic()
        if now - self.last >= EVERY:
            self.last = now
            whole = "" if self.total is None else f" of {self.total:,}"
            LOG.info("%s: %s%s after %s", self.what, f"{self.done:,}", whole, in_words(now - self.began))

    def end(self) -> None:
        """All steps are done."""
        LOG.info("%s: done after %s", self.what, in_words(time.monotonic() - self.began))


def _logged(items: Any, what: str) -> Iterator[Any]:
    """The items of a bar, with lines in the log."""
    lines = Lines(what, items.total)
    for item in items:
        yield item
        lines.step()
    lines.end()


def shows() -> bool:
    """Whether somebody watches: the error stream is a terminal, or this is a notebook."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def say(text: str) -> None:
    """A line on the error stream, between bars."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)


def announce(text: Callable[[], str]) -> None:
    """A line for whoever watches the error stream or the log; made only where somebody does."""
    if LOG.isEnabledFor(logging.INFO):
        LOG.info(text())
    elif shows():
        say(text())


def in_words(seconds: float) -> str:
    """``10_800`` → "3 h"."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


class BetweenBars(logging.Handler):
    """Writes a log's lines to the error stream, with the time of day, without tearing a bar apart."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record))
        except Exception:
            self.handleError(record)


@contextmanager
def bar(total: int, what: str, show: bool = True) -> Iterator[Callable[[], object]]:
    """A bar that the function which it gives advances by one, and lines in the log."""
    from tqdm.auto import tqdm

    lines = Lines(what, total) if show and LOG.isEnabledFor(logging.INFO) else None
    with tqdm(total=total, desc=what, leave=False, disable=not (show and shows())) as shown:

        def advance() -> None:
            shown.update()
            if lines is not None:
                lines.step()

        yield advance
        if lines is not None:
            lines.end()
