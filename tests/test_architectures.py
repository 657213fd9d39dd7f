"""Every supported architecture: complete addresses, batches equal one by one, LAE, grafts undone to the byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mechtransplant.errors import TaskError, UsageError
from mechtransplant.evaluation import generate, gold_scores
from mechtransplant.grafting import Graft
from mechtransplant.modules import layout_of
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.ranking import rank_modules
from mechtransplant.tasks import PromptFormat, load_task

SIZES: dict[str, Any] = {
    "vocab_size": 57,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
#: architecture → (config, linear layers a block)
ARCHITECTURES: dict[str, tuple[Callable[[], Any], int]] = {
    "llama": (lambda: transformers.LlamaConfig(**LLAMA), 7),
    "mistral": (lambda: transformers.MistralConfig(**LLAMA, sliding_window=16), 7),
    "qwen2": (lambda: transformers.Qwen2Config(**LLAMA), 7),
    "qwen3": (lambda: transformers.Qwen3Config(**LLAMA, head_dim=8), 7),
    "gemma2": (lambda: transformers.Gemma2Config(**LLAMA, head_dim=8, sliding_window=64), 7),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=64), 7),
    "phi3": (lambda: transformers.Phi3Config(**LLAMA), 4),
    "olmo2": (lambda: transformers.Olmo2Config(**LLAMA), 7),
    "gpt2": (
        lambda: transformers.GPT2Config(vocab_size=57, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
        4,
    ),
    "neox": (lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48), 4),
    "opt": (lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0), 6),
}


def build(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    # wide enough weights that greedy choices are not ties
    config.initializer_range = 0.5
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, generations: Pair) -> Pair:
    config, _ = ARCHITECTURES[request.param]
    source, target = (
        LanguageModel(f"{request.param}-{s}", build(config(), s), generations.target.tokenizer) for s in (0, 1)
    )
    return make_pair(source, target, request.param)


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
