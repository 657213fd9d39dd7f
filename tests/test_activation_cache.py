"""Caches hold what TransformerLens shows, without padding; streamed ones equal those in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import random_pair_of

from mechtransplant.activations import cache_activations, load_activations
from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.evaluation import generate
from mechtransplant.evaluation.batches import encode
from mechtransplant.pair import LanguageModel, Pair
from mechtransplant.tasks import Task, load_task

HOOKS = ("attn.hook_z", "attn.hook_result", "hook_mlp_out")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest number: these random models have activations of tens."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.fixture(scope="module")
def task() -> Task:
    examples = [*load_task("addition", 3).examples, *load_task("max", 3).examples, *load_task("reverse", 2).examples]
    return Task("mixed", tuple(examples))


def one_by_one(model: LanguageModel, name: str, ids: list[int]) -> torch.Tensor:
    """TransformerLens's own cache of one text without padding: (pos, …)."""
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(torch.tensor([ids]), names_filter=name)
    return cache[name][0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "gpt2", "neox"])
def test_caches_equal_transformer_lens_one_by_one(generations: Pair, architecture: str, task: Task) -> None:
    model = random_pair_of(architecture, generations.target.tokenizer).target
    cache = cache_activations(model, task, HOOKS, batch_size=3)
    prompts = encode(task, model.tokenizer).prompts
    lengths = [len(p) for p in prompts]
    assert len(set(lengths)) > 1 and list(cache.lengths) == lengths
    for name, shape in (
        ("blocks.1.attn.hook_z", (4, 8)),
        ("blocks.0.attn.hook_result", (4, 32)),
        ("blocks.1.hook_mlp_out", (32,)),
    ):
        dense = cache[name]
        assert dense.shape == (len(task), max(lengths), *shape)
        assert torch.isnan(dense).flatten(2).any(2).numpy().tolist() == (~cache.mask).tolist()
        for i in (0, 3, 7):
            if not name.endswith("hook_result"):
                expected = one_by_one(model, name, prompts[i])
            else:
                z = one_by_one(model, name.replace("result", "z"), prompts[i])
                expected = torch.einsum("phd,hdm->phm", z, model.output_weights(0))
            close(cache.prompt(i, name), expected)


def test_positions(generations: Pair, task: Task) -> None:
    model, name = generations.target, "blocks.2.hook_mlp_out"
    encoded = encode(task, model.tokenizer)
    texts = [list(g.tokens) for g in generate(model, task)]
    caches = {p: cache_activations(model, task, name, p) for p in ("all", "last", "answer", "decoding")}  # type: ignore[arg-type]
    for i, (prompt, gold, text) in enumerate(zip(encoded.prompts, encoded.completions, texts, strict=True)):
        start = len(prompt) - 1
        assert caches["all"].tokens[i] == tuple(prompt)
        assert caches["last"].tokens[i] == (prompt[-1],)
        assert caches["answer"].tokens[i] == (prompt[-1], *gold[:-1])
        assert caches["decoding"].tokens[i] == (prompt[-1], *text[:-1])
        for key, ids in (("all", prompt), ("last", prompt), ("answer", prompt + gold), ("decoding", prompt + text)):
            whole = one_by_one(model, name, ids)
            first = 0 if key == "all" else start
            found = caches[key].prompt(i, name)
            close(found, whole[first : first + len(found)])


def test_streamed_equals_in_memory(generations: Pair, task: Task, tmp_path: Path) -> None:
    model = generations.target
    inside = cache_activations(model, task, HOOKS, batch_size=3)
    streamed = cache_activations(model, task, HOOKS, batch_size=3, to=tmp_path / "cache")
    read = load_activations(tmp_path / "cache")
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".json"] + [".safetensors"] * 3
    assert read.tokens == inside.tokens and read.weights == model.fingerprint and read.task == task.fingerprint
    for cache in (streamed, read):
        for name in inside:
            assert torch.equal(cache[name].nan_to_num(7), inside[name].nan_to_num(7))
    assert "in memory" in repr(inside) and str(tmp_path / "cache") in repr(read)


def test_full_names_and_other_hooks(generations: Pair, task: Task) -> None:
    cache = cache_activations(generations.target, task, ["blocks.3.hook_resid_post", "blocks.0.attn.hook_k"])
    assert cache.keys() == ("blocks.3.hook_resid_post", "blocks.0.attn.hook_k")
    assert cache["blocks.0.attn.hook_k"].shape[2:] == (4, 16), "grouped-query keys stay grouped"
    assert "blocks.3.hook_resid_post" in cache and cache["blocks.3.hook_resid_post"].shape[-1] == 128


def test_the_residual_stream_is_the_sum_of_what_is_cached(generations: Pair, task: Task) -> None:
    hooks = ["hook_resid_pre", "attn.hook_result", "hook_mlp_out", "hook_resid_post"]
    cache = cache_activations(generations.target, task, hooks, "answer")
    for layer in range(4):
        pre, heads, mlp, post = (cache.prompt(4, f"blocks.{layer}.{h}") for h in hooks)
        torch.testing.assert_close(pre + heads.sum(1) + mlp, post, atol=1e-4, rtol=1e-4)


def test_what_is_wrong_is_said(generations: Pair, task: Task, tmp_path: Path) -> None:
    model = generations.target
    with pytest.raises(UnknownNameError, match=r"blocks\.0\.attn\.hook_zz"):
        cache_activations(model, task, "attn.hook_zz")
    with pytest.raises(UnknownNameError, match=r"blocks\.9\.hook_mlp_out"):
        cache_activations(model, task, "blocks.9.hook_mlp_out")
    for hook in ("attn.hook_pattern", "attn.hook_attn_scores"):
        with pytest.raises(UsageError, match="two positions"):
            # as many tokens as heads: by their shapes, scores could be taken for something else
            cache_activations(model, task.subset([0]), hook)
    for hook in ("blocks.99.attn.hook_result", "foo.attn.hook_result"):
        with pytest.raises(UnknownNameError, match="unknown hook"):
            cache_activations(model, task, hook)
    with pytest.raises(UsageError, match=r"TransformerLens refuses|never passes"):
        cache_activations(model, task, "hook_mlp_in")
    with pytest.raises(UsageError, match="must be names"):
        cache_activations(model, task, [5])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="expected a model and a task"):
        cache_activations(generations, task)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no hooks"):
        cache_activations(model, task, [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not an empty folder"):
        cache_activations(model, task, to=tmp_path / "full")
    cache = cache_activations(model, task, "hook_mlp_out", "last", to=tmp_path / "cache", batch_size=4)
    with pytest.raises(UnknownNameError, match="unknown hook"):
        cache["blocks.0.attn.hook_z"]
    with pytest.raises(UsageError, match="no prompt 8"):
        cache.prompt(8, "blocks.0.hook_mlp_out")
    index = tmp_path / "cache" / "index.json"
    whole = index.read_text()
    index.write_text(json.dumps(json.loads(whole) | {"parts": ["../../etc.safetensors"]}))
    with pytest.raises(UsageError, match="outside its folder"):
        load_activations(tmp_path / "cache")
    index.write_text(whole)
    index.write_text(json.dumps(json.loads(whole) | {"format": 99}))
    with pytest.raises(UsageError, match="format 99"):
        load_activations(tmp_path / "cache")
    index.write_text(json.dumps(json.loads(whole) | {"places": [1, 2]}))
    with pytest.raises(UsageError, match="no whole activation cache"):
        load_activations(tmp_path / "cache")
    index.write_text(whole)
    part = next((tmp_path / "cache").glob("*.safetensors"))
    part.unlink()
    with pytest.raises(UsageError, match="is missing"):
        load_activations(tmp_path / "cache")
    index.unlink()
    with pytest.raises(UsageError, match="no whole activation cache"):
        load_activations(tmp_path / "cache")
    assert np.isfinite(cache.lengths).all()
