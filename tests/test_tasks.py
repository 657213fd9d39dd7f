"""Tasks: scorers, files, splits, generated skills."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtransplant.errors import TaskError, UnknownNameError
from mechtransplant.pair import Pair
from mechtransplant.tasks import (
    Example,
    PromptFormat,
    Task,
    get_scorer,
    list_tasks,
    load_jsonl,
    load_task,
    register_task,
)
from mechtransplant.tasks.generated import BOX_REQUESTS, SKILLS, draw, held_out
from mechtransplant.tasks.scorers import extract_boxed, normalise_answer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# --- scorers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\{b}}", r"a\\{b}"),  # a line break, then a group
        (r"\boxed{\\\{1\\\}}", r"\\\{1\\\}"),  # a line break, then a printed brace
        (r"\fbox {3}", "3"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{", None),
        ("5", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


@given(st.recursive(st.text("ab1", max_size=3), lambda s: st.tuples(s, s).map(lambda p: f"{p[0]}{{{p[1]}}}")))
def test_extract_boxed_inverts_boxing(inner: str) -> None:
    assert extract_boxed(f"so \\boxed{{{inner}}}.") == inner


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\frac{1}2", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        ("-1/2", r"-\frac{1}{2}"),
        (r"\frac{-1}{2}", r"-\frac12"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("5.0", "5"),
        ("5.", "5"),
        ("x=5", "5"),
        ("x = 5", "5"),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        (r"10,\!000", "10000"),
        (r"11,\! 111,\! 100", "11111100"),
        ("1,234,567", "1234567"),
        ("(100,200)", "(100, 200)"),
        (r"\{100,200\}", r"\{100, 200\}"),
        (r"\left( 3, 4 \right)", "(3,4)"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\$18", "18"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"5\text{ cm}", "5"),
        (r"5 \text{ cm}^2", "5"),
        (r"5\mbox{ cm}^{3}", "5"),
        (r"4\pi\text{ cm}", r"4\pi"),
        (r"\text{Evelyn}", "Evelyn"),
        ("6, 32, 192", "6,32,192"),
        ("10, 200", "10,200"),
    ],
)
def test_boxed_equates(one: str, other: str) -> None:
    score = get_scorer("boxed")
    assert score(f"\\boxed{{{one}}}", other)
    assert score(f"\\boxed{{{other}}}", one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "6"),
        ("(100,200)", "100200"),
        ("(100,200)", "(100200)"),
        (r"2\text{ or }3", "23"),
        ("-5", "5"),
        (r"\frac{1}{2}", r"-\frac{1}{2}"),
        ("0.5", "5"),
        (r"\text{A}", r"\text{B}"),
        ("1.05", "1.5"),
        ("10, 200", "10200"),
        ("6,32,192", "632192"),
        ("6,32,192", "6,32192"),
    ],
)
def test_boxed_distinguishes(one: str, other: str) -> None:
    assert not get_scorer("boxed")(f"\\boxed{{{one}}}", other)


def test_what_the_scorer_number_cannot_read_is_refused() -> None:
    for answer in ("1/2", "five", "1, 2", "-", "", "0x1F"):
        with pytest.raises(TaskError, match=r"the scorer number cannot read the answer .* of the question 'b': write"):
            Task("t", (Example("a", "$1,000"), Example("b", answer)), scorer="number")
    assert len(Task("t", (Example("a", "18%"), Example("b", "-1,234.50"), Example("c", r"\$5")), scorer="number")) == 3
    signed = ("+$5", "$+5$", "-$5", "$5$.", r"$18\%$", r"18$\%$")
    assert len(Task("t", tuple(Example(answer, answer) for answer in signed), scorer="number")) == len(signed)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        # as in Llama 3
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
            "{{ date_string }}: {{ messages[-1].content }}",
            "26 Jul 2024: q",
        ),
        # as in gpt-oss, in a macro
        (
            "{% macro head() %}{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '\n' }}{% endmacro %}"
            "{{ head() }}{{ messages[-1].content }}",
            "Current date: 2024-07-26\nq",
        ),
        # as in Mistral
        (
            "\n{%- set today = strftime_now('%A, %-d %B %y') %}{{ today }}: {{ messages[-1].content }}",
            "Friday, 26 July 24: q",
        ),
    ],
)
def test_a_template_that_writes_the_date_asks_the_same_prompt_every_day(
    random_pair: Pair, template: str, written: str
) -> None:
    import copy

    tokenizer = copy.copy(random_pair.target.tokenizer)
    tokenizer.chat_template = template
    task = Task("t", (Example("q", "a"),), format=PromptFormat(chat=True))
    assert task.prompts(tokenizer) == [written]


def test_a_question_that_is_shown_is_not_asked() -> None:
    shown = PromptFormat(shots=(("q5", "5"), ("q7", "7")))
    task = Task("t", tuple(Example(f"q{n}", str(n)) for n in range(12)), format=shown)
    asked = [e.question for part in task.split(3, 3, 4) for e in part]
    assert len(asked) == 10 and not {"q5", "q7"} & set(asked)
    with pytest.raises(TaskError, match="has 10 distinct questions"):
        task.split(4, 4, 4)
    assert "What is 12 + 35?" in [e.question for e in load_task("arithmetic-few-shot", 1024, 13)]
    parts = load_task("arithmetic-few-shot", 1024, 13).split(64, 64, 512)
    assert "What is 12 + 35?" not in [e.question for part in parts for e in part]


def test_a_file_has_no_seed(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "1 + 1", "answer": "2"}\n')
    for wrong in ({"n": 50}, {"seed": 3}):
        with pytest.raises(TaskError, match=r"n and seed are of tasks that are generated, and .* is a file"):
            load_task(path, **wrong)


def test_boxed_needs_a_box() -> None:
    assert not get_scorer("boxed")("5", "5")
    assert get_scorer("exact")(" 5\n", "5")
    assert not get_scorer("exact")("5.", "5")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so 7, then 12.", "12", True),
        ("$1,234.50", "1234.5", True),
        ("it is .5", "0.5", True),
        ("[1,2,3]", "3", True),
        ("[1,2,3]", "123", False),
        ("3-5", "5", True),
        ("it is -5", "-5", True),
        ("= -5", "5", False),
        ("1,000,000 coins", "1,000,000", True),
        ("none", "5", False),
        ("5", "five", False),
        ("100000000000000001", "100000000000000000", False),
        ("5.0", "5", True),
        ("5", " 5 ", True),
        ("The total is 1,234, as computed.", "1234", True),
        ("He earns 1,234, so that is it", "234", False),
        ("1,234,567, ok", "1234567", True),
        ("1,234,5", "5", True),
        ("it is \N{MINUS SIGN}5", "-5", True),
        ("a loss: -$5", "-5", True),
        (r"a loss: -\$5, $-5$", "-5", True),
        (r"a loss: \(-\$5\)", "-5", True),
        ("$5$-$3$", "3", True),
        ("The values are $1$,$2$,$100$.", "100", True),
        ("sums $100$,$200$", "200", True),
        ("$$6+6=12$$12 eggs", "12", True),
        (r"in all $12$\$13", "13", True),
        ("$1,234", "1234", True),
        ("$1,234$", "1234", True),
        ("1,2,100", "100", True),
        ("in all:5,or,1,234", "1234", True),
        ("The answer is $1,000.", "$1,000", True),
        ("18% of them", "18%", True),
        ("18", "1/2", False),
    ],
)
def test_number(text: str, answer: str, right: bool) -> None:
    assert get_scorer("number")(text, answer) is right


@pytest.mark.parametrize(
    ("guess", "gold", "right"),
    [
        (r"\boxed{0.5}", r"\frac12", True),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", True),
        (r"\boxed{-\frac12}", "-0.5", True),
        (r"\boxed{2+3}", "5", True),
        (r"\boxed{3 \times 10^2}", "300", True),
        (r"\boxed{(0,1)}", "[0,1)", False),
        (r"\boxed{6}", "5", False),
        (r"\boxed{\text{A}}", r"\text{B}", False),
        (r"\boxed{}", "5", False),
        ("the answer is 5", "5", True),
        ("", "5", False),
        (r"\boxed{)}", "5", False),
        # these would take hours to evaluate
        (r"\boxed{9^{9^{9}}}", "5", False),
        (r"\boxed{2^{99999999}}", "5", False),
        (r"\boxed{(10^{9})!}", "5", False),
        (r"\boxed{9^{9^{9}}}", "9^{9^{9}}", True),
    ],
)
def test_math(guess: str, gold: str, right: bool) -> None:
    assert get_scorer("math")(guess, gold) is right


def test_unknown_scorer_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="boxed"):
        get_scorer("boxd")


# --- files -------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "questions.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "1+1", "answer": "2"}\n\n{"question": "1+2", "answer": \n', r"line 3: broken JSON"),
        ('{"question": "1+1", "answer": "2"}\n{"question": "1+2"}\n', r"line 2: field 'answer' is missing or empty"),
        ('{"question": "1+1", "answer": "2"}\n{"question": " ", "answer": "2"}\n', r"line 2: field 'question'"),
        ('{"ask": "1+1", "answer": "2"}\n', r"line 1: no question field among ask, answer"),
        ('{"question": "1+1", "reply": "2"}\n', r"line 1: no answer field"),
        ('{"question": "1+1", "answer": "2"}\n[1]\n', r"line 2: expected a JSON object.*list"),
        ('{"question": "1+1", "answer": "2"}\n{"question": "1+1", "answer": "so ####"}\n', r"line 2: no final answer"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        (b'{"question": "caf\xe9", "answer": "2"}\n', r"not UTF-8 text \(byte 17\)"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_jsonl(write(tmp_path, content))


def test_missing_file_and_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no task file"):
        load_task(tmp_path / "none.jsonl")
    with pytest.raises(UnknownNameError, match="addition"):
        load_task("adition")
    with pytest.raises(TaskError, match="JSONL"):
        load_task("addition", scorer="exact")


def test_file_with_byte_order_mark_and_unicode_line_separators(tmp_path: Path) -> None:
    rows = [{"question": "a\u2028b\x85c", "answer": 0}, {"question": "d", "answer": "so \\boxed{3}"}]
    text = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    task = load_jsonl(write(tmp_path, "\ufeff" + text))
    assert [(e.question, e.answer) for e in task] == [("a\u2028b\x85c", "0"), ("d", "3")]


def test_a_files_answers_may_be_short(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"question": "1+1=", "answer": "2"}))
    short = load_jsonl(path, scorer="exact", short_answer=True, format=PromptFormat(), stop=("!",))
    assert short.short_answer and short.stop == ("!",) and not load_jsonl(path).short_answer
    with pytest.raises(TaskError, match="short_answer needs scorer: exact"):
        load_jsonl(path, short_answer=True)


def data_file(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"no {name} beside this checkout")
    return DATA / name


def test_math500() -> None:
    task = load_task(data_file("math500.jsonl"))
    assert len(task) == 500
    assert len({e.template for e in task}) == 7
    assert all(task.score(c, e.answer) for c, e in zip(task.completions(), task, strict=True))
    assert all(normalise_answer(normalise_answer(e.answer)) == normalise_answer(e.answer) for e in task)


def test_gsm8k() -> None:
    for name, rows in (("gsm8k_test.jsonl", 1319), ("gsm8k_train.jsonl", 7473)):
        task = load_task(data_file(name), scorer="number")
        assert len(task) == rows
        assert all(task.score(f"So it is {e.answer}.", e.answer) for e in task)
    assert load_task(data_file("gsm8k_test.jsonl")).examples[0].answer == "18"


# --- prompts and fingerprints ------------------------------------------------------------------------------------


def test_prompt_with_latex_braces() -> None:
    form = PromptFormat(question="Answer in \\boxed{}: {question}", completion="\\boxed{{answer}}", shots=(("q", "c"),))
    assert form.render("{question}{x}") == "Answer in \\boxed{}: qc\n\nAnswer in \\boxed{}: {question}{x}"
    assert form.complete(r"\frac{1}{2}") == r"\boxed{\frac{1}{2}}"
    with pytest.raises(TaskError, match="chat template"):
        PromptFormat(chat=True).render("q")


def test_fingerprint_changes_with_everything_but_the_role() -> None:
    task = Task("t", (Example("q", "a"), Example("r", "b")))
    others = [
        replace(task, name="u"),
        replace(task, scorer="boxed"),
        replace(task, short_answer=True),
        replace(task, max_new_tokens=17),
        replace(task, stop=("\n",)),
        task.subset([0]),
        task.subset([1, 0]),
        replace(task, examples=(Example("q", "a"), Example("r", "c"))),
        replace(task, examples=(Example("q", "a", "x"), Example("r", "b"))),
        *(
            replace(task, format=f)
            for f in (
                PromptFormat(system="s"),
                PromptFormat(question="Q {question}"),
                PromptFormat(completion=" {answer}"),
                PromptFormat(shots=(("q", "a"),)),
                PromptFormat(chat=None),
                PromptFormat(shot_separator="\n"),
            )
        ),
    ]
    assert len({t.fingerprint for t in [task, *others]}) == len(others) + 1
    assert replace(task, role="test").fingerprint == task.fingerprint


def test_a_task_has_examples() -> None:
    with pytest.raises(TaskError, match="no examples"):
        Task("t", ())


# --- splits ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    parts=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_are_disjoint_stratified_and_seeded(sizes: list[int], parts: tuple[int, int, int], seed: int) -> None:
    examples = tuple(Example(f"{t}-{i}", str(i), f"t{t}") for t, size in enumerate(sizes) for i in range(size))
    task = Task("t", examples)
    if sum(parts) > len(task):
        with pytest.raises(TaskError, match="ask for fewer"):
            task.split(*parts, seed=seed)
        return
    splits = task.split(*parts, seed=seed)
    assert [len(s) for s in splits] == list(parts)
    assert [s.role for s in splits] == ["discover", "choose", "test"]
    keys = [e.key for s in splits for e in s]
    assert len(set(keys)) == len(keys)
    for split in splits:
        counts = Counter(e.template for e in split)
        for t, size in enumerate(sizes):
            assert abs(counts[f"t{t}"] - size * len(split) / len(task)) < 2
    assert task.split(*parts, seed=seed) == splits
    # a larger test split changes neither of the others
    assert task.split(*parts[:2], 1, seed=seed).discover == splits.discover


def test_split_drops_repeats_and_follows_its_seed() -> None:
    task = Task("t", tuple(Example(f"q{i % 30}", "a") for i in range(60)))
    splits = task.split(10, 10, 10)
    assert len({e.question for s in splits for e in s}) == 30
    assert task.split(10, 10, 10, seed=1) != splits
    with pytest.raises(TaskError, match="30 distinct"):
        task.split(10, 10, 11)
    with pytest.raises(TaskError, match="already"):
        splits.test.split(1, 1, 1)
    with pytest.raises(TaskError, match="at least one"):
        task.split(0, 1, 1)


def test_a_training_set_may_explore_so_that_all_of_a_task_is_test() -> None:
    task = Task("t", tuple(Example(f"q{i}", "a", f"t{i % 2}") for i in range(20)))
    # five of its questions are test questions as well
    training = Task("train", tuple(Example(f"q{i}", "a") for i in range(15, 45)))
    splits = task.split(10, 15, 20, seed=1, explore=training)
    assert [s.role for s in splits] == ["discover", "choose", "test"]
    assert set(splits.test.keys) == set(task.keys) and splits.choose.name == "train"
    assert not (set(splits.discover.keys) | set(splits.choose.keys)) & set(task.keys)
    assert not set(splits.discover.keys) & set(splits.choose.keys)
    assert task.split(10, 15, 20, seed=1, explore=training) == splits
    assert task.split(10, 15, 20, seed=2, explore=training).discover != splits.discover
    with pytest.raises(TaskError, match=r"'train' has 25 distinct questions and the split asks for 26 \(10 \+ 16\)"):
        task.split(10, 16, 20, explore=training)
    with pytest.raises(TaskError, match="'t' has 20 distinct questions"):
        task.split(1, 1, 21, explore=training)
    with pytest.raises(TaskError, match="asked or scored in another way"):
        task.split(1, 1, 1, explore=replace(training, scorer="boxed"))


# --- generated ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_tasks())
def test_generated_tasks_are_seeded_held_out_and_right(name: str) -> None:
    task = load_task(name, n=100, seed=3)
    assert len(task) == 100
    assert task == load_task(name, n=100, seed=3)
    assert task != load_task(name, n=100, seed=4)
    assert len({e.key for e in task}) == 100
    assert all(held_out(e.question) for e in task)
    assert all(task.score(c, e.answer) for c, e in zip(task.completions(), task, strict=True))


@pytest.mark.parametrize("skill", SKILLS)
def test_training_questions_never_meet_held_out_ones(skill: str) -> None:
    train = {e.question for e in draw([SKILLS[skill]], 400, 0, held=False)}
    tested = {e.question for e in draw([SKILLS[skill]], 200, 1)}
    assert train and tested and not train & tested
    assert 0.12 < np.mean([held_out(e.question) for e in draw([SKILLS[skill]], 1000, 2, held=None)]) < 0.28


@given(st.integers(0, 99), st.integers(0, 99))
def test_asking_for_a_box_does_not_move_a_question(a: int, b: int) -> None:
    question = f"{a}+{b}="
    for request in BOX_REQUESTS:
        inner = question.rstrip("=") if request.endswith("=") else question
        assert held_out(request.format(question=inner)) == held_out(question)


def test_register_task(monkeypatch: pytest.MonkeyPatch) -> None:
    import mechtransplant.tasks as tasks

    monkeypatch.setattr(tasks, "_REGISTERED", dict(tasks._REGISTERED))

    @register_task("echo")
    def echo(n: int, seed: int) -> Task:
        """Say it again.

        More about it.
        """
        return Task("echo", tuple(Example(f"{seed}:{i}", str(i)) for i in range(n)))

    assert list_tasks()["echo"] == "Say it again."
    assert len(load_task("echo", n=5)) == 5
    with pytest.raises(TaskError, match="exists already"):
        register_task("echo")(echo)


def test_short_answers_need_the_exact_scorer_and_stops_of_one_character() -> None:
    assert Task("t", (Example("1+1=", "2"),), short_answer=True, stop=("\n",)).short_answer
    with pytest.raises(TaskError, match="a stop is part of an answer"):
        Task("t", (Example("1+1=", "2\n"),), short_answer=True, stop=("\n",))
    for changes in ({"scorer": "number"}, {"stop": ("\n\n",)}):
        with pytest.raises(TaskError, match="short_answer needs"):
            Task("t", (Example("1+1=", "2"),), **{"short_answer": True, **changes})  # type: ignore[arg-type]


def test_a_template_without_system_role_gets_the_system_text_in_the_first_turn() -> None:
    class Tokenizer:
        chat_template = "refuses a system role"

        def get_chat_template(self) -> str:
            return self.chat_template

        def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
            from jinja2 import TemplateError

            if turns[0]["role"] == "system":
                raise TemplateError("System role not supported")
            if "forbidden" in turns[-1]["content"]:
                raise TemplateError("no such word")
            return "|".join(turn["content"] for turn in turns)

    prompt = PromptFormat(system="Be brief.", chat=None, shots=(("1+1", "2"),))
    assert prompt.render("2+2", Tokenizer()) == "Be brief.\n\n1+1|2|2+2"
    with pytest.raises(TaskError, match="no such word"):
        prompt.render("forbidden", Tokenizer())
