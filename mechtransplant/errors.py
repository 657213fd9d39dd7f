"""Errors that a user can cause; the command line prints their one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Bad input: the message says what was wrong, what was expected and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class UnknownNameError(UsageError):
    """A name that is not in a registry; the message lists the nearest ones."""

    def __init__(self, kind: str, name: object, known: Iterable[str], advice: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        else:
            shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
            hint = f"known: {shown or 'none'}."
        super().__init__(f"unknown {kind} {str(name)!r}: {hint} {advice}".strip())


class WeightsError(UsageError):
    """A weight file that is missing, truncated, has the wrong hash, or cannot be fetched."""


class CompatibilityError(UsageError):
    """Two models between which nothing can be grafted."""


class TaskError(UsageError):
    """A task file or a split that cannot be used."""
