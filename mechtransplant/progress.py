"""Progress bars: tqdm's, in terminals and notebooks; quiet anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, show: bool = True, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar on the error stream when it is a terminal (or a notebook)."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, total=total, leave=False, disable=not (show and shows()))


def shows() -> bool:
    """Whether somebody watches: the error stream is a terminal, or this is a notebook."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def say(text: str) -> None:
    """A line on the error stream, between bars."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)


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
