"""Small random models of every supported architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from mechtransplant.pair import LanguageModel, Pair, make_pair

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


def random_pair_of(architecture: str, tokenizer: Any, **changes: Any) -> Pair:
    """A source and a target of one architecture with different random weights."""
    config, _ = ARCHITECTURES[architecture]
    models = []
    for seed in (0, 1):
        built = config()
        for name, value in changes.items():
            setattr(built, name, value)
        models.append(LanguageModel(f"{architecture}-{seed}", build(built, seed), tokenizer))
    return make_pair(models[0], models[1], architecture)
