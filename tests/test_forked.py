"""Passes that begin at the layer that changed are equal to whole ones, to the bit."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, random_pair_of

import mechtransplant as mt
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import (
    GoldOutcomes,
    gold_outcomes,
    gold_scores,
    gold_variants,
    remembered,
    sweeps,
)
from mechtransplant.evaluation.forked import forking, resuming
from mechtransplant.evaluation.remembered import remembering
from mechtransplant.evaluation.sweeps import Change, sweep
from mechtransplant.grafting import Graft
from mechtransplant.pair import LanguageModel
from mechtransplant.patching import Patch


@pytest.fixture(scope="module")
def questions() -> Any:
    task = mt.load_task("addition")
    return task.split(12, 1, 1).discover


def same(found: Any, expected: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def close(found: Any, expected: Any) -> None:
    """Verdicts equal, continuous outcomes up to the rounding of float32."""
    assert (found.correct == expected.correct).all()
    for name in ("log_probability", "logit_difference"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=2e-5)


def is_each_by_itself(found: Any, variants: Any, model: Any, task: Any, **options: Any) -> None:
    """Variants in one batch are whole passes under each."""
    for at, variant in enumerate(variants):
        with variant:
            close(GoldOutcomes(*(values[at] for values in found)), gold_outcomes(model, task, **options))


def deep(architecture: str, tokenizer: Any) -> Any:
    """A random pair of four layers; Gemma's alternate between local and global attention."""
    config = ARCHITECTURES[architecture][0]()
    changes: dict[str, Any] = {"n_layer" if architecture == "gpt2" else "num_hidden_layers": 4}
    if getattr(config, "layer_types", None):
        changes["layer_types"] = config.layer_types * 2
    return random_pair_of(architecture, tokenizer, **changes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_of_every_architecture(architecture: str, generations: Any, questions: Any) -> None:
    pair = deep(architecture, generations.target.tokenizer)
    with remembering(pair.target) as memory:
        base = gold_outcomes(pair.target, questions, 5)
    assert memory.usable and same(base, gold_outcomes(pair.target, questions, 5))
    for layer in range(1, 4):
        with Graft([f"L{layer}"]).applied(pair):
            whole = gold_outcomes(pair.target, questions, 5)
            with resuming(pair.target, memory, layer):
                assert same(gold_outcomes(pair.target, questions, 5), whole)
            assert not same(whole, base)
    assert same(gold_outcomes(pair.target, questions, 5), base)


@pytest.mark.filterwarnings("ignore:prompt and answer have:UserWarning")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shared", [True, False])
def test_with_and_without_a_shared_prefix(generations: Any, side: Any, shared: bool) -> None:
    task = mt.load_task("arithmetic-few-shot").split(10, 1, 1).discover
    options: Any = {"batch_size": 4, "padding_side": side, "share_prefix": shared}
    target = generations.target
    with remembering(target) as memory:
        gold_outcomes(target, task, **options)
    # the prefix's own pass, and its cache
    assert len(memory.passes) == 3 + shared and sum(p.begun is not None for p in memory.passes) == shared
    for module in ("L0.mlp", "L1H3", "L3.q_proj", "L3.mlp"):
        layer = int(module[1])
        with Graft([module]).applied(generations):
            whole = gold_outcomes(target, task, **options)
            with resuming(target, memory, layer):
                assert same(gold_outcomes(target, task, **options), whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [5, 1])
def test_variants_go_on_as_one_batch(architecture: str, rows: int, generations: Any, questions: Any) -> None:
    pair = deep(architecture, generations.target.tokenizer)
    with remembering(pair.target) as memory:
        base = gold_outcomes(pair.target, questions, rows)
    for layer in range(4):
        graftable = [m for m in pair.modules(("head", "mlp")) if m.startswith(f"L{layer}")]
        variants = [Graft([m], kv="group").applied(pair) for m in graftable]
        with forking(pair.target, memory, layer, variants):
            found = gold_variants(pair.target, questions, len(variants), rows)
        is_each_by_itself(found, variants, pair.target, questions, batch_size=rows)
        assert np.abs(found.log_probability - base.log_probability).max() > 1e-3
    assert same(gold_outcomes(pair.target, questions, rows), base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_variants_of_every_architecture_with_a_shared_prefix(architecture: str, generations: Any) -> None:
    pair = deep(architecture, generations.target.tokenizer)
    task = mt.load_task("addition").split(7, 1, 1).discover
    task = replace(task, format=replace(task.format, system="1+2=3; 4+5=9; 2+2=4;"))
    with remembering(pair.target) as memory:
        gold_outcomes(pair.target, task, 4)
    # Mistral's sliding window is shorter than the prompt
    assert (memory.passes[0].begun is not None) == (architecture != "mistral")
    for layer in range(4):
        variants = [Graft([f"L{layer}{part}"], kv="group").applied(pair) for part in ("H1", ".mlp", ".attn")]
        with forking(pair.target, memory, layer, variants):
            found = gold_variants(pair.target, task, len(variants), 4)
        is_each_by_itself(found, variants, pair.target, task, batch_size=4)


@pytest.mark.filterwarnings("ignore:prompt and answer have:UserWarning")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shared", [True, False])
def test_variants_with_and_without_a_shared_prefix(generations: Any, side: Any, shared: bool) -> None:
    task = mt.load_task("arithmetic-few-shot").split(10, 1, 1).discover
    options: Any = {"batch_size": 4, "padding_side": side, "share_prefix": shared}
    target = generations.target
    with remembering(target) as memory:
        gold_outcomes(target, task, **options)
    for layer in range(4):
        # K and V of the layer itself differ from variant to variant
        names = [f"L{layer}.{part}" for part in ("k_proj", "v_proj", "mlp")]
        variants = [nullcontext(), *(Graft([name]).applied(generations) for name in names)]
        with forking(target, memory, layer, variants):
            found = gold_variants(target, task, len(variants), **options)
        is_each_by_itself(found, variants, target, task, **options)


def test_layers_below_do_not_run(generations: Any, questions: Any) -> None:
    target, ran = generations.target, []
    blocks = [target.hf.get_submodule(target.layout.block(n)) for n in range(4)]
    with remembering(target) as memory:
        gold_scores(target, questions)
    with ExitStack() as stack:
        for number, block in enumerate(blocks):

            def counted(*inputs: Any, own: Any = block.mlp.forward, at: int = number) -> Any:
                ran.append(at)
                return own(*inputs)

            stack.enter_context(remembered.answering(block.mlp, counted))
        with resuming(target, memory, 2):
            gold_scores(target, questions)
    assert set(ran) == {2, 3}
    assert all("forward" not in b.__dict__ for b in blocks)


def test_variants_over_a_window_that_cuts_the_prompt(generations: Any) -> None:
    pair = deep("mistral", generations.target.tokenizer)
    task = mt.load_task("arithmetic-few-shot").split(6, 1, 1).discover
    with remembering(pair.target) as memory:
        gold_outcomes(pair.target, task, 4)
    for layer in (1, 3):
        variants = [Graft([m], kv="group").applied(pair) for m in (f"L{layer}.mlp", f"L{layer}H3")]
        with forking(pair.target, memory, layer, variants):
            found = gold_variants(pair.target, task, 2, 4)
        is_each_by_itself(found, variants, pair.target, task, batch_size=4)


def test_in_bfloat16(questions: Any) -> None:
    pair = mt.load_pair("family/generations", dtype="bfloat16")
    with remembering(pair.target) as memory:
        base = gold_outcomes(pair.target, questions, 5)
    for layer in (1, 3):
        variants = [Graft([m], kv="group").applied(pair) for m in (f"L{layer}.mlp", f"L{layer}H3")]
        with forking(pair.target, memory, layer, variants):
            found = gold_variants(pair.target, questions, 2, 5)
        for at, variant in enumerate(variants):
            with variant:
                whole = gold_outcomes(pair.target, questions, 5)
            with variant, resuming(pair.target, memory, layer):
                assert same(gold_outcomes(pair.target, questions, 5), whole)
            # eight bits of mantissa: matrix products of another size round by some 1/256 of a logit
            np.testing.assert_allclose(found.log_probability[at], whole.log_probability, atol=0.15)
            assert not same(whole, base)


def test_other_questions_are_refused(generations: Any, questions: Any) -> None:
    target = generations.target
    with remembering(target) as memory:
        gold_scores(target, questions)
    others = mt.load_task("addition", seed=7).split(12, 1, 1).discover
    for task, size in ((others, 64), (questions, 5)):
        with resuming(target, memory, 1), pytest.raises(RuntimeError, match="not the one that was remembered"):
            gold_scores(target, task, size)
    # one pass more than was remembered
    with resuming(target, memory, 1):
        gold_scores(target, questions)
        with pytest.raises(RuntimeError, match="ask the same questions again"):
            gold_scores(target, questions)
    assert torch.isfinite(torch.tensor(gold_scores(target, questions)[1])).all()


def test_what_cannot_be_remembered_is_computed_whole(generations: Any, questions: Any) -> None:
    target = generations.target
    with remembering(target, limit=1000) as memory:
        base = gold_scores(target, questions)
    assert not memory.usable and not memory.passes
    with Graft(["L2.mlp"]).applied(generations):
        whole = gold_scores(target, questions)
        with resuming(target, memory, 2):
            assert same(gold_scores(target, questions), whole)
    assert same(gold_scores(target, questions), base)


def test_under_a_patch_passes_are_whole(generations: Any, questions: Any) -> None:
    target = generations.target
    with remembering(target) as memory:
        plain = gold_scores(target, questions)
    with Patch(["L1.mlp"]).applied(generations):
        whole = gold_scores(target, questions)
        with resuming(target, memory, 3):
            assert same(gold_scores(target, questions), whole)
        with remembering(target) as patched:
            assert same(gold_scores(target, questions), whole)
    assert not patched.usable and memory.usable and not same(whole, plain)
    # a patch that comes later
    late = Patch(["L1.mlp"]).applied(generations)
    with resuming(target, memory, 3), late, pytest.raises(RuntimeError, match="patch inside"):
        gold_scores(target, questions)
    with remembering(target) as patched, Patch(["L1.mlp"]).applied(generations):
        assert same(gold_scores(target, questions), whole)
    assert not patched.usable


def test_under_a_users_hook_passes_are_whole(generations: Any, questions: Any) -> None:
    target = generations.target
    block = target.hf.get_submodule(target.layout.block(1))
    with remembering(target) as memory:
        gold_scores(target, questions)
    hook = block.register_forward_hook(lambda module, inputs, output: output + 0.5)
    try:
        with Graft(["L2.mlp"]).applied(generations):
            whole = gold_scores(target, questions)
            with resuming(target, memory, 2):
                assert same(gold_scores(target, questions), whole)
        with remembering(target) as hooked:
            gold_scores(target, questions)
    finally:
        hook.remove()
    assert not hooked.usable


def test_one_block_inside_another_is_whole(generations: Any, questions: Any) -> None:
    target = generations.target
    with remembering(target) as memory:
        base = gold_scores(target, questions)
    with resuming(target, memory, 2), remembering(target) as inner:
        assert same(gold_scores(target, questions), base)
    assert not inner.usable
    with remembering(target) as outer, resuming(target, memory, 2):
        gold_scores(target, questions)
    with Graft(["L3.mlp"]).applied(generations):
        whole = gold_scores(target, questions)
        with resuming(target, outer, 3):
            assert same(gold_scores(target, questions), whole)


def test_a_users_own_generation_is_computed_whole(generations: Any) -> None:
    target, ids = generations.target, torch.tensor([[1, 20, 21, 22]])
    options: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with remembering(target) as memory:
        written = target.hf.generate(ids, **options)
    assert not memory.usable
    with resuming(target, memory, 2):
        assert torch.equal(target.hf.generate(ids, **options), written)


def test_with_gradients_passes_are_whole(random_model: Any, questions: Any) -> None:
    model = random_model()
    with remembering(model) as memory:
        gold_scores(model, questions)
    model.hf.requires_grad_(True)
    assert memory.usable and not remembered.can_resume(model)
    with torch.no_grad():
        assert remembered.can_resume(model)


def test_layers_that_pass_something_sideways_are_computed_whole(questions: Any, generations: Any) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        vocab_size=57,
        vocab_size_per_layer_input=57,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=2,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = LanguageModel(
        "gemma3n", transformers.Gemma3nForCausalLM(config).eval().requires_grad_(False), generations.target.tokenizer
    )
    assert not remembered.can_resume(model)
    with remembering(model) as memory:
        base = gold_scores(model, questions)
    with resuming(model, memory, 2):
        assert same(gold_scores(model, questions), base)


@pytest.mark.parametrize("kv", ["never", "whole-group"])
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_a_sweep_is_as_one_graft_after_another(generations: Any, questions: Any, kv: Any, tokens: int) -> None:
    pair, target = generations, generations.target
    modules = pair.modules(("head", "mlp"))
    changes = [Change(int(m[1]), Graft([m], kv=kv).applied(pair)) for m in modules]
    before, after = sweep(target, questions, changes, 5, tokens_at_once=tokens)
    assert same(before, gold_outcomes(target, questions, 5))
    for at, module in enumerate(modules):
        one = GoldOutcomes(*(values[at] for values in after))
        with Graft([module], kv=kv).applied(pair):
            whole = gold_outcomes(target, questions, 5)
        assert same(one, whole) if tokens == 1 else close(one, whole) is None
    scores = mt.rank_modules(pair, questions, "single_swap", ("head", "mlp"), kv=kv).set_index("module").score
    gains = after.log_probability.mean(1) - before.log_probability.mean()
    np.testing.assert_allclose([scores[m] for m in modules], gains, atol=2e-5)


def test_graft_effects_are_those_of_each_graft(generations: Any, questions: Any) -> None:
    pair, modules = generations, ["L3H1", "L0.mlp", "L2.q_proj", "L1"]
    before, after = mt.graft_effects(pair, questions, modules, strength=0.5, operator="slerp", batch_size=5)
    close(before, gold_outcomes(pair.target, questions, 5))
    for at, module in enumerate(modules):
        with Graft([module], 0.5, operator="slerp").applied(pair):
            close(GoldOutcomes(*(values[at] for values in after)), gold_outcomes(pair.target, questions, 5))
    assert np.abs(after.log_probability - before.log_probability).max(1).min() > 1e-4
    for wrong, message in (
        ([], "name the modules in a list"),
        ("L1.mlp", "name the modules in a list"),
        (["L1.mlp", "embed_tokens"], "embed_tokens lies in no layer"),
        (["L9.mlp"], "unknown module 'L9.mlp'"),
    ):
        with pytest.raises(UsageError, match=message):
            mt.graft_effects(pair, questions, wrong)


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_a_sweep_in_parts(generations: Any, questions: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = generations.target
    changes = [Change(int(m[1]), Graft([m]).applied(generations)) for m in ("L3.mlp", "L0H1", "L0.mlp", "L1.q_proj")]
    whole = sweep(target, questions, changes, 4, tokens_at_once=tokens)
    # layers' outputs of one batch fit, and of no more
    monkeypatch.setattr(sweeps, "LIMIT", 1)
    parts = list(sweeps._parts(target, questions, 4))
    assert [len(rows) for rows, _ in parts] == [4, 4, 4]
    for found, expected in zip(sweep(target, questions, changes, 4, tokens_at_once=tokens), whole, strict=True):
        close(found, expected)
    # nothing is remembered: whole passes
    monkeypatch.setattr(remembered, "_shares_parameters", lambda blocks: True)
    for found, expected in zip(sweep(target, questions, changes, 4, tokens_at_once=tokens), whole, strict=True):
        close(found, expected)


def test_greedy_is_as_with_whole_passes(generations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = mt.load_task("addition").split(1, 16, 1).choose
    options: Any = {"kind": "linear", "pool": 4, "stop": 6}
    quick = mt.rank_modules(generations, choose, "greedy", **options)
    monkeypatch.setattr(remembered, "_shares_parameters", lambda blocks: True)
    whole = mt.rank_modules(generations, choose, "greedy", **options)
    assert list(quick.module) == list(whole.module)


def test_blocks_that_share_parameters_are_computed_whole(random_model: Any, questions: Any) -> None:
    model = random_model()
    layers = model.hf.model.layers
    # another parameter on the same memory
    layers[1].mlp.up_proj.weight.data = layers[0].mlp.up_proj.weight.data
    with remembering(model) as memory:
        gold_scores(model, questions)
    assert not memory.usable
