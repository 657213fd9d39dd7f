"""Steps of a search that are kept as they are done, so that a search which is ended goes on where it was.

A rule whose steps take long passes each through :func:`kept`; whoever runs the rule says with :func:`keeping` where.
Without that, a step is computed. :func:`layer_by_layer` makes steps of modules that are tried one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError
from mechtransplant.modules import parse_address

Floats = NDArray[np.float64]

#: (what a step is, how it is computed) → its values, as JSON has them
Keep = Callable[[dict[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]

#: modules that are tried before they are kept as one step
STEP = 64

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


def layer_by_layer(modules: Sequence[str], what: dict[str, Any], compute: Callable[[list[str]], Floats]) -> Floats:
    """One number a module, in their order, where a few layers are a step; ``what`` tells this search from others.

    A layer's modules stay together, so that steps change no rounding. Raises UsageError where there is no module.
    """
    if not modules:
        raise UsageError("there is no module to try: name a kind that the models have")
    found = np.empty(len(modules))
    for chosen in _by_layers(modules):
        names = [modules[i] for i in chosen]
        found[chosen] = kept({"modules": names, **what}, partial(compute, names))
    return found


def _by_layers(modules: Sequence[str]) -> list[list[int]]:
    """The numbers of the modules of some layers together: enough that to begin anew costs little."""
    layers = [parse_address(m).layer for m in modules]
    parts: list[list[int]] = [[]]
    for layer in sorted(set(layers)):
        if len(parts[-1]) >= STEP:
            parts.append([])
        parts[-1] += [i for i, its in enumerate(layers) if its == layer]
    return parts
