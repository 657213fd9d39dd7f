"""Steps of a search that are kept as they are done, so that a search which is ended goes on where it was.

A rule whose steps take long passes each through :func:`kept`; whoever runs the rule says with :func:`keeping` where.
Without that, a step is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: (what a step is, how it is computed) → its values, as JSON has them
Keep = Callable[[dict[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]

_KEEP: ContextVar[Keep | None] = ContextVar("keep", default=None)


@contextmanager
def keeping(keep: Keep) -> Iterator[None]:
    """A block in which steps are kept: ``keep`` gives a step's values, those it has or those it computes and stores."""
    token = _KEEP.set(keep)
    try:
        yield
    finally:
        _KEEP.reset(token)


def kept(what: dict[str, Any], compute: Callable[[], Floats]) -> Floats:
    """The numbers of a search's step; ``what`` tells it from the other steps of the same search, as JSON."""
    keep = _KEEP.get()
    if keep is None:
        return compute()
    # JSON gives a float back to the bit
    return np.array(keep(what, lambda: {"values": [float(v) for v in compute()]})["values"])
