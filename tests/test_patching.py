"""Patches against their definitions: by TransformerLens hooks, by hand, with and without the key-value cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build, random_pair_of

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate, generate, gold_scores
from mechtransplant.evaluation.batches import encode
from mechtransplant.evaluation.interventions import interventions_on
from mechtransplant.grafting import Graft
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.patching import Ablation, Patch, patch_versus_graft
from mechtransplant.tasks import PromptFormat, Task, load_task

IDS = torch.tensor([[1, 20, 21, 22, 9], [0, 0, 1, 20, 9]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
SETS = (["L0H1", "L1H2", "L1H3"], ["L0.mlp", "L1.attn"], ["L0.resid_pre"], ["L1"], ["L0H0", "L0.attn", "L1.mlp"])


@pytest.fixture(scope="module")
def tokenizer(generations: Pair) -> Any:
    return generations.target.tokenizer


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, tokenizer: Any) -> Pair:
    return random_pair_of(request.param, tokenizer)


@pytest.fixture(params=[a for a in ARCHITECTURES if a != "opt"])
def bridged_pair(request: pytest.FixtureRequest, tokenizer: Any) -> Pair:
    """Every architecture but OPT, whose padded positions TransformerLens numbers otherwise."""
    return random_pair_of(request.param, tokenizer)


@pytest.fixture(scope="module")
def task(addition: Task) -> Task:
    prompt = PromptFormat(system="compute this sum now please", shot_separator=" ")
    return replace(addition.split(8, 8, 16).test, format=prompt, max_new_tokens=5)


def logits(model: LanguageModel, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> torch.Tensor:
    # OPT counts positions from the mask by itself
    positions = {} if "OPT" in type(model.hf).__name__ else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        return model.hf(input_ids=ids, attention_mask=mask, **positions).logits[mask.bool()]


def bridged(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.bridge(IDS, attention_mask=MASK)[MASK.bool()]


# --- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["z", "result"])
@pytest.mark.parametrize("positions", ["all", "prompt", "last", [0, -1]])
def test_a_self_patch_is_the_identity_to_the_bit(pair: Pair, heads: Any, positions: Any) -> None:
    plain = logits(pair.target)
    for twin in (pair.target, LanguageModel("twin", copy.deepcopy(pair.target.hf), pair.target.tokenizer)):
        own = make_pair(twin, pair.target, "self")
        for modules in SETS:
            with Patch(modules, positions, heads=heads).applied(own):
                assert torch.equal(logits(pair.target), plain)
                if pair.name == "llama":
                    assert torch.equal(bridged(pair.target), bridged(twin))


@pytest.mark.parametrize("heads", ["z", "result"])
def test_bridge_and_hugging_face_model_agree_under_a_patch(bridged_pair: Pair, heads: Any) -> None:
    pair = bridged_pair
    plain = logits(pair.target)
    for modules in SETS:
        with Patch(modules, heads=heads).applied(pair):
            patched = logits(pair.target)
            torch.testing.assert_close(bridged(pair.target), patched, atol=1e-4, rtol=1e-4)
        assert (patched - plain).abs().max() > 1e-2
    assert torch.equal(logits(pair.target), plain)
    torch.testing.assert_close(bridged(pair.target), plain, atol=1e-4, rtol=1e-4)


def test_a_patch_is_transformer_lens_hooks_with_the_sources_cache(bridged_pair: Pair) -> None:
    pair = bridged_pair
    source, target = pair.source.bridge, pair.target.bridge
    hooks = {
        "L1H2": "blocks.1.attn.hook_z",
        "L0.mlp": "blocks.0.mlp.hook_out",
        "L1.attn": "blocks.1.attn.hook_out",
        "L1.resid_pre": "blocks.1.hook_resid_pre",
        "L0": "blocks.0.hook_resid_post",
    }
    with torch.no_grad():
        _, cache = source.run_with_cache(IDS, attention_mask=MASK, names_filter=lambda n: n in hooks.values())
    for module, name in hooks.items():

        def hook(tensor: torch.Tensor, hook: Any, name: str = name, module: str = module) -> torch.Tensor:
            new = tensor.clone()
            at = (slice(None), slice(None), 2) if "H" in module else ...
            new[at] = cache[name][at]
            return new

        with torch.no_grad():
            run = target.run_with_hooks(IDS, attention_mask=MASK, fwd_hooks=[(name, hook)])
        with Patch([module]).applied(pair):
            torch.testing.assert_close(logits(pair.target), run[MASK.bool()], atol=1e-4, rtol=1e-4)


def test_a_heads_result_is_its_write_with_the_sources_w_o(pair: Pair) -> None:
    """Patching the results of all heads is patching the block's output, but for the output projection's bias."""
    heads = [f"L1H{h}" for h in range(4)]
    with Patch(heads, heads="result").applied(pair):
        by_heads = logits(pair.target)
    output = pair.target.hf.get_submodule(pair.layout.linears[pair.layout.attention_output(1)])
    theirs = pair.source.hf.get_submodule(pair.layout.linears[pair.layout.attention_output(1)])
    kept = None if output.bias is None else (output.bias.clone(), theirs.bias.clone())
    if kept:
        theirs.bias.copy_(kept[0])
    with Patch(["L1.attn"]).applied(pair):
        by_block = logits(pair.target)
    if kept:
        theirs.bias.copy_(kept[1])
    torch.testing.assert_close(by_heads, by_block, atol=2e-4, rtol=1e-4)


def test_patching_the_last_residual_stream_leaves_only_the_targets_head(random_pair: Pair) -> None:
    source, target = random_pair.source.hf, random_pair.target.hf
    with torch.no_grad():
        last: list[torch.Tensor] = []
        handle = source.model.layers[-1].register_forward_hook(lambda m, i, o: last.append(o))
        source(input_ids=IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp_min(0))
        handle.remove()
        expected = target.lm_head(target.model.norm(last[0]))[MASK.bool()]
    with Patch(["L1"]).applied(random_pair):
        torch.testing.assert_close(logits(random_pair.target), expected)


def test_strength(random_pair: Pair) -> None:
    plain = logits(random_pair.target)
    with Patch(["L1H1", "L0.mlp"], strength=0).applied(random_pair):
        assert torch.equal(logits(random_pair.target), plain)
    with Patch(["L1"], strength=0.5).applied(random_pair):
        half = logits(random_pair.target)
    with Patch(["L1"]).applied(random_pair):
        assert (logits(random_pair.target) - plain).norm() > (half - plain).norm() > 0


# --- generation ----------------------------------------------------------------------------------------------------


def patched_by_hand(pair: Pair, ids: list[int], at: torch.Tensor) -> torch.Tensor:
    """The next token's logits from one pass over everything, with L0H2 and L0.mlp patched by hand at some positions."""
    models = (pair.source, pair.target)
    outs = [m.hf.get_submodule(m.layout.linears[m.layout.attention_output(0)]) for m in models]
    mlps = [m.hf.get_submodule(m.layout.linears[m.layout.mlp_output(0)]) for m in models]
    seen: dict[str, torch.Tensor] = {}
    kept = [
        outs[0].register_forward_pre_hook(lambda m, i: seen.update(z=i[0])),
        mlps[0].register_forward_hook(lambda m, i, o: seen.update(mlp=o.reshape(1, len(ids), -1))),
    ]
    with torch.no_grad():
        pair.source.hf(torch.tensor([ids]))
    head = slice(2 * 8, 3 * 8)

    def put_z(module: Any, inputs: Any) -> Any:
        new = inputs[0].clone()
        new[0, at, head] = seen["z"][0, at, head]
        return (new,)

    def put_mlp(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        new = output.reshape(1, len(ids), -1).clone()
        new[0, at] = seen["mlp"][0, at]
        return new.reshape(output.shape)

    kept += [outs[1].register_forward_pre_hook(put_z), mlps[1].register_forward_hook(put_mlp)]
    with torch.no_grad():
        found = pair.target.hf(torch.tensor([ids])).logits[0, -1]
    for handle in kept:
        handle.remove()
    return found


def without_cache(pair: Pair, prompt: list[int], positions: Any, steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy text and its logits by whole passes over everything so far."""
    ids, found = list(prompt), []
    for _ in range(steps):
        named = {
            "all": range(len(ids)),
            "prompt": range(len(prompt)),
            "decoding": range(len(prompt), len(ids)),
            "last": [len(prompt) - 1],
        }
        chosen = named[positions] if isinstance(positions, str) else positions
        at = torch.tensor([p if p >= 0 else len(prompt) + p for p in chosen], dtype=torch.long)
        found.append(patched_by_hand(pair, ids, at))
        ids.append(int(found[-1].argmax()))
    return ids[len(prompt) :], torch.stack(found)


@pytest.mark.parametrize("positions", ["all", "prompt", "decoding", "last", [1, -2]])
def test_generation_with_the_cache_equals_whole_passes_without(pair: Pair, task: Task, positions: Any) -> None:
    prompts = encode(task, pair.target.tokenizer).prompts[:3]
    some = task.subset(range(3))
    expected = [without_cache(pair, prompt, positions, 5) for prompt in prompts]
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with Patch(["L0H2", "L0.mlp"], positions).applied(pair):
        written = generate(pair.target, some, 5, batch_size=3)
        assert written == [generate(pair.target, some.subset([i]), 5)[0] for i in range(3)]
        for prompt, (tokens, steps) in zip(prompts, expected, strict=True):
            run = pair.target.hf.generate(torch.tensor([prompt]), eos_token_id=None, **options)
            assert run.sequences[0, len(prompt) :].tolist() == tokens
            torch.testing.assert_close(torch.cat(run.logits), steps, atol=1e-4, rtol=1e-4)
    for (tokens, _), generation in zip(expected, written, strict=True):
        assert list(generation.tokens) == tokens[: len(generation.tokens)]
    run = pair.target.hf.generate(torch.tensor([prompts[-1]]), eos_token_id=None, **options)
    assert (torch.cat(run.logits)[1:] - expected[-1][1][1:]).abs().max() > 5e-4


def test_the_bridges_own_generation_equals_ours(random_pair: Pair, task: Task) -> None:
    one = task.subset([0])
    prompt = torch.tensor([encode(one, random_pair.target.tokenizer).prompts[0]])
    for positions in ("all", "last", "decoding"):
        with Patch(["L1H2", "L0.mlp"], positions).applied(random_pair):  # type: ignore[arg-type]
            ours = generate(random_pair.target, one, 4)[0].tokens
            theirs = random_pair.target.bridge.generate(
                prompt, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False, return_type="tokens"
            )[0, prompt.shape[1] :]
        assert list(ours) == theirs.tolist()[: len(ours)]


@pytest.mark.parametrize("positions", ["all", "prompt", "decoding", "last", [0, 3]])
def test_scores_in_one_pass_equal_generation(unchanged: Pair, addition: Task, positions: Any) -> None:
    pair, test = unchanged, addition.split(64, 64, 64).test
    with Patch(["L1.mlp", "L2H3", "L3.attn"], positions).applied(pair):
        forced, written = evaluate(pair.target, test), evaluate(pair.target, test, "generate")
        assert (forced.correct == written.correct).all()
        alone = gold_scores(pair.target, test, 1, "right")
        np.testing.assert_allclose(gold_scores(pair.target, test, 16)[1], alone[1], atol=1e-3)
    assert abs(alone[1] - gold_scores(pair.target, test)[1]).max() > 0.01
    assert interventions_on(pair.target.hf) == []


# --- effects -------------------------------------------------------------------------------------------------------


def test_patch_versus_graft_is_every_patch_and_every_graft(unchanged: Pair, addition: Task) -> None:
    pair, discover = unchanged, addition.split(24, 8, 8).discover
    modules = ["L0H1", "L3.mlp", "L2.attn", "L1H7"]
    table = patch_versus_graft(pair, discover, modules, batch_size=8, resamples=500).set_index("module")
    base = gold_scores(pair.target, discover)[1]
    for module in modules:
        with Patch([module], heads="result").applied(pair):
            patched = gold_scores(pair.target, discover)
        with Graft([module]).applied(pair):
            grafted = gold_scores(pair.target, discover)
        for what, (correct, log_probability) in (("patch", patched), ("graft", grafted)):
            row = table.loc[module]
            assert row[f"{what}_effect"] == pytest.approx((log_probability - base).mean(), abs=1e-4)
            assert row[f"{what}_low"] <= row[f"{what}_effect"] <= row[f"{what}_high"]
            assert row[f"{what}_accuracy"] == correct.mean()
    assert table.attrs["source"]["accuracy"] > table.attrs["target"]["accuracy"]
    own = patch_versus_graft(make_pair(pair.target, pair.target, "self"), discover, modules, resamples=10)
    assert (own[["patch_effect", "graft_effect", "patch_low", "graft_high"]] == 0).all().all()


def test_planted_heads_compute_what_they_carry(addition: Task) -> None:
    """In a clean planted pair only the planted heads' weights differ: no other graft has any effect, patches may."""
    from mechtransplant.pair import load_pair

    pair = load_pair("family/planted-heads")
    discover = load_task(pair.default_task or "").split(24, 8, 8).discover
    table = patch_versus_graft(pair, discover, resamples=100).set_index("module")
    planted = table.index.isin(pair.planted)
    assert (table.graft_effect[~planted] == 0).all()
    assert (table.graft_effect[planted] != 0).all()
    # a planted head in layer 0 reads what it reads in the source, so both ways of moving it are one
    first = [m for m in pair.planted if m.startswith("L0H")]
    for module in first:
        assert table.patch_effect[module] == pytest.approx(table.graft_effect[module], abs=1e-3)


# --- blocks and errors ---------------------------------------------------------------------------------------------


def test_every_hook_goes_with_the_block(random_pair: Pair) -> None:
    plain, bridge = logits(random_pair.target), bridged(random_pair.target)
    patch = Patch(["L0H0", "L1.mlp"]).applied(random_pair)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), patch, patch:
            logits(random_pair.target)
            raise error
        assert torch.equal(logits(random_pair.target), plain) and torch.equal(bridged(random_pair.target), bridge)
        for model in (random_pair.source.hf, random_pair.target.hf):
            assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert all(not point.fwd_hooks for point in random_pair.target.bridge.hook_dict.values())
    assert random_pair.target.when_bridged == [] and interventions_on(random_pair.target.hf) == []


def test_a_bridge_made_inside_the_block_is_patched(random_model: Callable[..., LanguageModel]) -> None:
    pair = make_pair(random_model(0), random_model(1), "new")
    with Patch(["L0H0", "L1.mlp"]).applied(pair):
        torch.testing.assert_close(bridged(pair.target), logits(pair.target), atol=1e-4, rtol=1e-4)
    assert all(
        not m._forward_pre_hooks for m in pair.target.bridge.original_model.modules() if "HookPoint" not in str(m)
    )
    torch.testing.assert_close(bridged(pair.target), logits(pair.target), atol=1e-4, rtol=1e-4)


def test_patches_nest_with_grafts_and_each_other(random_pair: Pair) -> None:
    with Graft(["L0", "L1"]).applied(random_pair), Patch(["L0.resid_pre"]).applied(random_pair):
        # the source's embeddings under the source's blocks; only the last norm and the head are the target's
        whole = logits(random_pair.target)
    with Patch(["L1"]).applied(random_pair):
        torch.testing.assert_close(whole, logits(random_pair.target), atol=1e-5, rtol=1e-5)
    with Patch(["L0H1"]).applied(random_pair), Patch(["L1.mlp"]).applied(random_pair):
        nested = logits(random_pair.target)
    with Patch(["L0H1", "L1.mlp"]).applied(random_pair):
        assert torch.equal(logits(random_pair.target), nested)


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        (["L0.q_proj"], {}, "linear layer.*expected a head"),
        (["L9H0"], {}, "unknown module 'L9H0'"),
        (["L9.resid_pre"], {}, "unknown module"),
        (["L0H0"], {"positions": "lats"}, "did you mean last"),
        (["L0H0"], {"positions": [1.5]}, "whole numbers"),
        (["L0H0"], {"positions": []}, "whole numbers"),
        (["L0H0"], {"positions": [7]}, "no position 7"),
        (["L0H0"], {"heads": "q"}, "expected z or result"),
    ],
)
def test_refusals(random_pair: Pair, modules: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message), Patch(modules, **options).applied(random_pair):
        logits(random_pair.target)
    assert all(not m._forward_pre_hooks for m in random_pair.target.hf.modules())


def test_a_cache_filled_outside_the_patch_is_refused(random_pair: Pair) -> None:
    hf = random_pair.target.hf
    with torch.no_grad():
        past = hf(IDS, attention_mask=MASK, use_cache=True).past_key_values
        mask = torch.cat([MASK, torch.ones(2, 1, dtype=torch.long)], 1)
        with pytest.raises(UsageError, match="outside the patch"), Patch(["L0H0"]).applied(random_pair):
            hf(torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=past)
        with pytest.raises(UsageError, match="token ids"), Patch(["L0H0"]).applied(random_pair):
            hf(inputs_embeds=torch.zeros(1, 3, 32))


# --- what a second reader found ------------------------------------------------------------------------------------


def twin_of(model: LanguageModel) -> LanguageModel:
    return LanguageModel("twin", copy.deepcopy(model.hf), model.tokenizer)


@pytest.mark.parametrize("positions", ["all", "decoding", "last"])
def test_a_self_patch_is_the_identity_in_beam_search_too(pair: Pair, positions: Any) -> None:
    own = make_pair(twin_of(pair.target), pair.target, "self")
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        plain = pair.target.hf.generate(IDS[:1], **options)
        with Patch(["L0H1", "L0.mlp", "L1.attn"], positions).applied(own):
            assert torch.equal(pair.target.hf.generate(IDS[:1], **options), plain)


def test_a_cache_that_is_cropped_or_changed_outside(random_pair: Pair) -> None:
    hf = random_pair.target.hf
    own = make_pair(twin_of(random_pair.target), random_pair.target, "self")

    def cropped() -> torch.Tensor:
        with torch.no_grad():
            past = hf(IDS[:1], use_cache=True).past_key_values
            past.crop(-2)
            return hf(torch.tensor([[7, 8]]), past_key_values=past).logits

    plain = cropped()
    with Patch(["L0H1", "L0.mlp"]).applied(own):
        assert torch.equal(cropped(), plain)
        with torch.no_grad():
            past = hf(IDS[:1], use_cache=True).past_key_values
        with pytest.raises(UsageError, match="static"), torch.no_grad():
            hf.generate(IDS[:1], max_new_tokens=3, cache_implementation="static")
    with torch.no_grad():
        hf(torch.tensor([[7]]), past_key_values=past)
        with Patch(["L0H1"]).applied(own), pytest.raises(UsageError, match="outside the patch"):
            hf(torch.tensor([[8]]), past_key_values=past)


def test_without_a_cache_only_patches_of_every_position_are_possible(random_pair: Pair) -> None:
    hf, options = random_pair.target.hf, {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), Patch(["L0H1", "L0.mlp"]).applied(random_pair):
        assert torch.equal(hf.generate(IDS[:1], **options), hf.generate(IDS[:1], use_cache=False, **options))
    for positions in ("prompt", "decoding", "last", [0]):
        with (
            Patch(["L0H1"], positions).applied(random_pair),  # type: ignore[arg-type]
            pytest.raises(UsageError, match="cannot be told"),
        ):
            hf.generate(IDS[:1], use_cache=False, **options)


def test_the_bridges_reset_hooks_leaves_the_patch_and_its_end_takes_it_away(random_pair: Pair) -> None:
    plain, bridge = logits(random_pair.target), bridged(random_pair.target)
    for everything in (False, True):
        with Patch(["L0H1", "L0.mlp"]).applied(random_pair):
            patched = bridged(random_pair.target)
            random_pair.target.bridge.reset_hooks(including_permanent=everything)
            if not everything:
                assert torch.equal(bridged(random_pair.target), patched)
        assert torch.equal(logits(random_pair.target), plain) and torch.equal(bridged(random_pair.target), bridge)


def test_heads_whose_writes_are_exchanged_are_named_in_one_patch(random_pair: Pair) -> None:
    outer = Patch(["L0H0", "L0H1"], heads="result")
    inner = (Patch(["L0H1", "L0H2"], heads="result"), Patch(["L0H0"]), Ablation(["L0H1"]))
    plain = logits(random_pair.target)
    for patch in inner:
        with outer.applied(random_pair), pytest.raises(UsageError, match="patched by its result in an outer"):
            patch.applied(random_pair).__enter__()
        assert torch.equal(logits(random_pair.target), plain)
    with outer.applied(random_pair):
        alone = logits(random_pair.target)
        with Patch(["L1H0", "L0.mlp"]).applied(random_pair):
            pass
    with Patch(["L0H0"]).applied(random_pair), outer.applied(random_pair):
        torch.testing.assert_close(logits(random_pair.target), alone, atol=1e-5, rtol=1e-5)


def test_a_block_that_adds_to_its_mlps_output_in_place(tokenizer: Any) -> None:
    config = transformers.FalconConfig(
        vocab_size=57, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    target = LanguageModel("falcon", build(config, 0), tokenizer)
    plain = logits(target)
    with Patch(["L0.mlp", "L1.mlp", "L0.attn"]).applied(make_pair(twin_of(target), target, "self")):
        assert torch.equal(logits(target), plain)


def test_what_acts_on_the_source_acts_where_it_should(unchanged: Pair, addition: Task) -> None:
    some = addition.split(8, 8, 16).test
    with (
        Ablation(["L0.mlp"], positions="prompt").applied(unchanged.source),
        Patch(["L1.resid_pre"]).applied(unchanged),
    ):
        forced, written = evaluate(unchanged.target, some), evaluate(unchanged.target, some, "generate")
        assert (forced.correct == written.correct).all()
        both = gold_scores(unchanged.target, some)[1]
    # by hand: the target's first block out, the ablated source's in
    with Ablation(["L0.mlp"], positions="prompt").applied(unchanged.source), Graft([]).applied(unchanged):
        alone = gold_scores(unchanged.source, some)[1]
    assert np.abs(both - alone).max() > 0.01
    assert interventions_on(unchanged.source.hf) == []


def test_a_bridge_of_copies_follows_a_graft_into_the_source(tokenizer: Any) -> None:
    pair = random_pair_of("neox", tokenizer)
    with Patch(["L0.attn", "L1H2"]).applied(pair):
        bridged(pair.target)
        with Graft(["L0", "L1"]).applied(pair.reversed()):
            torch.testing.assert_close(bridged(pair.target), logits(pair.target), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bridged(pair.target), logits(pair.target), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.3, -1.0, 2.0])
def test_strength_is_linear_where_the_patch_is(random_pair: Pair, strength: float) -> None:
    """At its site a patch of strength λ moves λ times as far as one of strength 1."""
    layout, hf = random_pair.layout, random_pair.target.hf
    out = hf.get_submodule(layout.linears[layout.attention_output(0)])
    for modules, heads, at in ((["L0H1", "L0H3"], "result", out), (["L0.mlp"], "z", hf.model.layers[0])):

        def seen(value: float, modules: Any = modules, heads: Any = heads, at: Any = at) -> torch.Tensor:
            found: list[torch.Tensor] = []
            with Patch(modules, heads=heads, strength=value).applied(random_pair):
                handle = at.register_forward_hook(lambda m, i, o: found.append(o.clone()))
                logits(random_pair.target)
                handle.remove()
            return found[0][MASK.bool()]

        none, one = seen(0), seen(1)
        torch.testing.assert_close(seen(strength) - none, strength * (one - none), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", ["strong", float("nan"), None])
def test_strengths_that_are_none(strength: Any) -> None:
    with pytest.raises(UsageError, match="strength"):
        Patch(["L0H0"], strength=strength)


def test_patch_versus_graft_takes_one_name_and_refuses_none(random_pair: Pair, task: Task) -> None:
    assert patch_versus_graft(random_pair, task, "L0H1", resamples=10).module.to_list() == ["L0H1"]
    for modules, message in (
        ([], "no modules were named"),
        (["L0H1", "L0H1"], "each named once"),
        (["L0"], "compares"),
    ):
        with pytest.raises(UsageError, match=message):
            patch_versus_graft(random_pair, task, modules)


def test_effects_of_a_pair_of_equals_are_0_with_a_shared_prefix_too(random_pair: Pair, task: Task) -> None:
    prompt = PromptFormat(system="what is the sum of these two numbers " * 2, shot_separator=" ")
    own = make_pair(twin_of(random_pair.target), random_pair.target, "self")
    table = patch_versus_graft(own, replace(task, format=prompt), ["L0H1", "L1.mlp"], resamples=10)
    assert (table[["patch_effect", "graft_effect"]] == 0).all().all()
