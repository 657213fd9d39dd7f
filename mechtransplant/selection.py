"""Which questions chose a set of modules, so that nobody reports an effect on them.

A ranking's module names are strings that remember their :class:`Selection`: the questions that ranked them, and those
on which grafts of them were tried since. A graft has the selections of its modules, an evaluation those of the grafts
in place, and ``compare`` refuses an evaluation whose questions are among them, whatever split they are said to be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Selection:
    """The questions (their keys) that served to select; it grows while grafts are tried on other selecting splits."""

    def __init__(self, questions: Iterable[str] = ()) -> None:
        self.questions: set[str] = set(questions)

    def __repr__(self) -> str:
        return f"Selection({len(self.questions)} questions)"


class SelectedModule(str):
    """A module's address that remembers what selected it; otherwise a plain string."""

    __slots__ = ("selection",)
    selection: Selection

    def __new__(cls, address: str, selection: Selection) -> SelectedModule:
        made = super().__new__(cls, address)
        made.selection = selection
        return made

    # pickling and copying by way of str would lose the selection
    def __reduce__(self) -> tuple[Any, ...]:
        return SelectedModule, (str(self), self.selection)


def selections_of(modules: Iterable[Any]) -> tuple[Selection, ...]:
    """The different selections that some module names remember, in their order."""
    found = {id(m.selection): m.selection for m in modules if isinstance(m, SelectedModule)}
    return tuple(found.values())


_IN_PLACE: weakref.WeakKeyDictionary[Any, list[tuple[Selection, ...]]] = weakref.WeakKeyDictionary()


def selections_on(hf: Any) -> tuple[Selection, ...]:
    """What selected the modules that act on a model now."""
    found = {id(s): s for several in _IN_PLACE.get(hf, []) for s in several}
    return tuple(found.values())


def put_on(hf: Any, selections: tuple[Selection, ...]) -> None:
    """Modules of these selections act on the model from now on."""
    if selections:
        _IN_PLACE.setdefault(hf, []).append(selections)


def take_off(hf: Any, selections: tuple[Selection, ...]) -> None:
    """The opposite of :func:`put_on`, once."""
    if selections:
        _IN_PLACE[hf].remove(selections)


@contextmanager
def acting(hf: Any, selections: tuple[Selection, ...]) -> Iterator[None]:
    """Modules of these selections act on the model within this block."""
    put_on(hf, selections)
    try:
        yield
    finally:
        take_off(hf, selections)
