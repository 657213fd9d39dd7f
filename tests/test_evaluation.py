"""Batched scoring and generation equal one prompt at a time, and one forward equals generation, verdict by verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mechtransplant.errors import TaskError, UsageError
from mechtransplant.evaluation import Evaluation, compare, evaluate, evaluate_budgets, generate, gold_scores
from mechtransplant.evaluation.batches import encode
from mechtransplant.pair import LanguageModel, Pair
from mechtransplant.significance import mcnemar_exact, wilson_interval
from mechtransplant.tasks import Example, PromptFormat, Task, load_task
from mechtransplant.tasks.scorers import SCORERS, has_answer

Build = Callable[..., LanguageModel]


def mixed_lengths(n: int = 40) -> Task:
    """Questions of every skill, which differ much in length: the worst case for padding."""
    examples = [e for name in ("addition", "copy", "max", "sort") for e in load_task(name, n // 4)]
    return Task("mixed", tuple(examples), short_answer=True, max_new_tokens=8)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_gold_scores_do_not_depend_on_batches_or_padding(generations: Pair, side: str, batch_size: int) -> None:
    task = mixed_lengths()
    single = [gold_scores(generations.target, task.subset([i]), 1) for i in range(len(task))]
    correct, log_probability = gold_scores(generations.target, task, batch_size, padding_side=side)  # type: ignore[arg-type]
    assert correct.tolist() == [bool(c[0]) for c, _ in single]
    np.testing.assert_allclose(log_probability, [s[0] for _, s in single], atol=1e-4)
    assert 0 < correct.mean() < 1, "a test that all or none pass shows nothing"


def with_shots(task: Task) -> Task:
    """The task after worked examples: a prefix that all prompts share."""
    shots = (("12+25=", "37"), ("copy abc=", "abc"), ("max 11 22 33=", "33"))
    return replace(task, format=PromptFormat(shots=shots, shot_separator=" "))


def test_shared_prefix_changes_nothing(generations: Pair) -> None:
    task = with_shots(mixed_lengths())
    assert len(encode(task, generations.target.tokenizer).prefix) > 10
    shared, plain = (gold_scores(generations.target, task, 16, share_prefix=s) for s in (True, False))
    assert (shared[0] == plain[0]).all()
    np.testing.assert_allclose(shared[1], plain[1], atol=1e-4)


@pytest.mark.parametrize("prepare", [mixed_lengths, lambda: with_shots(mixed_lengths())])
def test_batched_generation_equals_one_by_one_to_the_token(generations: Pair, prepare: Callable[[], Task]) -> None:
    task = prepare()
    single = [generate(generations.target, task.subset([i]), 8, 1)[0] for i in range(len(task))]
    for batch_size in (7, 64):
        assert generate(generations.target, task, 8, batch_size) == single


def test_generation_is_plain_greedy_whatever_the_model_asks_for(random_model: Build) -> None:
    model, task = random_model(0), mixed_lengths(8)
    plain = generate(model, task, 8)
    model.hf.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    kept = model.hf.generation_config
    assert generate(model, task, 8) == plain
    assert model.hf.generation_config is kept


def test_one_forward_and_generation_agree_on_every_verdict(generations: Pair, instruct: Pair) -> None:
    for model in (generations.source, generations.target, instruct.source):
        task = mixed_lengths(80)
        forced = evaluate(model, task, "teacher-forced")
        written = evaluate(model, task, "generate")
        assert (forced.correct == written.correct).all()


def test_budgets_are_prefixes_of_one_generation(instruct: Pair) -> None:
    task = load_task("boxed", 60)
    together = evaluate_budgets(instruct.source, task, [2, 4, 5, 12])
    for budget in (2, 4, 5, 12):
        alone = evaluate(instruct.source, task, max_new_tokens=budget)
        assert (together[budget].correct == alone.correct).all() and together[budget].texts == alone.texts
    accuracies = [together[b].accuracy for b in (2, 4, 5, 12)]
    assert accuracies == sorted(accuracies) and accuracies[0] == 0 < accuracies[-1]
    assert together[2].answered is not None and not together[2].answered.any()


def test_short_answers_at_several_budgets_take_one_forward(generations: Pair) -> None:
    task, passes = load_task("addition", 40), []
    hook = generations.source.hf.register_forward_hook(lambda *_: passes.append(1))
    try:
        together = evaluate_budgets(generations.source, task, [2, 3, 4, 8], method="auto")
    finally:
        hook.remove()
    assert len(passes) == 1
    for budget, found in together.items():
        alone = evaluate(generations.source, task, "generate", max_new_tokens=budget)
        assert found.method == "teacher-forced" and found.budget == budget and (found.correct == alone.correct).all()
    assert together[2].accuracy < together[8].accuracy


def test_stop_strings_end_an_answer(instruct: Pair) -> None:
    task = replace(load_task("boxed", 20), stop=("}",))
    found = evaluate(instruct.source, task)
    assert found.texts is not None and all("}" not in text for text in found.texts)


def test_free_form_tasks_cannot_be_teacher_forced(instruct: Pair) -> None:
    with pytest.raises(TaskError, match="free-form"):
        evaluate(instruct.source, load_task("boxed", 8), "teacher-forced")


def test_any_end_token_of_the_model_ends_a_gold_answer(generations: Pair) -> None:
    import copy

    task = mixed_lengths(20)
    model = LanguageModel("other end", generations.source.hf, copy.deepcopy(generations.source.tokenizer))
    kept = model.hf.generation_config.eos_token_id
    # the chat models of some families end with a token that is not their tokenizer's end token
    model.tokenizer.eos_token = "<unk>"
    try:
        model.hf.generation_config.eos_token_id = [2, 3]
        forced, written = evaluate(model, task, "teacher-forced"), evaluate(model, task, "generate")
    finally:
        model.hf.generation_config.eos_token_id = kept
    assert (forced.correct == written.correct).all() and forced.accuracy > 0.9


def test_without_an_end_token_answers_are_generated(random_model: Build) -> None:
    import copy

    model = random_model(0)
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.eos_token = None
    assert evaluate(model, mixed_lengths(4)).method == "generate"
    with pytest.raises(TaskError, match="no end token"):
        evaluate(model, mixed_lengths(4), "teacher-forced")


def test_a_number_that_the_budget_cut_off_does_not_count(generations: Pair) -> None:
    examples = [e for e in load_task("addition", 200) if len(e.answer) == 3][:8]
    shorter = tuple(replace(e, answer=e.answer[:2]) for e in examples)
    for scorer in ("number", "math"):
        task = Task("cut", shorter, scorer, max_new_tokens=8)
        found = evaluate_budgets(generations.source, task, [1, 2, 3, 8])
        assert [found[b].accuracy for b in (1, 2, 3, 8)] == [0, 0, 0, 0]


def test_answered_is_what_can_be_scored(generations: Pair) -> None:
    examples = tuple(load_task("addition", 40).examples)
    for scorer in ("number", "math"):
        found = evaluate_budgets(generations.source, Task("sums", examples, scorer, max_new_tokens=8), [2, 8])
        for each in found.values():
            assert each.answered is not None and not (each.correct & ~each.answered).any()
        assert found[8].answered is not None and found[8].answered.all()
    # a word that has ended holds no number
    words = tuple(load_task("copy", 20).examples)
    for scorer, some in (("number", False), ("math", False), ("exact", True)):
        asked = tuple(replace(e, answer="1") for e in words) if scorer == "number" else words
        text = evaluate_budgets(generations.source, Task("words", asked, scorer, max_new_tokens=12), [12])[12]
        assert text.ended is not None and text.answered is not None
        assert text.ended.any() and (text.answered.any() == some)


@pytest.mark.parametrize(
    ("scorer", "text", "known"),
    [
        ("number", "12 + 30 = 42, so ", True),
        ("number", "so the sum is ", False),
        ("math", "12 + 30 = 42, so ", True),
        ("math", "so the sum is ", False),
        ("math", r"so the sum is \boxed{x}", True),
        ("boxed", "12 + 30 = 42", False),
    ],
)
def test_a_text_that_has_not_ended_is_answered_where_it_can_be_scored(scorer: str, text: str, known: bool) -> None:
    assert has_answer(text, scorer) == known
    assert not SCORERS[scorer](text, "42") or known


def scored(bits: str, role: str = "test") -> Evaluation:
    return Evaluation("t", role, f"{len(bits)} questions", np.array([b == "1" for b in bits]), "generate", 8)


def test_tir_is_undefined_at_baseline_zero() -> None:
    outcome = compare(scored("0" * 40), scored("1" * 30 + "0" * 10), scored("1" * 20 + "0" * 20))
    assert outcome.tir is None and outcome.tir_interval is None
    assert "undefined" in " ".join(outcome.notes)
    assert outcome.recovery == pytest.approx(100 * 20 / 30)


def test_tir_over_one_right_answer_is_wide_and_said_to_be() -> None:
    outcome = compare(scored("1" + "0" * 39), scored("1" * 30 + "0" * 10), scored("1" * 20 + "0" * 20))
    assert outcome.tir == pytest.approx(20) and outcome.tir_interval is not None
    assert outcome.tir_interval[0] < 20 and outcome.tir_interval[1] > 100
    assert any("rests on 1 right answers" in note for note in outcome.notes)


def test_recovery_is_withheld_when_the_gap_covers_zero() -> None:
    outcome = compare(scored("10" * 20), scored("01" * 19 + "11"), scored("11" * 20))
    assert outcome.recovery is None and "withheld" in " ".join(outcome.notes)
    assert "Recovery withheld (the gap's interval covers 0)" in str(outcome)
    assert outcome.gap_interval[0] <= 0 <= outcome.gap_interval[1]
    assert outcome.tir == pytest.approx(2.0)


def test_recovery_is_not_clipped() -> None:
    outcome = compare(scored("0" * 50 + "1" * 50), scored("0" * 30 + "1" * 70), scored("1" * 100))
    assert outcome.recovery == pytest.approx(250)
    assert outcome.recovery_interval is not None and outcome.recovery_interval[0] < 250 < outcome.recovery_interval[1]


def test_compare_refuses_other_questions_and_selected_ones() -> None:
    with pytest.raises(UsageError, match="same questions"):
        compare(scored("1010"), scored("1010"), scored("101"))
    with pytest.raises(UsageError, match="one token budget"):
        compare(scored("1010"), scored("1010"), replace(scored("1010"), budget=3))
    with pytest.raises(UsageError, match="choose"):
        compare(*[scored("1010", "choose")] * 3)


def test_mcnemar_equals_statsmodels() -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    rng = np.random.default_rng(0)
    for n in (5, 50, 300):
        before, after = rng.random((2, n)) < rng.random((2, 1))
        table = [[np.sum(before & after), np.sum(before & ~after)], [np.sum(~before & after), np.sum(~before & ~after)]]
        assert mcnemar_exact(before, after) == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)


def test_wilson_equals_statsmodels() -> None:
    from statsmodels.stats.proportion import proportion_confint

    for k, n in ((0, 10), (3, 10), (256, 256), (17, 64)):
        assert wilson_interval(k, n) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_prompt_without_tokens_is_refused(random_model: Build) -> None:
    model = random_model(0)
    # the family's tokenizer prepends a begin token, so ask for a chat-rendered empty prompt
    import copy

    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = "{{ '' }}"
    task = Task("empty", (Example("1+1=", "2"),), format=PromptFormat(chat=True))
    with pytest.raises(TaskError, match="becomes no token"):
        encode(task, tokenizer)


def test_what_is_no_model_or_no_task_is_named(generations: Pair, addition: Task) -> None:
    splits = addition.split(8, 8, 8)
    for call in (evaluate, gold_scores, generate):
        with pytest.raises(UsageError, match=r"expected a task, such as .*, got Splits"):
            call(generations.target, splits)  # type: ignore[operator]
        with pytest.raises(UsageError, match=r"expected a model, such as pair\.target, got Pair"):
            call(generations, splits.test)  # type: ignore[operator]
    found = evaluate(generations.target, splits.test)
    with pytest.raises(UsageError, match=r"three evaluations .*, got NoneType"):
        compare(found, found, None)  # type: ignore[arg-type]
    outcome = compare(found, found, found)
    assert (outcome.task, outcome.role, outcome.questions) == ("addition", "test", splits.test.fingerprint)
    assert len(repr(splits)) < 200 and len(repr(splits.test)) < 200 and splits.test[0].answer
