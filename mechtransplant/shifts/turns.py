"""Two forward passes in turns on one thread: each goes on until it has nothing to do before the other has caught up.

Both models of a pair pass the same places in the same order. Run one after the other, all that the first wrote would
have to be held until the second comes by; run in turns, one place's tensors are.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet


@dataclass(frozen=True)
class Alone:
    """A computation without another beside it: the first of two, or the second."""

    in_second: bool


class Turns:
    """A second computation beside the first; ``in_second`` says which of the two is running."""

    def __init__(self, second: Callable[[], Any]) -> None:
        self._first, self._second = getcurrent(), greenlet(second)
        self._second.gr_context = contextvars.copy_context()

    @property
    def in_second(self) -> bool:
        """Whether the code that asks is part of the second computation."""
        return getcurrent() is self._second

    def advance(self) -> None:
        """From the first: let the second go on until it waits, or ends. Its errors are raised here."""
        if not self._second.dead:
            self._second.switch()

    def wait(self) -> None:
        """From the second: go on with the first, until it calls :meth:`advance`."""
        self._first.switch()

    def end(self, failed: bool) -> None:
        """From the first, when it is done: the second runs to its end, or is given up."""
        if not failed:
            self.advance()
        if not self._second.dead:
            self._second.throw(GreenletExit)
            if not failed:
                raise RuntimeError("the two models did not pass the same modules")
