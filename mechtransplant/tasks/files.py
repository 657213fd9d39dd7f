"""Tasks from JSONL files: MATH-500, GSM8K, or any file with a question and an answer on each line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mechtransplant.errors import TaskError
from mechtransplant.tasks.scorers import extract_boxed
from mechtransplant.tasks.task import Example, PromptFormat, Task

QUESTION_FIELDS = ("question", "problem", "prompt", "input", "instruction")
ANSWER_FIELDS = ("answer", "solution", "target", "output", "completion", "label")
TEMPLATE_FIELDS = ("template", "subject", "category", "level", "type")

#: The seed paper asks for the final answer alone, in a box.
MATH_SYSTEM = "Solve the problem. Give only the final answer in \\boxed{}."


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank; raises TaskError at the first bad line."""
    if not path.is_file():
        raise TaskError(f"no task file at {path}: give the path of a JSONL file, or a name from `mechtransplant tasks`")
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        # not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8 JSONL") from error
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            where = f"{error.msg} at column {error.colno}"
            raise TaskError(f"{path} line {at}: broken JSON ({where}): fix this line") from error
        if not isinstance(row, dict):
            got = type(row).__name__
            raise TaskError(f"{path} line {at}: expected a JSON object with a question and an answer, got {got}")
        rows.append((at, row))
    if not rows:
        raise TaskError(f"{path} is empty: expected one JSON object a line, with a question and an answer")
    return rows


def _pick_field(
    rows: list[tuple[int, dict[str, Any]]], given: str | None, known: tuple[str, ...], what: str, path: Path
) -> str:
    """The field that holds the ``what``: the one given, else the first known name in the first row."""
    first = rows[0][1]
    name = given or next((k for k in known if k in first), None)
    if name is None:
        raise TaskError(
            f"{path} line {rows[0][0]}: no {what} field among {', '.join(first)}; expected one of {', '.join(known)}, "
            f"or name it with {what}_field"
        )
    for at, row in rows:
        if name not in row or row[name] is None or not str(row[name]).strip():
            raise TaskError(f"{path} line {at}: field {name!r} is missing or empty; every line needs its {what}")
    return name


def final_answer(text: str) -> str:
    """The final answer in a solution: what follows ``####`` (GSM8K), else the last box, else the text itself."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().replace(",", "")
    found = extract_boxed(text)
    return found.strip() if found is not None else text.strip()


def load_jsonl(
    path: str | Path,
    *,
    question_field: str | None = None,
    answer_field: str | None = None,
    template_field: str | None = None,
    scorer: str = "boxed",
    format: PromptFormat | None = None,
    max_new_tokens: int = 64,
    stop: tuple[str, ...] = (),
    short_answer: bool = False,
    name: str | None = None,
) -> Task:
    """A task from a JSONL file; field names are recognised (question, problem, … / answer, solution, …) or given.

    ``short_answer`` (with ``scorer="exact"``): one forward decides the answers (see :class:`Task`).

    Raises TaskError for a missing file or field, an empty file, or broken JSON, naming the line.
    """
    path = Path(path)
    rows = read_jsonl(path)
    question = _pick_field(rows, question_field, QUESTION_FIELDS, "question", path)
    answer = _pick_field(rows, answer_field, ANSWER_FIELDS, "answer", path)
    template = template_field or next((k for k in TEMPLATE_FIELDS if k in rows[0][1]), None)
    if template_field is not None:
        _pick_field(rows, template_field, TEMPLATE_FIELDS, "template", path)
    examples = tuple(
        Example(str(row[question]), final_answer(str(row[answer])), str(row.get(template, "")) if template else "")
        for _, row in rows
    )
    for (at, _), example in zip(rows, examples, strict=True):
        if not example.answer:
            raise TaskError(f"{path} line {at}: no final answer after #### or in the box of field {answer!r}")
    prompt = format or PromptFormat(system=MATH_SYSTEM, completion="\\boxed{{answer}}", chat=None)
    return Task(name or path.stem, examples, scorer, prompt, short_answer, max_new_tokens, tuple(stop))
