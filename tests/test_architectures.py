"""Every supported architecture: complete addresses, batches equal one by one, LAE, grafts undone to the byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, LLAMA, build, random_pair_of

from mechtransplant.errors import TaskError, UsageError
from mechtransplant.evaluation import generate, gold_scores
from mechtransplant.grafting import Graft
from mechtransplant.modules import layout_of
from mechtransplant.pair import LanguageModel, Pair
from mechtransplant.ranking import rank_modules
from mechtransplant.tasks import PromptFormat, load_task


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, generations: Pair) -> Pair:
    return random_pair_of(request.param, generations.target.tokenizer)


def test_architecture(pair: Pair) -> None:
    assert len(pair.modules("linear")) == 2 * ARCHITECTURES[pair.name][1]
    prompt = PromptFormat(system="compute this sum now please", shot_separator=" ")
    task = replace(load_task("addition").split(8, 8, 8).discover, format=prompt, max_new_tokens=6)
    single = [generate(pair.target, task.subset([i]), batch_size=1)[0] for i in range(8)]
    assert generate(pair.target, task, batch_size=8) == single
    together, alone = gold_scores(pair.target, task), gold_scores(pair.target, task, 1, "right", share_prefix=False)
    np.testing.assert_allclose(together[1], alone[1], atol=1e-3)
    rankings = [rank_modules(pair, task, batch_size=size).set_index("module").score.sort_index() for size in (8, 1)]
    np.testing.assert_allclose(*rankings, atol=1e-5)
    forced = rank_modules(pair, task, alignment="teacher-forced")
    assert (forced.score > 0).all()
    before, ids = pair.target.fingerprint, torch.tensor([[1, 20, 21, 22, 9]])
    plain = pair.target.hf(ids).logits
    with Graft(forced.module[:3]).applied(pair):
        assert pair.target.fingerprint != before
        assert (pair.target.hf(ids).logits - plain).abs().max() > 1e-3
    assert pair.target.fingerprint == before
    assert torch.equal(pair.target.hf(ids).logits, plain)


def test_a_mixture_of_experts_is_refused_not_half_addressed() -> None:
    model = build(transformers.MixtralConfig(**LLAMA, num_local_experts=2), 0)
    with pytest.raises(UsageError, match="mixture of experts"):
        layout_of(model)


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen2MoeConfig(
            **LLAMA, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16
        ),
        transformers.Lfm2Config(**LLAMA, layer_types=["full_attention", "conv"]),
    ],
    ids=["experts beside a shared one", "convolutions beside attention"],
)
def test_blocks_with_weights_in_no_linear_layer_are_refused(config: Any) -> None:
    with pytest.raises(UsageError, match="is in no linear layer"):
        layout_of(build(config, 0))


def test_only_the_text_of_a_multimodal_model_is_addressed() -> None:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    model = build(transformers.Gemma3Config(text_config={**LLAMA, "head_dim": 8}, vision_config=vision), 0)
    layout = layout_of(model)
    assert len(layout.linears) == 14 and not any("vision" in name for name in layout.linears.values())


def test_prompts_beyond_the_positions(generations: Pair) -> None:
    short = transformers.GPT2Config(
        vocab_size=57, n_embd=32, n_layer=2, n_head=4, n_positions=12, bos_token_id=1, eos_token_id=2
    )
    model = LanguageModel("short", build(short, 0), generations.target.tokenizer)
    task = replace(load_task("max", 4), max_new_tokens=8)
    with pytest.raises(TaskError, match="12 positions"):
        generate(model, task)
    long = replace(task, format=PromptFormat(system="1234567890" * 15))
    with pytest.warns(UserWarning, match="128 positions"):
        gold_scores(generations.target, long)
