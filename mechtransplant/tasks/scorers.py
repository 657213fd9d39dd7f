r"""Scorers: does a generated text give the gold answer?

Each scorer is a function of (generated text, gold answer) that returns a bool:

* ``exact``: the whole text, stripped, is the answer.
* ``boxed``: the last ``\boxed{…}`` equals the answer after normalisation (the seed paper's accuracy).
* ``math``: mathematical equivalence by the math-verify library.
* ``number``: the last number of the text equals the answer's value.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mechtransplant.errors import UnknownNameError

Scorer = Callable[[str, str], bool]


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{…}`` or ``\fbox{…}`` with balanced braces, or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth, start = 1, match.end()
        for end in range(start, len(text)):
            # \{ and \} are printed braces: they do not open or close a group
            escaped = text[end - 1] == "\\" and (end < 2 or text[end - 2] != "\\")
            if escaped:
                continue
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def normalise_answer(answer: str) -> str:
    r"""The usual MATH string normalisation: spacing, units, ``\left``, ``\dfrac``, ``\text``, thousands commas.

    ``\frac12`` and ``\frac{1}{2}`` become the same string; so do ``0.5`` and ``.5``, ``x=5`` and ``5``.
    """
    text = answer.strip().rstrip(".").replace("\n", "").replace("\\!", "").replace("\\ ", " ")
    for old, new in (
        ("\\left", ""), ("\\right", ""), ("\\tfrac", "\\frac"), ("\\dfrac", "\\frac"), ("^{\\circ}", ""),
        ("^\\circ", ""), ("\\$", ""), ("$", ""), ("\\%", ""), ("%", ""), ("\\,", ""), ("\\;", ""), ("\\cdot", "*"),
    ):
        text = text.replace(old, new)
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\s*\{\s*([^{}]*?)\s*\}", lambda m: _drop_unit(m, text), text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"(?<![\d.])\.(\d)", r"0.\1", text)
    text = re.sub(r"^[a-zA-Z]=(?=.)", "", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^-\\frac", r"-\\frac", text)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)


def _drop_unit(match: re.Match[str], whole: str) -> str:
    """A trailing ``\\text{ cm}`` after a number is a unit and goes; any other text keeps its words."""
    before, after = whole[: match.start()].strip(), whole[match.end() :].strip()
    is_unit = bool(before) and not after and before[-1] in "0123456789}"
    return "" if is_unit else match.group(1)


def exact(text: str, answer: str) -> bool:
    """The stripped text equals the stripped answer."""
    return text.strip() == answer.strip()


def boxed(text: str, answer: str) -> bool:
    """The last boxed expression equals the answer after :func:`normalise_answer`; False when nothing is boxed."""
    found = extract_boxed(text)
    return found is not None and normalise_answer(found) == normalise_answer(answer)


def number(text: str, answer: str) -> bool:
    """The last number in the text has the answer's value; thousands commas are ignored."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    try:
        return bool(found) and float(found[-1].replace(",", "")) == float(answer.replace(",", ""))
    except ValueError:
        return False


def math(text: str, answer: str) -> bool:
    """The boxed expression (or, without a box, the text) is mathematically equal to the answer by math-verify."""
    from math_verify import parse, verify  # type: ignore[import-untyped]

    found = extract_boxed(text)
    # the time-outs use SIGALRM, which only works in a main thread; the inputs here are short
    gold = parse(f"${answer}$", parsing_timeout=None)
    guess = parse(f"${found}$" if found is not None else text, parsing_timeout=None)
    return bool(gold) and bool(guess) and bool(verify(gold, guess, timeout_seconds=None))


SCORERS: dict[str, Scorer] = {"exact": exact, "boxed": boxed, "number": number, "math": math}


def get_scorer(name: str) -> Scorer:
    """The scorer of that name; raises UnknownNameError."""
    if name not in SCORERS:
        raise UnknownNameError("scorer", name, SCORERS)
    return SCORERS[name]
