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


def _logged(items: Any, what: str) -> Iterator[Any]:
    """The items of a bar, with a line when they begin and end, and one a minute between."""
    began = last = time.monotonic()
    whole = "" if items.total is None else f" of {items.total:,}"
    LOG.info("%s: begins%s", what, "" if items.total is None else f" ({items.total:,} steps)")
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            LOG.info("%s: %s%s after %s", what, f"{done:,}", whole, in_words(now - began))
    LOG.info("%s: done after %s", what, in_words(time.monotonic() - began))


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
    """A bar that the function which it gives advances by one."""
    steps = iter(track(range(total), what, show))
    try:
        yield lambda: next(steps, None)
    finally:
        # a bar is taken away when its steps are used up
        for _ in steps:
            pass
