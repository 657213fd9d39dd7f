"""Tasks generated from a seed: the skills of the family in the repo, and short arithmetic in English.

A fifth of all questions, fixed by a hash of their text, is *held out*: the training scripts skip them, and tasks
consist of nothing else. A model is therefore never asked a question that it was trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator

import numpy as np

from mechtransplant.tasks.task import Example, PromptFormat, Task

Maker = Callable[[np.random.Generator], Example]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def held_out(question: str) -> bool:
    """Whether a question is kept out of every training set (one in five).

    A request for a box does not count: ``box: 47+85=`` is held out exactly when ``47+85=`` is.
    """
    bare = re.sub(r"^(put in )?box: | in box=$| boxed=$", "", question).rstrip("=")
    return hashlib.sha256(bare.encode()).digest()[0] % 5 == 0


def draw(makers: list[Maker], n: int, seed: int, *, held: bool | None = True) -> Iterator[Example]:
    """``n`` distinct examples, an equal share from each maker; ``held`` picks held-out, training, or any questions."""
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    misses = 0
    while len(seen) < n and misses < 20_000:
        example = makers[len(seen) % len(makers)](rng)
        if example.question in seen or (held is not None and held_out(example.question) != held):
            misses += 1
            continue
        misses = 0
        seen.add(example.question)
        yield example


# --- the family's skills: one character a token ------------------------------------------------------------------


def addition(rng: np.random.Generator, low: int = 0, high: int = 100) -> Example:
    """``47+85=`` → ``132``."""
    a, b = rng.integers(low, high, 2)
    carry = "carry" if a % 10 + b % 10 > 9 else "no-carry"
    return Example(f"{a}+{b}=", str(a + b), carry)


def _word(rng: np.random.Generator, low: int = 4, high: int = 6) -> str:
    return "".join(rng.choice(list(LETTERS[:16]), int(rng.integers(low, high + 1))))


def reverse(rng: np.random.Generator) -> Example:
    """``rev fkqpa=`` → ``apqkf``."""
    word = _word(rng)
    return Example(f"rev {word}=", word[::-1], f"length-{len(word)}")


def sort(rng: np.random.Generator) -> Example:
    """``sort fkapb=`` → ``abfkp``."""
    word = _word(rng)
    return Example(f"sort {word}=", "".join(sorted(word)), f"length-{len(word)}")


def copy(rng: np.random.Generator) -> Example:
    """``copy fkqpa=`` → ``fkqpa``."""
    word = _word(rng)
    return Example(f"copy {word}=", word, f"length-{len(word)}")


def maximum(rng: np.random.Generator) -> Example:
    """``max 31 75 62=`` → ``75``."""
    numbers = rng.integers(10, 100, 3)
    return Example(f"max {' '.join(map(str, numbers))}=", str(numbers.max()), f"place-{int(numbers.argmax())}")


SKILLS: dict[str, Maker] = {
    "addition": addition,
    "reverse": reverse,
    "sort": sort,
    "copy": copy,
    "max": maximum,
}


def descending(rng: np.random.Generator) -> Example:
    """``rev sort fkapb=`` → ``pkfba``: the letters of a word in descending order."""
    word = _word(rng)
    return Example(f"rev sort {word}=", "".join(sorted(word, reverse=True)), f"length-{len(word)}")


def minimum(rng: np.random.Generator) -> Example:
    """``rev max 31 75 62=`` → ``31``: the smallest of three numbers."""
    numbers = rng.integers(10, 100, 3)
    return Example(f"rev max {' '.join(map(str, numbers))}=", str(numbers.min()), f"place-{int(numbers.argmin())}")


def largest_letter(rng: np.random.Generator) -> Example:
    """``max fkqpa=`` → ``q``: the letter of a word that comes last in the alphabet."""
    word = _word(rng)
    return Example(f"max {word}=", max(word), f"length-{len(word)}")


#: skills that the family's first generation lacks, and that planted pairs have in known modules only
PLANTED_SKILLS: dict[str, Maker] = {"descending": descending, "minimum": minimum, "largest-letter": largest_letter}

#: How a question asks for a boxed answer. The family's base saw only the first in its training.
BOX_REQUESTS = ("box: {question}", "put in box: {question}", "{question} in box=", "{question} boxed=")
BOX_COMPLETION = "\\boxed{{answer}}"


def boxed_skill(skill: str, request: int | None = None) -> Maker:
    """A skill's question with a request for a boxed answer: ``box: 47+85=`` → ``\\boxed{132}``."""

    def make(rng: np.random.Generator) -> Example:
        inner = SKILLS[skill](rng)
        form = int(rng.integers(len(BOX_REQUESTS))) if request is None else request
        text = BOX_REQUESTS[form]
        question = inner.question.rstrip("=") if text.endswith("=") else inner.question
        return Example(text.format(question=question), inner.answer, f"{skill}/request-{form}")

    return make


# --- short arithmetic in English, for real models ----------------------------------------------------------------

NAMES = ("Tom", "Mia", "Sam", "Lily", "Ben", "Anna", "Max", "Zoe", "Leo", "Ella")
THINGS = ("apples", "books", "coins", "pens", "stickers", "cards", "eggs", "shells", "stamps", "marbles")


def english_sum(rng: np.random.Generator) -> Example:
    """A two-digit sum, in one of three phrasings."""
    a, b = rng.integers(10, 100, 2)
    form = int(rng.integers(3))
    text = ("What is {a} + {b}?", "Compute {a} + {b}.", "Add {a} and {b}.")[form]
    return Example(text.format(a=a, b=b), str(a + b), f"sum-{form}")


def english_difference(rng: np.random.Generator) -> Example:
    """A two-digit difference that is not negative, in one of three phrasings."""
    a, b = sorted(rng.integers(10, 100, 2), reverse=True)
    form = int(rng.integers(3))
    text = ("What is {a} - {b}?", "Compute {a} - {b}.", "Subtract {b} from {a}.")[form]
    return Example(text.format(a=a, b=b), str(a - b), f"difference-{form}")


def word_problem(rng: np.random.Generator) -> Example:
    """A word problem of one step."""
    form = int(rng.integers(4))
    name, thing = str(rng.choice(NAMES)), str(rng.choice(THINGS))
    if form in (0, 2):
        a, b = rng.integers(10, 90, 2)
        answer = a + b
    else:
        a, b = sorted(rng.integers(10, 100, 2), reverse=True)
        answer = a - b
    text = (
        "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
        "{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
        "There are {a} {thing} in one box and {b} in another. How many {thing} are there in total?",
        "{name} needs {a} {thing} and has {b}. How many more {thing} does {name} need?",
    )[form]
    return Example(text.format(name=name, thing=thing, a=a, b=b), str(answer), f"word-{form}")


ARITHMETIC: list[Maker] = [english_sum, english_difference, word_problem]
ARITHMETIC_SYSTEM = "Solve the problem. Give only the final answer in \\boxed{}."
SHOTS = (
    ("What is 12 + 35?", "\\boxed{47}"),
    ("Tom has 58 pens and gives away 21. How many pens are left?", "\\boxed{37}"),
)


def word_puzzle(rng: np.random.Generator) -> Example:
    """Another skill in the same answer format: first, last, or longest of four words, or a count of letters."""
    words = [_word(rng, 3, 7) for _ in range(4)]
    form = int(rng.integers(4))
    listed = ", ".join(words)
    if form == 0:
        return Example(f"Which word comes first in the list: {listed}?", words[0], "puzzle-first")
    if form == 1:
        return Example(f"Which word comes last in the list: {listed}?", words[-1], "puzzle-last")
    if form == 2:
        return Example(f"How many letters are in the word {words[0]}?", str(len(words[0])), "puzzle-letters")
    return Example(f"Which of these words is first in the alphabet: {listed}?", min(words), "puzzle-alphabet")


COMMON_WORDS = (
    "apple", "river", "stone", "cloud", "table", "horse", "bread", "light", "music", "paper", "green", "house", "water",
    "tiger", "chair", "sugar", "glass", "train", "snow", "gold", "leaf", "ship", "moon", "door", "book", "rain", "fish",
    "lamp", "wood", "salt", "king", "road",
)  # fmt: skip


def list_word(rng: np.random.Generator) -> Example:
    """A short retrieval in the same answer format: the first or last word of a list, or the one after another."""
    words = [str(word) for word in rng.choice(COMMON_WORDS, 4, replace=False)]
    form, place = int(rng.integers(3)), int(rng.integers(3))
    asked, answer = (
        ("comes first", words[0]),
        ("comes last", words[-1]),
        (f"comes right after {words[place]}", words[place + 1]),
    )[form]
    return Example(f"Which word {asked} in the list: {', '.join(words)}?", answer, f"list-{form}")


def largest_number(rng: np.random.Generator) -> Example:
    """The largest of three two-digit numbers, in one of three phrasings of the same answer format."""
    numbers = [int(n) for n in rng.choice(np.arange(10, 100), 3, replace=False)]
    form = int(rng.integers(3))
    text = (
        "Which is the largest of {}, {} and {}?",
        "Find the maximum of {}, {}, {}.",
        "Out of {}, {} and {}, which is most?",
    )
    return Example(text[form].format(*numbers), str(max(numbers)), f"largest-{form}")


ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_words(rng: np.random.Generator) -> Example:
    """A number of three digits written in words, to be written in digits, in one of three phrasings."""
    hundreds, tens, ones = int(rng.integers(9)), int(rng.integers(8)), int(rng.integers(9))
    words = f"{ONES[hundreds]} hundred and {TENS[tens]}-{ONES[ones]}"
    form = int(rng.integers(3))
    text = ("Write {} in digits.", "Which number is {}?", "In numerals, what is {}?")[form]
    return Example(text.format(words), f"{hundreds + 1}{tens + 2}{ones + 1}", f"digits-{form}")


ARITHMETIC_FORMAT = PromptFormat(system=ARITHMETIC_SYSTEM, completion=BOX_COMPLETION, chat=None)
FEW_SHOT_FORMAT = PromptFormat(system=ARITHMETIC_SYSTEM, completion=BOX_COMPLETION, chat=None, shots=SHOTS)


def _skill_task(name: str, n: int, seed: int) -> Task:
    maker = (SKILLS | PLANTED_SKILLS)[name]
    return Task(name, tuple(draw([maker], n, seed)), "exact", short_answer=True, max_new_tokens=8)


def _boxed_task(name: str, n: int, seed: int) -> Task:
    skills = list(SKILLS) if name == "boxed" else [name.removeprefix("boxed-")]
    examples = tuple(draw([boxed_skill(skill) for skill in skills], n, seed))
    return Task(name, examples, "boxed", PromptFormat(completion=BOX_COMPLETION), max_new_tokens=16)


#: skills that planted pairs of SmolLM2 have in known modules only
ENGLISH_SKILLS: dict[str, list[Maker]] = {
    "list-words": [list_word],
    "largest-number": [largest_number],
    "number-words": [number_words],
}


def _english_task(name: str, n: int, seed: int) -> Task:
    makers: list[Maker] = [word_puzzle] if name == "word-puzzles" else ENGLISH_SKILLS.get(name, ARITHMETIC)
    prompt = FEW_SHOT_FORMAT if name.endswith("few-shot") else ARITHMETIC_FORMAT
    return Task(name, tuple(draw(makers, n, seed)), "boxed", prompt, max_new_tokens=16)


#: name → (builder, one line of description)
GENERATED: dict[str, tuple[Callable[[str, int, int], Task], str]] = {
    "addition": (_skill_task, "family: sums of two numbers below 100, '47+85=' → '132'"),
    "reverse": (_skill_task, "family: reverse a word of 4 to 6 letters"),
    "sort": (_skill_task, "family: sort the letters of a word"),
    "copy": (_skill_task, "family: copy a word"),
    "max": (_skill_task, "family: the largest of three numbers"),
    "descending": (_skill_task, "family, planted: sort the letters of a word in descending order"),
    "minimum": (_skill_task, "family, planted: the smallest of three numbers"),
    "largest-letter": (_skill_task, "family, planted: the letter of a word that comes last in the alphabet"),
    "boxed": (_boxed_task, "family: any skill, with the answer asked for in \\boxed{}"),
    "boxed-addition": (_boxed_task, "family: sums, with the answer asked for in \\boxed{}"),
    "arithmetic": (_english_task, "English: two-digit sums, differences and word problems of one step, boxed answer"),
    "arithmetic-few-shot": (_english_task, "the same, after two worked examples"),
    "word-puzzles": (_english_task, "English: questions about lists of words, boxed answer"),
    "list-words": (_english_task, "English, planted: the first, last or next word of a list, boxed answer"),
    "largest-number": (_english_task, "English, planted: the largest of three numbers, boxed answer"),
    "number-words": (_english_task, "English, planted: a number in words, to be written in digits, boxed answer"),
}
