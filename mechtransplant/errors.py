"""Errors that a user can cause; the command line prints their one line and exits with code 2."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real


class UsageError(Exception):
    """Bad input: the message says what was wrong, what was expected and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def one_line(error: BaseException) -> str:
    """The first line of another library's message, to stand inside one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class FolderError(UsageError):
    """A folder that is another's, or cannot be written."""


@contextmanager
def wrong_in(where: object) -> Iterator[None]:
    """Every UsageError inside, but for those about a folder, says first where the fault lies: in which file."""
    try:
        yield
    except FolderError:
        raise
    except UsageError as error:
        error.args = (f"{where}: {error}",)
        raise


def check_count(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Raise UsageError unless ``value`` is a whole number (numpy's too) from ``least`` to ``most``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        upper = "" if most is None else f" and at most {most}"
        raise UsageError(f"{name} must be a whole number of at least {least}{upper}, got {value!r}")


def finite_number(name: str, value: object) -> float:
    """The value as a float; raises UsageError unless it is one finite number (numpy's and torch's 0-d ones too)."""
    plain = value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise UsageError(f"{name} is one number, got {value!r}")
    if not math.isfinite(plain):
        raise UsageError(f"{name} must be a finite number, got {value!r}")
    return float(plain)


def check_seed(value: object) -> None:
    """Raise UsageError unless ``value`` can seed a generator: a whole number from 0 on."""
    check_count("seed", value, least=0)


def check_level(value: object) -> None:
    """Raise UsageError unless ``value`` is a confidence level from 0.5 up to, not including, 1."""
    if not isinstance(value, Real) or not 0.5 <= float(value) < 1:
        raise UsageError(f"level must be a number from 0.5 up to 1, for example 0.95, got {value!r}")


class UnknownNameError(UsageError):
    """A name that is not in a registry; the message lists the nearest ones."""

    def __init__(self, kind: str, name: object, known: Iterable[str], advice: str = "") -> None:
        known = sorted(known)
        lower = {k.lower(): k for k in known}
        near = [lower[n] for n in difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.4)]
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
