"""Side effects: nothing where nothing moves, the numbers of plain Hugging Face forwards, and refusals in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba

from mechtransplant.errors import TaskError, UsageError
from mechtransplant.evaluation import compare, evaluate
from mechtransplant.export.card import side_effect_lines
from mechtransplant.figures import GREY, gain_against_harm
from mechtransplant.grafting import ConditionalGraft, Graft
from mechtransplant.pair import LanguageModel, Pair, load_pair, make_pair
from mechtransplant.ranking import rank_modules
from mechtransplant.side_effects import (
    Baseline,
    Divergence,
    NeutralText,
    SideEffects,
    load_texts,
    measure_side_effects,
    neutral_texts,
    pareto_front,
    side_effect_baseline,
    text_divergence,
)
from mechtransplant.side_effects import divergence as machinery
from mechtransplant.side_effects.neutral import start_token
from mechtransplant.significance import paired_difference_interval
from mechtransplant.tasks import Task, list_tasks, load_task
from mechtransplant.weights import get_pair, list_pairs

MODULES = ["L1.mlp", "L2H3", "L3.q_proj", "L2.mlp"]


@pytest.fixture(scope="module")
def planted() -> Pair:
    return load_pair("family/planted-mixed-drifted")


@pytest.fixture(scope="module")
def text(planted: Pair) -> NeutralText:
    return neutral_texts(planted.target, n=24, tokens=20)


@pytest.fixture(scope="module")
def baseline(planted: Pair, text: NeutralText) -> Baseline:
    return side_effect_baseline(planted, text=text)


@pytest.fixture(scope="module")
def effects(planted: Pair, baseline: Baseline) -> SideEffects:
    return measure_side_effects(planted, Graft(planted.planted), before=baseline)


# --- pairs -------------------------------------------------------------------------------------------------------


def test_every_pair_names_tasks_that_exist_and_its_own() -> None:
    for name in list_pairs():
        entry = get_pair(name)
        if entry.tasks or name.startswith("family/"):
            assert entry.task in entry.tasks and len(entry.tasks) > 1, name
        assert set(entry.tasks) <= set(list_tasks()), name


def test_a_pair_has_its_tasks_in_both_directions(planted: Pair, random_pair: Pair) -> None:
    assert planted.tasks == ("largest-letter", "addition", "reverse", "sort", "copy", "max")
    assert planted.reversed().tasks == planted.tasks
    assert random_pair.tasks == ()


# --- neutral text ------------------------------------------------------------------------------------------------


def test_sampled_text_is_fixed_by_its_seed_and_not_by_the_batches(planted: Pair) -> None:
    first = neutral_texts(planted.target, n=10, tokens=16, seed=3)
    again = neutral_texts(planted.target, n=10, tokens=16, seed=3, batch_size=3)
    assert first == again and first.fingerprint == again.fingerprint
    other = neutral_texts(planted.target, n=10, tokens=16, seed=4)
    assert other.ids != first.ids and other.fingerprint != first.fingerprint


def test_sampled_text_begins_with_the_start_token_and_ends_at_the_first_end_token(planted: Pair) -> None:
    made = neutral_texts(planted.target, n=32, tokens=16)
    tokenizer = planted.target.tokenizer
    for row in made.ids:
        assert row[0] == tokenizer.bos_token_id and 2 <= len(row) <= 17
        assert tokenizer.eos_token_id not in row[1:-1]
        assert len(row) == 17 or row[-1] == tokenizer.eos_token_id
    assert {len(row) for row in made.ids} != {17}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_own_distribution(planted: Pair, temperature: float) -> None:
    from scipy.stats import chisquare

    hf, n = planted.target.hf, 4000
    made = neutral_texts(planted.target, n=n, tokens=1, temperature=temperature, batch_size=1000)
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor([[planted.target.tokenizer.bos_token_id]])).logits[0, -1]
    expected = n * (logits.double() / temperature).softmax(-1).numpy()
    seen = np.bincount([row[1] for row in made.ids], minlength=len(expected))
    common = expected >= 5
    pooled = [np.append(v[common], v[~common].sum()) for v in (seen, expected)]
    assert chisquare(*[v[pooled[1] > 0] for v in pooled]).pvalue > 0.001


def test_the_start_token_falls_back_on_the_end_token_and_on_a_space(planted: Pair) -> None:
    class Tokenizer:
        bos_token_id: int | None = None
        eos_token_id: int | None = 7
        spaces = [9]

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": self.spaces}

    tokenizer = Tokenizer()
    assert start_token(planted.target.tokenizer) == planted.target.tokenizer.bos_token_id
    assert start_token(tokenizer) == 7
    tokenizer.eos_token_id = None
    assert start_token(tokenizer) == 9
    tokenizer.spaces = []
    with pytest.raises(UsageError, match="give texts from a file"):
        start_token(tokenizer)


@pytest.mark.parametrize("bad", [{"n": 0}, {"tokens": 0}, {"seed": -1}, {"temperature": 0}, {"temperature": math.nan}])
def test_bad_options_of_sampling_are_refused(planted: Pair, bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        neutral_texts(planted.target, **bad)  # type: ignore[arg-type]


def test_text_files_hold_a_text_a_line_or_a_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("copy ab=ab\r\n\nsort ba=ab\n", encoding="utf-8")
    rows = [{"text": "two\nlines\u2028here", "id": 1}, {"text": "max 12 11 13=13"}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    lines = load_texts(tmp_path / "a.txt")
    assert lines.texts == ("copy ab=ab", "sort ba=ab") and lines.origin == "a.txt" and not lines.ids
    assert load_texts(str(tmp_path / "b.jsonl")).texts == tuple(r["text"] for r in rows)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", None, "no text file"),
        ("a.txt", "\n \n", "has no text"),
        ("a.csv", "text", "comes from a .txt or a .jsonl"),
        ("a.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("a.jsonl", "", "has no text"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2: broken JSON"),
        ("a.jsonl", '{"text": "x"}\n{"body": "x"}', 'line 2: expected an object with a "text"'),
        ("a.jsonl", '["x"]', 'line 1: expected an object with a "text"'),
        ("a.jsonl", '{"text": " "}', "line 1: expected an object"),
    ],
)
def test_bad_text_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said) as error:
        load_texts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_texts_that_cannot_be_read_by_a_model_are_refused(planted: Pair) -> None:
    with pytest.raises(UsageError, match="at least one text"):
        NeutralText((), "nowhere")
    with pytest.raises(UsageError, match="rows of tokens"):
        NeutralText(("a", "b"), "here", ((1, 2),))
    with pytest.raises(UsageError, match="none of them predicted"):
        NeutralText(("",), "here").rows(planted.target)
    with pytest.raises(UsageError, match="another tokenizer"):
        NeutralText(("a",), "here", ((1, 2, 10_000),)).rows(planted.target)
    with pytest.warns(UserWarning, match="128 positions"):
        machinery.read_text(planted.target, NeutralText(("a" * 1000,), "here"))


# --- divergence --------------------------------------------------------------------------------------------------


def plainly(pair: Pair, graft: Graft, text: NeutralText) -> Divergence:
    """The same sums from one unpadded forward a text of two separate models, in float64."""
    grafted = graft.copied(pair)
    sums = []
    for ids in text.rows(pair.target):
        row = torch.tensor([ids])
        with torch.no_grad():
            p, q = (m.hf(input_ids=row).logits[0, :-1].double().log_softmax(-1) for m in (pair.target, grafted))
        gold = row[0, 1:, None]
        kl = (p.exp() * (p - q)).sum()
        sums.append([len(ids) - 1, *(float(-s.gather(1, gold).sum()) for s in (p, q)), float(kl)])
    tokens, before, after, kls = np.array(sums).T
    return Divergence(tokens.astype(int), before, after, kls)


@pytest.mark.parametrize("strength", [1.0, 0.02])
def test_divergence_is_that_of_plain_forwards_one_text_at_a_time(
    planted: Pair, text: NeutralText, strength: float
) -> None:
    graft = Graft(planted.planted, strength)
    ours, theirs = text_divergence(planted, graft, text), plainly(planted, graft, text)
    assert (ours.tokens == theirs.tokens).all()
    for name in ("before", "after", "kl"):
        assert np.abs((getattr(ours, name) - getattr(theirs, name)) / ours.tokens).max() < 1e-5, name
    assert ours.mean_kl == pytest.approx(theirs.mean_kl, rel=1e-3 if strength < 1 else 1e-5)
    assert (ours.kl > 0).all() and (ours.kl_by_text == ours.kl / ours.tokens).all()


def test_perplexity_is_the_exponential_of_the_models_own_loss(planted: Pair, text: NeutralText) -> None:
    graft = Graft(MODULES)
    made = text_divergence(planted, graft, text)
    for model, perplexity in ((planted.target, made.perplexity_before), (graft.copied(planted), made.perplexity_after)):
        total = 0.0
        for ids in text.rows(model):
            row = torch.tensor([ids])
            with torch.no_grad():
                total += float(model.hf(input_ids=row, labels=row).loss) * (len(ids) - 1)
        assert perplexity == pytest.approx(math.exp(total / made.tokens.sum()), rel=1e-5)
    assert made.perplexity_change == pytest.approx(made.perplexity_after / made.perplexity_before - 1, rel=1e-9)


def test_batches_and_chunks_do_not_matter(planted: Pair, text: NeutralText, monkeypatch: pytest.MonkeyPatch) -> None:
    graft = Graft(MODULES)
    whole = text_divergence(planted, graft, text)
    small = text_divergence(planted, graft, text, batch_size=5)
    monkeypatch.setattr(machinery, "CHUNK", 3 * 57)
    monkeypatch.setattr(machinery, "BATCH_BYTES", 4 * 21 * 57 * 2)
    tiny = text_divergence(planted, graft, text)
    assert max(map(len, machinery.read_text(planted.target, text).batches)) == 2
    for other in (small, tiny):
        for name in ("before", "after", "kl"):
            np.testing.assert_allclose(getattr(other, name), getattr(whole, name), atol=1e-4, rtol=1e-5)


def test_kept_logits_give_the_same_numbers_and_stay_within_their_budget(planted: Pair, text: NeutralText) -> None:
    graft = Graft(MODULES)
    fresh = text_divergence(planted, graft, text, batch_size=6)
    for budget in (0, 2 * 6 * 20 * 57 * 4, 1 << 29):
        reading = machinery.read_text(planted.target, text, 6, keep_bytes=budget)
        for _ in range(2):
            made = text_divergence(planted, graft, reading)
            assert (made.kl == fresh.kl).all() and (made.before == fresh.before).all()
        assert sum(t.numel() * 4 for t in reading.kept.values()) <= budget
        assert len(reading.kept) == {0: 0, 1 << 29: 4}.get(budget, len(reading.kept))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_is_never_below_zero_and_exactly_zero_between_equal_models(text: NeutralText, dtype: str) -> None:
    pair = load_pair("family/planted-mixed-drifted", dtype=dtype)
    none, little = (text_divergence(pair, Graft(MODULES, s), text) for s in (0.0, 1e-3))
    assert (none.kl == 0).all() and none.perplexity_change == 0
    assert (little.kl >= 0).all()


def test_on_text_that_the_target_wrote_kl_is_the_expected_rise_of_log_perplexity(planted: Pair) -> None:
    made = text_divergence(planted, Graft(planted.planted), neutral_texts(planted.target, n=400, tokens=24))
    rise = (made.after - made.before) / made.tokens
    error = np.std(made.after - made.before - made.kl) * math.sqrt(len(rise)) / made.tokens.sum()
    assert abs(math.log1p(made.perplexity_change) - made.mean_kl) < 4 * error


def test_extreme_distributions_give_finite_sums() -> None:
    rows = [[0, 1, 2]]
    p = torch.tensor([[[0.0, 300.0, -300.0], [200.0, 0.0, -math.inf]]])
    q = torch.tensor([[[300.0, 0.0, -300.0], [0.0, 200.0, 0.0]]])
    nll_before, nll_after, kl = machinery._compare(p, q, rows)[:, 0]
    assert nll_before == math.inf and nll_after == pytest.approx(500)
    assert kl == pytest.approx(300 + 200)
    assert machinery._compare(q, p, rows)[2, 0] == math.inf
    lost = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]]])
    assert machinery._compare(torch.zeros(1, 2, 3), lost, rows)[2, 0] == math.inf
    assert machinery._compare(lost, torch.zeros(1, 2, 3), rows)[2, 0] == pytest.approx(2 * math.log(1.5))


# --- measuring ---------------------------------------------------------------------------------------------------


def test_the_frame_holds_what_separate_evaluations_say(planted: Pair, effects: SideEffects) -> None:
    frame = effects.frame.set_index("what")
    assert list(frame.index) == ["addition", "reverse", "sort", "copy", "max", "perplexity", "KL"]
    model = Graft(planted.planted).copied(planted)
    for name in ("addition", "sort"):
        test = load_task(name).split().test
        before, after = evaluate(planted.target, test), evaluate(model, test)
        outcome = compare(before, before, after)
        row = frame.loc[name]
        assert (row.before, row.after) == (before.accuracy, after.accuracy) and row.n == 256
        assert (row.change, row.gained, row.lost) == (outcome.difference, outcome.gained, outcome.lost)
        assert (row.low, row.high) == paired_difference_interval(before.correct, after.correct)
        assert row.p_value == outcome.p_value
    assert list(frame.kind) == ["task"] * 5 + ["text"] * 2 and frame.gained.isna().sum() == 2
    tasks = frame[frame.kind == "task"]
    assert effects.worst.what == tasks.change.astype(float).idxmin()
    assert effects.mean_change == pytest.approx(tasks.change.mean())
    below = math.sqrt(sum((r.change - r.low) ** 2 for r in tasks.itertuples())) / 5
    above = math.sqrt(sum((r.change - r.high) ** 2 for r in tasks.itertuples())) / 5
    assert effects.mean_interval == pytest.approx((tasks.change.mean() - below, tasks.change.mean() + above))
    assert frame.loc["perplexity"].change == effects.perplexity_change
    for row in frame.itertuples():
        assert row.low <= row.change <= row.high
    assert effects.kl == frame.loc["KL"].after == frame.loc["KL"].change


def test_the_planted_graft_is_measured_and_the_pair_is_as_before(unchanged: Pair) -> None:
    made = measure_side_effects(unchanged, Graft(unchanged.modules("mlp")), n=64)
    said = str(made)
    assert "grafted" not in said and "KL" in said and "points" in said and "64 questions" in said
    assert made.kl is not None and made.kl > 0
    assert made.text is not None and "sampled from repo:family/second" in made.text.origin


@pytest.mark.parametrize("graft", [Graft(MODULES, 0.0), Graft([])], ids=["strength 0", "no module"])
def test_a_graft_of_nothing_changes_exactly_nothing(planted: Pair, baseline: Baseline, graft: Graft) -> None:
    made = measure_side_effects(planted, graft, before=baseline)
    assert (made.frame.change == 0).all() and (made.frame.iloc[-2:][["low", "high"]] == 0).all(axis=None)
    assert (made.perplexity_change, made.kl, made.mean_change) == (0, 0, 0)
    # what 256 questions cannot rule out, whatever the graft
    edge = 1.959964**2 / (256 + 1.959964**2)
    assert made.frame.high.iloc[0] == pytest.approx(edge, rel=1e-5)
    assert made.mean_interval == pytest.approx((-edge / math.sqrt(5), edge / math.sqrt(5)), rel=1e-5)
    assert made.frame.before.iloc[-2] == made.frame.after.iloc[-2]


def test_a_self_graft_changes_exactly_nothing(planted: Pair, text: NeutralText) -> None:
    alone = make_pair(planted.target, planted.target)
    made = measure_side_effects(alone, Graft(MODULES), tasks=["sort"], text=text)
    assert (made.frame.change == 0).all() and (made.frame.gained.iloc[0], made.frame.lost.iloc[0]) == (0, 0)


def test_a_seed_reproduces_and_a_baseline_gives_the_same_numbers(planted: Pair) -> None:
    graft, options = Graft(MODULES), {"tasks": ["copy", "max"], "n": 64, "seed": 5}
    first = measure_side_effects(planted, graft, **options)  # type: ignore[arg-type]
    again = measure_side_effects(planted, graft, **options)  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(first.frame, again.frame)
    before = side_effect_baseline(planted, **options)  # type: ignore[arg-type]
    for _ in range(2):
        shared = measure_side_effects(planted, graft, before=before, seed=5)
        pd.testing.assert_frame_equal(first.frame, shared.frame)
    other = measure_side_effects(planted, graft, tasks=["copy", "max"], n=64, seed=6)
    assert other.kl != first.kl


def test_batch_size_does_not_matter(planted: Pair, text: NeutralText) -> None:
    options = {"tasks": ["sort", "addition"], "text": text, "n": 64}
    one, two = (measure_side_effects(planted, Graft(MODULES), batch_size=b, **options) for b in (64, 7))  # type: ignore[arg-type]
    columns = ["before", "after", "change", "low", "high"]
    np.testing.assert_allclose(one.frame[columns].astype(float), two.frame[columns].astype(float), rtol=1e-4, atol=1e-7)


def test_tasks_and_texts_of_a_users_own(planted: Pair, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("copy ab=ab\nsort ba=ab\nmax 12 11 13=13\n", encoding="utf-8")
    (tmp_path / "mine.jsonl").write_text('{"question": "copy abc=", "answer": "abc"}\n' * 2, encoding="utf-8")
    whole = load_task("reverse", 32)
    tasks = ["sort", whole, str(tmp_path / "mine.jsonl")]
    made = measure_side_effects(planted, Graft(MODULES), tasks=tasks, text=str(tmp_path / "mine.txt"), n=60)
    assert list(made.frame.what) == ["sort", "reverse", "mine", "perplexity", "KL"]
    assert list(made.frame.n) == [60, 32, 2, 3, 3]
    assert any("few questions" in note and "mine (2)" in note for note in made.notes)
    assert any("3 texts are few" in note for note in made.notes)
    assert made.text is not None and made.text.origin == "mine.txt"


def test_a_long_text_is_cut_and_a_note_says_so(planted: Pair) -> None:
    long = NeutralText(("copy ab=ab", "a" * 300), "here")
    with pytest.warns(UserWarning, match="256 tokens, and LlamaForCausalLM has 128 positions"):
        made = measure_side_effects(planted, Graft(MODULES), tasks=(), text=long)
    assert made.divergence is not None and made.divergence.tokens.max() == 255
    assert any("1 texts are longer than 256 tokens" in note for note in made.notes)


def test_without_tasks_the_text_is_measured_and_without_text_the_tasks(random_pair: Pair, planted: Pair) -> None:
    text = neutral_texts(random_pair.target, n=8, tokens=8)
    alone = measure_side_effects(random_pair, Graft(["L0.mlp"]), text=text)
    assert list(alone.frame.what) == ["perplexity", "KL"] and alone.worst.what == "perplexity"
    assert alone.mean_change is None and alone.mean_interval is None
    tasks = measure_side_effects(planted, Graft(MODULES), tasks="sort", text=False, n=32)
    assert list(tasks.frame.what) == ["sort"] and tasks.kl is None and tasks.perplexity_change is None
    with pytest.raises(UsageError, match="nothing to measure"):
        measure_side_effects(random_pair, Graft(["L0.mlp"]), text=False)


def test_a_task_that_the_target_cannot_do_has_nothing_to_lose(planted: Pair) -> None:
    made = measure_side_effects(planted, Graft(["L0H0"], 0.0), tasks="largest-letter", text=False, n=64)
    assert made.notes == ("largest-letter: the target answers none of the questions, so there is nothing to lose",)


def test_a_conditional_graft_is_measured_on_questions_alone(planted: Pair) -> None:
    conditional = ConditionalGraft(Graft(planted.planted), accepts=lambda e: e.question.startswith("sort"))
    made = measure_side_effects(planted, conditional, tasks=["sort", "reverse"], text=False, n=64)
    always = measure_side_effects(planted, conditional.graft, tasks=["sort", "reverse"], text=False, n=64)
    assert (made.frame.iloc[0] == always.frame.iloc[0]).all() and made.frame.change.iloc[1] == 0
    with pytest.raises(UsageError, match="text=False"):
        measure_side_effects(planted, conditional, tasks=["sort"], n=16)
    with pytest.raises(UsageError, match="plain Graft"):
        text_divergence(planted, conditional, neutral_texts(planted.target, 2, 4))  # type: ignore[arg-type]


def selected(role: str) -> Task:
    return getattr(load_task("sort", 256).split(32, 32, 32), role)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (lambda: {"tasks": [selected("discover")]}, "'discover' split, which served to select"),
        (lambda: {"tasks": selected("choose")}, "'choose' split, which served to select"),
        (lambda: {"tasks": ["sort", "sort"]}, "given twice"),
        (lambda: {"tasks": "sorting"}, "unknown task"),
        (lambda: {"text": 3}, "text is neutral text"),
        (lambda: {"text": "nowhere.txt"}, "no text file"),
        (lambda: {"n": 0}, "n must be"),
        (lambda: {"seed": -1}, "seed must be"),
        (lambda: {"batch_size": 0}, "batch_size must be"),
        (lambda: {"before": 3}, "side_effect_baseline"),
    ],
)
def test_bad_arguments_are_refused(planted: Pair, options: Callable[[], dict[str, object]], said: str) -> None:
    with pytest.raises((UsageError, TaskError), match=said):
        measure_side_effects(planted, Graft(MODULES), **options())  # type: ignore[arg-type]


def test_questions_that_selected_the_modules_are_refused_before_anything_is_measured(
    generations: Pair, addition: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    # another seed's split has questions in common with the one that a name stands for
    ranking = rank_modules(generations, addition.split(discover=32, choose=8, test=8, seed=1).discover, kind="linear")
    graft = Graft(ranking.module[:8])
    before = side_effect_baseline(generations, tasks=addition, text=False)

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("mechtransplant.side_effects.measure.evaluate", never)
    for options in ({"tasks": "addition", "text": False}, {"tasks": ["sort", addition]}, {"before": before}):
        # names that went through plain strings are recognised by the pair
        for same in (graft, Graft([str(m) for m in graft.modules]), ConditionalGraft(graft, when="prompt")):
            with pytest.raises(UsageError, match="of 'addition' selected the modules"):
                measure_side_effects(generations, same, **options)  # type: ignore[arg-type]


def test_what_would_measure_another_model_is_refused(planted: Pair, generations: Pair, baseline: Baseline) -> None:
    graft = Graft(MODULES)
    with graft.applied(planted), pytest.raises(UsageError, match="in place on this pair's target"):
        measure_side_effects(planted, graft, before=baseline)
    with pytest.raises(UsageError, match="other weights"):
        measure_side_effects(generations, graft, before=baseline)
    with pytest.raises(UsageError, match="leave out tasks and text"):
        measure_side_effects(planted, graft, before=baseline, tasks="sort")
    with pytest.raises(UsageError, match="pass the pair"):
        measure_side_effects(planted.target, graft)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="side effects are those of"):
        measure_side_effects(planted, MODULES)  # type: ignore[arg-type]


def test_a_large_vocabulary_is_read_in_small_batches(random_model: Callable[..., LanguageModel]) -> None:
    models = [random_model(seed, vocab_size=40_000) for seed in (0, 1)]
    pair = make_pair(*models)
    text = neutral_texts(pair.target, n=6, tokens=6)
    graft = Graft(["L0.mlp", "L1.attn"])
    ours, theirs = text_divergence(pair, graft, text), plainly(pair, graft, text)
    np.testing.assert_allclose(ours.kl, theirs.kl, atol=1e-5)


# --- the card, the front and the figure --------------------------------------------------------------------------


def test_the_card_takes_the_measured_table(effects: SideEffects) -> None:
    lines = side_effect_lines(effects.card())
    assert lines[0] == "|  | target | this model | change [95 %] | n |" and len(lines) == 2 + 7
    assert "nan" not in "".join(lines).lower() and "nats a token" in lines[-1]


def row(gain: float, harm: float) -> dict[str, float]:
    return {"gain": gain, "harm": harm}


values = st.one_of(st.integers(-3, 3).map(float), st.floats(-1, 1), st.sampled_from([math.inf, -math.inf]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(values, values), max_size=25))
def test_the_front_is_that_of_brute_force(points: list[tuple[float, float]]) -> None:
    frame = pd.DataFrame(points, columns=["gain", "harm"], dtype=float)
    # the untouched target gains nothing and harms nothing
    every = [*points, (0.0, 0.0)]
    beaten = [any(g >= gain and h <= harm and (g > gain or h < harm) for g, h in every) for gain, harm in points]
    made = pareto_front(frame)
    assert list(made.front) == [not b for b in beaten] and made.front.dtype == bool
    assert "front" not in frame


def test_a_front_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(UsageError, match="row 1 has no harm"):
        pareto_front(pd.DataFrame([row(1, 0), row(1, math.nan)]))
    with pytest.raises(UsageError, match="lacks the column 'gain'"):
        pareto_front(pd.DataFrame({"harm": [1.0]}))
    with pytest.raises(UsageError, match="must be numbers"):
        pareto_front(pd.DataFrame({"gain": ["a"], "harm": [1.0]}))
    renamed = pareto_front(pd.DataFrame({"tir": [1.0, 2.0], "kl": [0.1, 0.1]}), gain="tir", harm="kl")
    assert list(renamed.front) == [False, True]


def test_gain_and_harm_of_a_real_graft_are_drawn(planted: Pair, effects: SideEffects, baseline: Baseline) -> None:
    test = load_task("largest-letter").split().test
    before, best = evaluate(planted.target, test), evaluate(planted.source, test)
    rows = []
    for role, modules in (("graft", planted.planted), ("random", ["L0.mlp"]), ("graft", ["L0H0"])):
        graft = Graft(modules)
        with graft.applied(planted):
            outcome = compare(before, best, evaluate(planted.target, test))
        measured = measure_side_effects(planted, graft, before=baseline)
        rows.append(measured.against(outcome, role=role, label=f"{role} of {len(graft)}"))
    assert rows[0]["gain"] > 0.5 and rows[0]["harm"] == -effects.mean_change  # type: ignore[operator]
    assert all(r["harm_low"] <= r["harm"] <= r["harm_high"] for r in rows)
    frame = pareto_front(pd.DataFrame(rows), harm="kl")
    assert frame.front[0]
    figure, axes = gain_against_harm(frame, harm="kl", title="planted")
    assert "points" in axes.get_ylabel() and "nats" in axes.get_xlabel()
    assert "graft of 5" in [t.get_text() for t in axes.texts]
    grey = [line for line in axes.lines if to_rgba(line.get_color()) == to_rgba(GREY) and line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in grey] == [1]
    assert grey[0].get_ydata()[0] == pytest.approx(100 * rows[1]["gain"])
    figure.draw_without_rendering()
    figure, axes = gain_against_harm(frame[["gain", "harm"]])
    assert "points" in axes.get_xlabel() and not axes.texts


def test_the_figure_refuses_what_it_cannot_show(effects: SideEffects) -> None:
    with pytest.raises(UsageError, match="lacks the column 'gain'"):
        gain_against_harm(effects.frame)
    with pytest.raises(UsageError, match="no rows"):
        gain_against_harm(pd.DataFrame({"gain": [], "harm": []}))
    with pytest.raises(UsageError, match="not finite"):
        gain_against_harm(pd.DataFrame([row(1, math.inf)]))
    with pytest.raises(UsageError, match="the gain is an outcome"):
        effects.against(3)  # type: ignore[arg-type]
