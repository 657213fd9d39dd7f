r"""Scorers: does a generated text give the gold answer?

Each scorer is a function of (generated text, gold answer) that returns a bool:

* ``exact``: the whole text, stripped, is the answer as the task writes it (its gold completion).
* ``boxed``: the last ``\boxed{…}`` equals the answer after normalisation (the seed paper's accuracy).
* ``math``: mathematical equivalence by the math-verify library.
* ``number``: the last number of the text equals the answer's value.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from mechtransplant.errors import UnknownNameError

Scorer = Callable[[str, str], bool]


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{…}`` or ``\fbox{…}`` with balanced braces, or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth, start = 1, match.end()
        for end in range(start, len(text)):
            # \{ and \} are printed braces: they do not open or close a group
            before = text[start:end]
            if (len(before) - len(before.rstrip("\\"))) % 2:
                continue
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def normalise_answer(answer: str, thousands: bool = True) -> str:
    r"""The usual MATH string normalisation: spacing, units, ``\left``, ``\dfrac``, ``\text``, thousands commas.

    ``\frac12`` and ``\frac{1}{2}`` become the same string; so do ``0.5`` and ``.5``, ``x=5`` and ``5``. Without
    ``thousands`` a comma always separates: ``10,200`` may be a list, which only what it is compared with can tell.
    """
    text = answer.strip().rstrip(".").replace("\n", "").replace("\\ ", " ")
    text = re.sub(r"\\!\s*", "", text)
    for old, new in (
        ("\\left", ""),
        ("\\right", ""),
        ("\\tfrac", "\\frac"),
        ("\\dfrac", "\\frac"),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
        ("$", ""),
        ("\\%", ""),
        ("%", ""),
        ("\\,", ""),
        ("\\;", ""),
        ("\\cdot", "*"),
    ):
        text = text.replace(old, new)
    whole = text
    unit = r"\\(?:text|mbox|mathrm|textbf)\s*\{\s*([^{}]*?)\s*\}(\s*\^\s*(?:\d|\{\d\}))?"
    text = re.sub(unit, lambda m: _drop_unit(m, whole), text)
    text = text.replace("{,}", ",")
    # in a tuple or a set a comma separates: (100,200) is (100, 200); so it does in 6,32,192, which is no number
    if thousands and not re.search(r"[(\[]|\\\{", text):
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!,?\d)", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"(?<![\d.])\.(\d)", r"0.\1", text)
    text = re.sub(r"^[a-zA-Z]=(?=.)", "", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^\\frac\{-(\d+)\}", r"-\\frac{\1}", text)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)


def _drop_unit(match: re.Match[str], whole: str) -> str:
    """A trailing ``\\text{ cm}`` after a number is a unit and goes; any other text keeps its words."""
    before, after = whole[: match.start()].strip(), whole[match.end() :].strip()
    is_unit = bool(before) and not after and (before[-1] in "0123456789}" or before.endswith("\\pi"))
    return "" if is_unit else match.group(1) + (match.group(2) or "")


def exact(text: str, answer: str) -> bool:
    """The stripped text equals the stripped answer."""
    return text.strip() == answer.strip()


def boxed(text: str, answer: str) -> bool:
    """The last boxed expression equals the answer after :func:`normalise_answer`; False when nothing is boxed."""
    found = extract_boxed(text)
    if found is None:
        return False
    # as numbers, or as lists that are written with a space after the comma or without
    return any(normalise_answer(found, way) == normalise_answer(answer, way) for way in (True, False))


#: a minus after a digit subtracts or joins ("3-5" ends in 5); commas count only as thousands ("1,2" ends in 2, and
#: "1,2,100" in 100)
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")


def _plain(text: str) -> str:
    """A text whose minus signs are hyphens, with spaces for dollar signs, which else would join what they separate.

    Between a sign and its number ("-$5"), and between a number and a minus ("$5$-$3$"), they go without a trace.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"(?<=[\w.)])\\?\$(?=-)|(?<=[-+])(?:\\?\$)+(?=[\d.])", "", text)
    return re.sub(r"\\?\$", " ", text)


def value_of(answer: str) -> Decimal | None:
    """The value of an answer that is one number, maybe of dollars or per cent; None of any other."""
    bare = _plain(answer).strip().rstrip(".").removesuffix("%").removesuffix("\\").strip()
    found = _NUMBER.fullmatch(bare.removeprefix("+"))
    return Decimal(found[0].replace(",", "")) if found else None


def number(text: str, answer: str) -> bool:
    """The last number in the text has the answer's value; thousands commas and dollar signs are ignored."""
    found = _NUMBER.findall(_plain(text))
    return bool(found) and Decimal(found[-1].replace(",", "")) == value_of(answer)


def math(text: str, answer: str) -> bool:
    """The boxed expression (or, without a box, the text) is mathematically equal to the answer by math-verify."""
    from math_verify import verify  # type: ignore[import-untyped]

    if boxed(text, answer):
        return True
    found = extract_boxed(text)
    if _HUGE.search(found if found is not None else text):
        return False
    gold, guess = _parsed(f"${answer}$"), _parsed(f"${found}$" if found is not None else text)
    return bool(gold) and bool(guess) and bool(verify(gold, guess, timeout_seconds=_limit()))


def _parsed(text: str) -> list[Any]:
    """What math-verify finds in a text; [] for nothing."""
    from math_verify import parse

    return list(parse(text, parsing_timeout=_limit()))


def _limit() -> int | None:
    """Seconds; None where there can be no time-out: they use SIGALRM, which only works in a main thread."""
    return 5 if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM") else None


#: Towers of powers, long exponents, and factorials of long numbers: evaluating one can take hours, and no time-out
#: interrupts the arithmetic of one big integer.
_HUGE = re.compile(r"\^\s*\{?\s*\(?\s*\d+\s*\^|\^\s*\{?\s*\d{6,}|\d{5,}\s*!|[)}\]]\s*!|\d\s*\^\s*\{?[^{}]*!")


SCORERS: dict[str, Scorer] = {"exact": exact, "boxed": boxed, "number": number, "math": math}

#: scorer → version of its verdicts; raise it with every change after which a scorer may judge a text otherwise (that of
#: ``math`` with ``boxed``, which it asks first), so that no cell that was scored before is taken for a new one
#: (``number`` is at 1 although it once joined numbers over dollar signs: answers of the committed run by it have none)
SCORING = {"exact": 1, "boxed": 1, "number": 1, "math": 1}


def scoring_of(*scorers: str) -> dict[str, dict[str, int]]:
    """What scorers add to the key of a cell: nothing at version 1, as cells from before versions were noted have."""
    versions = {name: at for name in sorted(set(scorers)) if (at := SCORING.get(name, 1)) > 1}
    return {"scoring": versions} if versions else {}


def has_answer(text: str, scorer: str) -> bool:
    """Whether a text has what a scorer compares: a box, a number, for ``math`` either or a formula, or any text."""
    if scorer == "number":
        return _NUMBER.search(text) is not None
    if scorer in ("boxed", "math") and extract_boxed(text) is not None:
        return True
    return scorer == "exact" or (scorer == "math" and not _HUGE.search(text) and bool(_parsed(text)))


def get_scorer(name: str) -> Scorer:
    """The scorer of that name; raises UnknownNameError."""
    if name not in SCORERS:
        raise UnknownNameError("scorer", name, SCORERS)
    return SCORERS[name]
