"""Ctrl-C at the wrong moment: hold it back while weights are being written or restored, and raise it right after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


class InterruptGuard:
    """Defers SIGINT while protected code is on the stack; anywhere else Ctrl-C works as before.

    A flag that the protected code sets would leave the moments before it is set. The handler looks at the interrupted
    stack instead, so a protected function is covered from its first instruction to its last.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.pending = False
        self._protected: set[CodeType] = set()
        self._previous: Any = None

    def protect(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: SIGINT waits while this function is on the stack and the guard is held."""
        self._protected.add(function.__code__)
        return function

    def hold(self) -> None:
        """Put the handler in place (once, for nested holds); only the main thread receives signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self.depth == 0:
            previous = signal.getsignal(signal.SIGINT)
            if not callable(previous):
                return
            self._previous = previous
            signal.signal(signal.SIGINT, self._handle)
        self.depth += 1

    def release(self) -> None:
        """Take the handler away when the outermost hold ends, and raise a Ctrl-C that was held back."""
        if self.depth == 0 or threading.current_thread() is not threading.main_thread():
            return
        self.depth -= 1
        if self.depth == 0:
            signal.signal(signal.SIGINT, self._previous)
        # read after the handler is gone: from here on a Ctrl-C raises by itself
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        inner = frame
        while inner is not None:
            if inner.f_code in self._protected:
                self.pending = True
                return
            inner = inner.f_back
        self._previous(number, frame)


guard = InterruptGuard()
