"""Patches that begin at their layer, over what the source and the target read once, are every patch by itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from architectures import ARCHITECTURES, random_pair_of
from test_forked import close, deep
from tokenizers.processors import TemplateProcessing

import mechtransplant as mt
from mechtransplant.evaluation import GoldOutcomes, gold_outcomes
from mechtransplant.evaluation import sweeps as evaluation_sweeps
from mechtransplant.evaluation.answers import AnswerReader
from mechtransplant.evaluation.batches import encode
from mechtransplant.pair import make_pair
from mechtransplant.patching import Patch, patch_effects, sweeps
from mechtransplant.tasks import Example, PromptFormat


@pytest.fixture(scope="module")
def questions() -> Any:
    return mt.load_task("addition").split(12, 1, 1).discover


def modules_of_layer(layer: int) -> list[str]:
    return [f"L{layer}H0", f"L{layer}H3", f"L{layer}.mlp", f"L{layer}.attn"]


def is_every_patch_by_itself(pair: Any, task: Any, positions: Any, heads: Any, batch_size: int = 5) -> None:
    modules = [m for layer in range(4) for m in modules_of_layer(layer)]
    before, after = patch_effects(pair, task, modules, positions, heads=heads, batch_size=batch_size)
    close(before, gold_outcomes(pair.target, task, batch_size))
    for at, module in enumerate(modules):
        with Patch([module], positions, heads=heads).applied(pair):
            close(GoldOutcomes(*(values[at] for values in after)), gold_outcomes(pair.target, task, batch_size))
    assert np.abs(after.log_probability - before.log_probability).max(1).min() > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_every_architecture(architecture: str, positions: str, generations: Any, questions: Any) -> None:
    is_every_patch_by_itself(deep(architecture, generations.target.tokenizer), questions, positions, "result")


@pytest.mark.parametrize("heads", ["z", "result"])
@pytest.mark.parametrize("positions", ["all", "answer", "last", "decoding"])
def test_positions_and_heads(heads: Any, positions: Any, generations: Any, questions: Any) -> None:
    is_every_patch_by_itself(generations, questions, positions, heads)


@pytest.mark.filterwarnings("ignore:prompt and answer have:UserWarning")
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_with_a_shared_prefix(positions: Any, generations: Any) -> None:
    task = mt.load_task("arithmetic-few-shot").split(10, 1, 1).discover
    is_every_patch_by_itself(generations, task, positions, "result", 4)


@pytest.mark.parametrize("positions", ["all", "answer"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_over_a_window_that_cuts_the_prompt(architecture: str, positions: Any, generations: Any) -> None:
    pair = deep(architecture, generations.target.tokenizer)
    window = pair.target.hf.config.sliding_window
    task = mt.load_task("arithmetic-few-shot").split(6, 1, 1).discover
    assert min(map(len, encode(task, pair.target.tokenizer).prompts)) > window
    is_every_patch_by_itself(pair, task, positions, "z", 4)


@pytest.mark.parametrize("positions", ["prompt", [0, -1]])
def test_other_positions_have_whole_passes(positions: Any, generations: Any, questions: Any) -> None:
    (before, after), module = patch_effects(generations, questions, ["L1.mlp"], positions), "L1.mlp"
    with Patch([module], positions).applied(generations):
        close(GoldOutcomes(*(v[0] for v in after)), gold_outcomes(generations.target, questions))
    assert np.abs(after.log_probability - before.log_probability).max() > 1e-4


def test_quick_and_whole_passes_agree(generations: Any, questions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [*modules_of_layer(0), *modules_of_layer(2)]
    quick = patch_effects(generations, questions, modules, "answer", batch_size=5)
    monkeypatch.setattr(sweeps, "can_resume", lambda model: False)
    for one, other in zip(quick, patch_effects(generations, questions, modules, "answer", batch_size=5), strict=True):
        close(one, other)


@pytest.mark.filterwarnings("ignore:prompt and answer have:UserWarning")
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_more_than_can_be_remembered(positions: Any, generations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = mt.load_task("arithmetic-few-shot").split(8, 1, 1).discover
    modules = modules_of_layer(2)
    quick = patch_effects(generations, task, modules, positions, batch_size=4)
    remembering = evaluation_sweeps.remembering
    monkeypatch.setattr(evaluation_sweeps, "remembering", lambda model, limit: remembering(model, 10))
    for one, other in zip(quick, patch_effects(generations, task, modules, positions, batch_size=4), strict=True):
        close(one, other)


def test_a_model_patched_with_itself_is_unchanged(generations: Any, questions: Any) -> None:
    own = make_pair(generations.target, generations.target, "self")
    for positions in ("all", "answer"):
        before, after = patch_effects(own, questions, modules_of_layer(1), positions, heads="z", batch_size=5)
        for values, base in zip(after, before, strict=True):
            np.testing.assert_allclose(values, np.broadcast_to(base, values.shape), atol=2e-5)


def test_the_residual_stream_has_whole_passes(generations: Any, questions: Any) -> None:
    _, after = patch_effects(generations, questions, ["L3.resid_post"])
    # the source's last residual stream under the target's own unembedding
    with Patch(["L3.resid_post"]).applied(generations):
        close(GoldOutcomes(*(v[0] for v in after)), gold_outcomes(generations.target, questions))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_answers_in_a_pass_of_their_own(architecture: str, generations: Any, questions: Any) -> None:
    pair = deep(architecture, generations.target.tokenizer)
    for model in (pair.target, pair.source):
        found = AnswerReader(model, questions, 5)(1)
        close(GoldOutcomes(*(v[0] for v in found)), gold_outcomes(model, questions, 5))


def test_prompts_of_one_token(generations: Any) -> None:
    tokenizer = copy.deepcopy(generations.target.tokenizer)
    # no begin token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    pair = random_pair_of("llama", tokenizer, num_hidden_layers=4)
    examples = tuple(Example(str(n), str(n)) for n in range(6))
    task = replace(mt.load_task("addition"), name="echo", examples=examples, format=PromptFormat(), role="discover")
    assert {len(p) for p in encode(task, tokenizer).prompts} == {1}
    is_every_patch_by_itself(pair, task, "answer", "result")
