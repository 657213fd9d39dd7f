"""LAE: the batched recording equals a slow, obvious one, and a model has no shift against itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mechtransplant.activations import decoding_magnitudes, forced_magnitudes
from mechtransplant.errors import TaskError, UsageError
from mechtransplant.evaluation import generate
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.ranking import RULES, rank_modules, register_rule
from mechtransplant.shifts import decoding_shifts
from mechtransplant.tasks import PromptFormat, Task, load_task


def slow_magnitudes(model: LanguageModel, prompt: list[int], text: list[int]) -> np.ndarray:
    """‖h‖₁/d of every linear layer at the last token, one full forward a step; shape (layers, steps)."""
    steps = []
    for step in range(len(text)):
        seen: dict[str, float] = {}
        handles = [
            model.hf.get_submodule(name).register_forward_hook(
                lambda m, i, o, a=address, seen=seen: seen.__setitem__(a, o[0, -1].abs().sum().item() / o.shape[-1])
            )
            for address, name in model.layout.linears.items()
        ]
        with torch.no_grad():
            model.hf(torch.tensor([prompt + text[:step]]), use_cache=False)
        for handle in handles:
            handle.remove()
        steps.append(list(seen[a] for a in model.layout.linears))
    return np.array(steps).T


@pytest.mark.parametrize("shots", [(), (("12+25=", "37"), ("98+3=", "101"))])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_recorded_magnitudes_equal_a_slow_loop(
    generations: Pair, random_pair: Pair, batch_size: int, shots: tuple[tuple[str, str], ...]
) -> None:
    # after worked examples the family ends at once; a random model writes on, so it tests the shared prefix
    model = random_pair.target if shots else generations.target
    examples = [*load_task("addition", 6).examples, *load_task("copy", 5).examples]
    task = Task("mixed", tuple(examples), max_new_tokens=8, format=PromptFormat(shots=shots, shot_separator=" "))
    values, generations_ = decoding_magnitudes(model, task, batch_size=batch_size)
    texts = [list(g.tokens) for g in generations_]
    assert generations_ == generate(model, task, batch_size=1)
    if shots:
        assert min(len(t) for t in texts) > 2
    else:
        assert len({len(t) for t in texts}) > 1, "texts of one length would not test the masking of finished rows"
    forced = forced_magnitudes(model, task, texts, batch_size)
    for row, (prompt, text) in enumerate(zip(task.prompts(), texts, strict=True)):
        expected = slow_magnitudes(model, model.tokenizer(prompt)["input_ids"], text)
        np.testing.assert_allclose(values[:, row, : len(text)], expected, atol=1e-5)
        np.testing.assert_allclose(forced[:, row, : len(text)], expected, atol=1e-5)
        assert np.isnan(values[:, row, len(text) :]).all() and np.isnan(forced[:, row, len(text) :]).all()


def test_a_step_that_is_undone_is_not_recorded(generations: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.utils import DeferredStopCheck

    task = replace(load_task("addition", 12), max_new_tokens=8)
    plain, texts = decoding_magnitudes(generations.target, task, batch_size=5)
    # as on mps, where it is known a step late that all rows have ended
    monkeypatch.setattr(DeferredStopCheck, "is_supported", staticmethod(lambda *_, **__: True))
    monkeypatch.setattr(torch, "Event", lambda **_: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    deferred, again = decoding_magnitudes(generations.target, task, batch_size=5)
    assert again == texts and max(len(g.tokens) for g in texts) < 8
    np.testing.assert_array_equal(deferred, plain)


@pytest.mark.parametrize(
    "options", [{}, {"alignment": "teacher-forced"}, {"alignment": "teacher-forced", "text": "gold"}]
)
def test_lae_of_a_model_with_itself_is_exactly_zero(generations: Pair, addition: Task, options: dict[str, str]) -> None:
    itself = make_pair(
        generations.target, LanguageModel("copy", generations.target.hf, generations.target.tokenizer), "self"
    )
    ranking = rank_modules(itself, addition.split(16, 16, 16).discover, **options)  # type: ignore[arg-type]
    assert (ranking.score == 0).all() and len(ranking) == 28


def test_lae_is_the_mean_over_prompts_of_the_mean_over_common_steps(generations: Pair, addition: Task) -> None:
    task = addition.split(8, 8, 8).discover
    source, _ = decoding_magnitudes(generations.source, task)
    target, _ = decoding_magnitudes(generations.target, task)
    expected = []
    for module in range(28):
        per_prompt = []
        for row in range(8):
            gaps = [
                abs(a - b) for a, b in zip(source[module, row], target[module, row], strict=True) if not np.isnan(a - b)
            ]
            per_prompt.append(sum(gaps) / len(gaps))
        expected.append(sum(per_prompt) / 8)
    ranking = rank_modules(generations, task).set_index("module").score
    np.testing.assert_allclose(ranking[generations.modules("linear")], expected, rtol=1e-9)


def test_shift_frame_is_tidy(generations: Pair, addition: Task) -> None:
    frame = decoding_shifts(generations, addition.split(8, 8, 8).discover, "teacher-forced", "source")
    assert list(frame) == ["module", "kind", "layer", "head", "prompt", "measure", "value"]
    assert len(frame) == 28 * 8 and (frame.value >= 0).all()


def test_ranking_is_sorted_and_complete(generations: Pair, addition: Task) -> None:
    ranking = rank_modules(generations, addition.split(16, 16, 16).discover)
    assert ranking.score.is_monotonic_decreasing and list(ranking["rank"]) == list(range(1, 29))
    assert set(ranking.module) == set(generations.modules("linear"))


def test_weight_delta_equals_the_norm(generations: Pair) -> None:
    ranking = rank_modules(generations, None, "weight_delta").set_index("module").score
    name = "model.layers.2.mlp.up_proj.weight"
    difference = generations.source_parameters[name] - generations.target_parameters[name]
    assert ranking["L2.up_proj"] == pytest.approx(difference.norm().item(), rel=1e-5)
    heads = rank_modules(generations, None, "weight_delta", kind="head")
    assert len(heads) == 32 and (heads.score > 0).all()


def test_refusals(generations: Pair, addition: Task) -> None:
    splits = addition.split(8, 8, 8)
    with pytest.raises(UsageError, match=r"unknown rule 'lea'.*lae"):
        rank_modules(generations, splits.discover, "lea")
    with pytest.raises(TaskError, match="test split"):
        rank_modules(generations, splits.test)
    with pytest.raises(TaskError, match="choose split"):
        rank_modules(generations, splits.choose)
    with pytest.raises(TaskError, match="whole task"):
        rank_modules(generations, addition)
    with pytest.raises(UsageError, match="alignment"):
        rank_modules(generations, splits.discover, alignment="sideways")
    with pytest.raises(UsageError, match="unknown option of rule 'lae' 'colour'"):
        rank_modules(generations, splits.discover, colour="red")
    with pytest.raises(UsageError, match="scores kind linear, head, neuron, mlp or attn, not 'block'"):
        rank_modules(generations, splits.discover, kind="block")
    with pytest.raises(UsageError, match="own-text is measured for linear layers, not for head"):
        rank_modules(generations, splits.discover, kind="head", alignment="own-text")
    with pytest.raises(UsageError, match="needs prompts"):
        rank_modules(generations, None)


def test_a_users_rule_registers_in_three_lines(generations: Pair) -> None:
    @register_rule("layer-number", needs="nothing")
    def by_layer(pair: Pair, task: Task | None, kind: str, **options: int) -> list[float]:
        return [float(m[1]) for m in pair.modules(kind)]  # type: ignore[arg-type]

    try:
        assert set(rank_modules(generations, None, "layer-number").module[:7]) == set(
            generations.layout.linears_of("L3")
        )
    finally:
        del RULES["layer-number"]


def test_short_budget_records_only_its_steps(generations: Pair, addition: Task) -> None:
    values, _ = decoding_magnitudes(generations.target, replace(addition.split(8, 8, 8).discover, max_new_tokens=2))
    assert values.shape == (28, 8, 2)
