"""Which questions chose a set of modules, so that nobody reports an effect on them by accident.

A ranking's module names are strings that remember their :class:`Selection`: the questions that ranked them, and those
on which grafts of them were tried since. A graft has the selections of its modules, an evaluation those of what is in
place, and ``compare`` refuses an evaluation whose questions are among them, whatever split they are said to be.

Names that went through a file or a plain list of strings have forgotten; a graft of exactly the K highest modules of a
ranking of the same target in the same process is recognised all the same. Modules that a person picks by hand are
nobody's selection.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

#: the key of a frame's ``attrs`` that holds the questions it was measured on
QUESTIONS = "questions"


class Selection:
    """The questions (their keys) that served to select; it grows while grafts are tried on other selecting splits.

    ``tried``: for questions that report, by their task's fingerprint, which different grafts were evaluated there.
    """

    def __init__(self, questions: Iterable[str] = ()) -> None:
        self.questions: set[str] = set(questions)
        self.tried: dict[str, set[Any]] = {}

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


def remembering(modules: Iterable[str], questions: Iterable[str]) -> pd.Series:
    """Module names as a column that remembers the questions that selected them, or that none did.

    A Series of objects with the index of ``modules``, if that is one: pandas would turn an array of them into its own
    strings, which remember nothing.
    """
    import pandas as pd

    selection = Selection(questions)
    names = [SelectedModule(str(m), selection) for m in modules]
    return pd.Series(names, index=getattr(modules, "index", None) if hasattr(modules, "iloc") else None, dtype=object)


def remember(table: pd.DataFrame, *measured: Any) -> pd.DataFrame:
    """A table of modules, whose names remember the questions of the frames that it was made from."""
    questions = [q for frame in measured for q in getattr(frame, "attrs", {}).get(QUESTIONS, ())]
    if questions and "module" in table:
        table = table.assign(module=remembering(table.module, questions))
    return table


# --- rankings of a target ---------------------------------------------------------------------------------------------

_RANKINGS: weakref.WeakKeyDictionary[Any, list[tuple[tuple[str, ...], Selection]]] = weakref.WeakKeyDictionary()


def note_ranking(hf: Any, order: Sequence[Any]) -> None:
    """A ranking was made for a target: a graft of its K highest modules is its selection, however it is spelt."""
    selections = selections_of(order[:1])
    if selections and selections[0].questions:
        _RANKINGS.setdefault(hf, []).append((tuple(str(m) for m in order), selections[0]))


def selected_by(hf: Any, modules: Sequence[Any]) -> tuple[Selection, ...]:
    """What selected some modules of a target: what they remember, else the rankings whose highest they are."""
    own = selections_of(modules)
    if own or not len(modules):
        return own
    wanted = {str(m) for m in modules}
    return tuple(s for order, s in _RANKINGS.get(hf, []) if wanted == set(order[: len(wanted)]))


# --- what acts on a model now -----------------------------------------------------------------------------------------

_IN_PLACE: weakref.WeakKeyDictionary[Any, list[tuple[tuple[Selection, ...], Any]]] = weakref.WeakKeyDictionary()


def selections_on(hf: Any) -> tuple[Selection, ...]:
    """What selected the modules that act on a model now."""
    found = {id(s): s for several, _ in _IN_PLACE.get(hf, []) for s in several}
    return tuple(found.values())


def what_acts_on(hf: Any) -> tuple[Any, ...]:
    """What acts on a model now, as labels that differ where it differs."""
    return tuple(label for _, label in _IN_PLACE.get(hf, []))


def put_on(hf: Any, selections: tuple[Selection, ...], label: Any = None) -> None:
    """Modules of these selections act on the model from now on."""
    if selections:
        _IN_PLACE.setdefault(hf, []).append((selections, label))


def take_off(hf: Any, selections: tuple[Selection, ...], label: Any = None) -> None:
    """The opposite of :func:`put_on`, once."""
    if selections:
        _IN_PLACE[hf].remove((selections, label))
