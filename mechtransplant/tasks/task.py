"""A task is a workload: prompts with gold answers and a scorer, split by purpose.

One split finds modules (``discover``), one chooses K and strength (``choose``), one reports (``test``). They are
disjoint by construction, stratified by template, and fixed by a seed. Each split is a Task that knows its role.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from mechtransplant.display import html_table
from mechtransplant.errors import TaskError
from mechtransplant.tasks.scorers import get_scorer, value_of

Role = Literal["all", "discover", "choose", "test"]


@dataclass(frozen=True)
class Example:
    """One question with its gold answer; ``template`` is the form that several questions share."""

    question: str
    answer: str
    template: str = ""

    @property
    def key(self) -> str:
        """What makes two examples the same question: twelve hexadecimal digits."""
        return hashlib.sha256(self.question.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes the text that a model continues.

    ``chat`` renders with the tokenizer's chat template: True, False, or None for "if it has one". ``shots`` are
    (question, completion) turns shown first. ``question`` and ``completion`` are templates: ``completion`` says how
    the gold answer is written, which fixes the tokens that teacher-forced scoring compares.
    """

    system: str = ""
    question: str = "{question}"
    completion: str = "{answer}"
    shots: tuple[tuple[str, str], ...] = ()
    chat: bool | None = False
    shot_separator: str = "\n\n"

    def __post_init__(self) -> None:
        for name, hole in (("question", "{question}"), ("completion", "{answer}")):
            if hole not in getattr(self, name):
                raise TaskError(f"format.{name} is {getattr(self, name)!r} and has no {hole}: say where it goes")

    def render(self, question: str, tokenizer: Any = None) -> str:
        """The prompt's text; ``tokenizer`` is needed only where a chat template is used."""
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if self.chat and not has_template:
            raise TaskError(
                "this task asks for a chat template and the tokenizer has none: use an instruction-tuned model's "
                "tokenizer, or set chat: false"
            )
        asked = self.question.replace("{question}", question)
        if has_template and self.chat is not False:
            turns: list[dict[str, str]] = []
            for shot_question, shot_completion in self.shots:
                turns.append({"role": "user", "content": self.question.replace("{question}", shot_question)})
                turns.append({"role": "assistant", "content": shot_completion})
            turns.append({"role": "user", "content": asked})
            return _apply_template(tokenizer, self.system, turns)
        parts = [self.system] if self.system else []
        parts += [self.question.replace("{question}", q) + c for q, c in self.shots]
        return self.shot_separator.join([*parts, asked])

    def complete(self, answer: str) -> str:
        """The gold completion: the answer as the format writes it."""
        # not str.format: a LaTeX completion is full of braces
        return self.completion.replace("{answer}", answer)


#: what every template takes for today (so does Llama 3's where it knows no clock): prompts are the same every day
_DAY = datetime(2024, 7, 26)


@lru_cache(maxsize=16)
def _without_clock(template: str) -> str:
    """A chat template to which it is always ``_DAY``, also where it asks the clock itself (gpt-oss, Mistral)."""
    if "strftime_now" not in template:
        return template
    # transformers passes no function into a template, so it is defined there, over the one of the same name
    codes = {code: _DAY.strftime(code.replace("-", "")) for code in sorted(set(re.findall("%-?[A-Za-z]", template)))}
    # %-d is the day without a leading zero
    values = {code: (value.lstrip("0") or "0") if "-" in code else value for code, value in codes.items()}
    written = "".join(f".replace({code!r}, {value!r})" for code, value in values.items())
    return "{%- macro strftime_now(format) -%}{{ format" + written + " }}{%- endmacro -%}" + template


def _apply_template(tokenizer: Any, system: str, turns: list[dict[str, str]]) -> str:
    """The chat's text; where the template refuses a system role (Gemma 2), the first user turn begins with its text."""
    from jinja2 import TemplateError

    template = _without_clock(tokenizer.get_chat_template())
    first = {**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}
    forms = [[{"role": "system", "content": system}, *turns], [first, *turns[1:]]] if system else [turns]
    for form in forms:
        try:
            return str(
                tokenizer.apply_chat_template(
                    form,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=True,
                    date_string=f"{_DAY:%d %b %Y}",
                )
            )
        except TemplateError as error:
            said = str(error)
    raise TaskError(
        f"the tokenizer's chat template refuses this prompt ({said}): set chat: false, or change the format"
    )


@dataclass(frozen=True, repr=False)
class Splits:
    """Three disjoint parts of one task."""

    discover: Task
    choose: Task
    test: Task

    def __iter__(self) -> Iterator[Task]:
        return iter((self.discover, self.choose, self.test))

    def __repr__(self) -> str:
        counts = ", ".join(f"{part.role} {len(part)}" for part in self)
        return f"Splits({self.test.name!r}: {counts})"


@dataclass(frozen=True, repr=False)
class Task:
    """Prompts with gold answers and a scorer.

    ``short_answer`` says that the gold completion, followed by the end of the text, is the only right text, so that
    one teacher-forced forward decides greedy accuracy (see ``evaluation``); it needs the ``exact`` scorer, and stops of
    one character, which a single token completes. ``stop`` are strings at which a generated answer ends, besides the
    tokenizer's end of sequence.
    """

    name: str
    examples: tuple[Example, ...]
    scorer: str = "exact"
    format: PromptFormat = field(default_factory=PromptFormat)
    short_answer: bool = False
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ()
    role: Role = "all"

    def __post_init__(self) -> None:
        get_scorer(self.scorer)
        if self.scorer == "number":
            strange = next((e for e in self.examples if value_of(e.answer) is None), None)
            if strange is not None:
                raise TaskError(
                    f"task {self.name!r}: the scorer number cannot read the answer {strange.answer[:40]!r} of the "
                    f"question {strange.question[:40]!r}: write plain numbers, or take the scorer math or boxed"
                )
        if not self.examples:
            raise TaskError(f"task {self.name!r} has no examples: give at least one question with its answer")
        if self.short_answer and (self.scorer != "exact" or any(len(s) != 1 for s in self.stop)):
            raise TaskError(
                f"task {self.name!r}: short_answer needs scorer: exact and no stop but single characters, because one "
                "forward decides whether the model writes the gold tokens and ends; set short_answer: false"
            )
        if self.short_answer and any(s in self.format.complete(e.answer) for s in self.stop for e in self.examples):
            raise TaskError(
                f"task {self.name!r}: a stop is part of an answer, which generation would cut there; set short_answer: "
                "false, or leave that stop out"
            )

    def __repr__(self) -> str:
        first = self.examples[0]
        return (
            f"Task({self.name!r}, {self.role}: {len(self)} questions, scorer {self.scorer}, first "
            f"{first.question[:40]!r} → {first.answer[:20]!r})"
        )

    def _repr_html_(self) -> str:
        rows = [(str(at + 1), e.question, e.answer) for at, e in enumerate(self.examples[:3])]
        how = "one forward decides them" if self.short_answer else f"generated, {self.max_new_tokens} tokens"
        said = f"{len(self)} questions ({self.role}), scorer {self.scorer}; {how}."
        return html_table(rows, ("", "question", "gold answer"), f"Task {self.name}", [said])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def prompts(self, tokenizer: Any = None) -> list[str]:
        """The rendered prompts, in the task's order."""
        return [self.format.render(e.question, tokenizer) for e in self.examples]

    def completions(self) -> list[str]:
        """The gold completions, in the task's order."""
        return [self.format.complete(e.answer) for e in self.examples]

    def score(self, text: str, answer: str) -> bool:
        """Whether a generated text gives the gold answer; ``exact`` compares it with the gold completion."""
        return get_scorer(self.scorer)(text, self.format.complete(answer) if self.scorer == "exact" else answer)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every question's key, in the task's order."""
        return tuple(e.key for e in self.examples)

    @property
    def askable(self) -> dict[str, int]:
        """Key → place of every distinct question that a split may ask: none that every prompt shows, worked out."""
        shown = {Example(question, "").key for question, _ in self.format.shots}
        return {key: i for i, key in reversed(list(enumerate(self.keys))) if key not in shown}

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of everything that decides a score: questions, answers, format, scorer, stops."""
        content = asdict(self)
        content.pop("role")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def subset(self, indices: Sequence[int], role: Role | None = None) -> Task:
        """The task restricted to some of its examples, in the given order."""
        return replace(self, examples=tuple(self.examples[i] for i in indices), role=role or self.role)

    def split(
        self, discover: int = 64, choose: int = 64, test: int = 256, seed: int = 0, explore: Task | None = None
    ) -> Splits:
        """Disjoint parts, stratified by template: each has the task's proportions of templates to within two examples.

        Questions that every prompt shows as worked examples are left out.

        Args:
            explore: another task, such as a training set, that ``discover`` and ``choose`` are taken from, so that all
                of this one can be ``test``; of its questions those that this one has are left out.

        Raises:
            TaskError: too few distinct questions, a task that is itself a split, or one that explores in another
                format, with another scorer or other stops.
        """
        if self.role != "all":
            raise TaskError(f"this is already the {self.role!r} split of {self.name!r}: split the whole task once")
        wanted = {"discover": discover, "choose": choose, "test": test}
        if min(wanted.values()) < 1:
            raise TaskError(f"a split needs at least one question in each part, got {wanted}")
        if explore is None:
            first, second, third = self._parts(list(wanted.values()), seed)
            return Splits(self.subset(first, "discover"), self.subset(second, "choose"), self.subset(third, "test"))
        if explore.role != "all":
            raise TaskError(f"{explore.name!r} is a {explore.role!r} split already: give the whole task as explore")
        ways = [(t.scorer, t.format, t.short_answer, t.stop) for t in (self, explore)]
        if ways[0] != ways[1]:
            raise TaskError(
                f"{explore.name!r} is asked or scored in another way than {self.name!r}: give both the same format, "
                "scorer, stops and short_answer"
            )
        mine = set(self.keys)
        first, second = explore._parts([discover, choose], seed, without=mine)
        (third,) = self._parts([test], seed)
        return Splits(explore.subset(first, "discover"), explore.subset(second, "choose"), self.subset(third, "test"))

    def _parts(self, sizes: list[int], seed: int, without: Set[str] = frozenset()) -> list[list[int]]:
        """Disjoint stratified samples of so many distinct questions, without some."""
        first_of = {key: i for key, i in self.askable.items() if key not in without}
        if len(first_of) < sum(sizes):
            raise TaskError(
                f"task {self.name!r} has {len(first_of)} distinct questions and the split asks for "
                f"{sum(sizes)} ({' + '.join(map(str, sizes))}): ask for fewer"
            )
        rng = np.random.default_rng(seed)
        groups: dict[str, list[int]] = {}
        for index in sorted(first_of.values()):
            groups.setdefault(self.examples[index].template, []).append(index)
        members = [[int(i) for i in rng.permutation(groups[name])] for name in sorted(groups)]
        order = _interleave(members, rng)
        ends = np.cumsum(sizes)
        return [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _interleave(groups: list[list[int]], rng: np.random.Generator) -> list[int]:
    """One order of all members in which every run of consecutive ones is stratified to within two.

    Tijdeman's solution of the chairman assignment problem: in every prefix, each group's count is within one of its
    share. A group's r-th member may be placed from its release on and must be by its deadline; the earliest deadline
    goes first. Whole numbers throughout, so that the bound holds exactly.
    """
    total, m = sum(map(len, groups)), max(2 * len(groups) - 2, 1)
    releases: dict[int, list[tuple[int, float, int]]] = {}
    for members in groups:
        tie = float(rng.random())
        step = len(members) * m
        for r, index in enumerate(members):
            release = -(-(r * m + 1) * total // step) if len(groups) > 1 else r + 1
            releases.setdefault(release, []).append(((r * m + m - 1) * total // step + 1, tie, index))
    waiting: list[tuple[int, float, int]] = []
    order = []
    for place in range(1, total + 1):
        for item in releases.get(place, ()):
            heapq.heappush(waiting, item)
        order.append(heapq.heappop(waiting)[2])
    return order
