"""Grafts write exactly their modules, and undoing them restores every byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtransplant.errors import CompatibilityError, UsageError
from mechtransplant.grafting import ConditionalGraft, Graft
from mechtransplant.grafting import applied as grafting
from mechtransplant.interrupts import guard
from mechtransplant.pair import LanguageModel, Pair, make_pair

ALL = [
    f"L{layer}{m}"
    for layer in range(2)
    for m in ("", ".mlp", ".attn", ".q_proj", ".k_proj", ".o_proj", ".down_proj", "H0", "H3")
]


def snapshot(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.hf.named_parameters()}


def same(model: LanguageModel, kept: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, kept[name]) for name, p in model.hf.named_parameters())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(ALL), unique=True), st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]))
def test_undo_restores_every_byte(random_pair: Pair, modules: list[str], strength: float) -> None:
    kept = snapshot(random_pair.target)
    graft = Graft(modules, strength)
    with graft.applied(random_pair):
        untouched = same(random_pair.target, kept)
        assert untouched == (strength == 0 or not modules)
    assert same(random_pair.target, kept)


def test_strength_one_on_all_linear_layers_is_the_source_byte_for_byte(random_pair: Pair) -> None:
    with Graft(random_pair.modules("linear")).applied(random_pair):
        for name in random_pair.layout.linears.values():
            assert torch.equal(
                random_pair.target_parameters[f"{name}.weight"], random_pair.source_parameters[f"{name}.weight"]
            )


def test_only_the_named_modules_move(random_pair: Pair) -> None:
    kept = snapshot(random_pair.target)
    with Graft(["L0.q_proj", "L1.mlp"]).applied(random_pair):
        moved = {n for n, p in random_pair.target.hf.named_parameters() if not torch.equal(p, kept[n])}
    assert moved == {"model.layers.0.self_attn.q_proj.weight"} | {
        f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }


def test_head_graft_equals_slicing_by_hand(random_pair: Pair) -> None:
    kept, source = snapshot(random_pair.target), random_pair.source_parameters
    with Graft(["L1H2"]).applied(random_pair):
        q, o = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "qo")
        expected_q, expected_o = kept[q].clone(), kept[o].clone()
        expected_q[16:24] = source[q][16:24]
        expected_o[:, 16:24] = source[o][:, 16:24]
        assert torch.equal(random_pair.target_parameters[q], expected_q)
        assert torch.equal(random_pair.target_parameters[o], expected_o)


def test_extrapolation(random_pair: Pair) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    old, new = random_pair.target_parameters[name].clone(), random_pair.source_parameters[name]
    with Graft(["L0.up_proj"], 2.0).applied(random_pair):
        torch.testing.assert_close(random_pair.target_parameters[name], old + 2 * (new - old))


def test_self_graft_changes_no_byte(random_model: Callable[..., LanguageModel]) -> None:
    pair = make_pair(random_model(0), random_model(0), "self")
    kept = snapshot(pair.target)
    for strength in (1.0, 0.7, 2.0):
        with Graft(pair.modules("block"), strength).applied(pair):
            assert same(pair.target, kept)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_undone_after_an_exception_in_the_block(random_pair: Pair, error: type[BaseException]) -> None:
    kept = snapshot(random_pair.target)
    with pytest.raises(error), Graft(["L0", "L1H1"]).applied(random_pair):
        raise error
    assert same(random_pair.target, kept)


@pytest.mark.parametrize("after", range(4))
def test_undone_after_ctrl_c_while_writing(random_pair: Pair, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    kept, write, calls = snapshot(random_pair.target), grafting.write, []

    def interrupted(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt

    monkeypatch.setattr(grafting, "write", interrupted)
    with pytest.raises(KeyboardInterrupt), Graft(["L0.attn"]).applied(random_pair):
        pytest.fail("the graft was applied although it was interrupted")
    assert same(random_pair.target, kept)


def test_ctrl_c_at_any_moment_restores_every_byte(random_pair: Pair) -> None:
    """A real SIGINT from a timer, at hundreds of moments around applying and restoring, in nested blocks."""
    import random
    import signal
    import time

    kept, graft, rng = snapshot(random_pair.target), Graft(["L0", "L1H1"]), random.Random(0)
    started = time.perf_counter()
    for _ in range(20):
        with graft.applied(random_pair), graft.applied(random_pair):
            pass
    duration = (time.perf_counter() - started) / 20
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted, held = 0, []
    try:
        for _ in range(1500):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1.2 * duration))
                with graft.applied(random_pair), graft.applied(random_pair):
                    pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt as error:
                interrupted += 1
                # a notebook keeps the last traceback alive, and with it everything on the stack
                held = [error]
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert same(random_pair.target, kept), held
            assert random_pair.applied == [] and guard.depth == 0
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGALRM, before[1])
    assert interrupted > 300


def test_ctrl_c_in_the_block_is_not_held_back(random_pair: Pair) -> None:
    import signal

    kept, reached = snapshot(random_pair.target), []
    # a background job inherits "ignore", under which there is no Ctrl-C to let through
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Graft(["L0"]).applied(random_pair):
            signal.raise_signal(signal.SIGINT)
            reached.append("after the interrupt")
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == [] and same(random_pair.target, kept)


def test_leaving_grafts_out_of_order_is_refused_and_still_restores(random_pair: Pair) -> None:
    kept = snapshot(random_pair.target)
    first, second = Graft(["L0"]).applied(random_pair), Graft(["L0.mlp", "L1"], 0.5).applied(random_pair)
    first.__enter__()
    second.__enter__()
    with pytest.raises(UsageError, match="nest"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert same(random_pair.target, kept) and random_pair.applied == []


def test_numpy_strengths(random_pair: Pair) -> None:
    import numpy as np

    assert Graft(["L0"], np.float32(0.5)).strengths == Graft(["L0"], np.array([0.5])).strengths == (0.5,)
    assert Graft(["L0"], np.int64(1)).strengths == (1.0,)


def test_nested_grafts(random_pair: Pair) -> None:
    kept = snapshot(random_pair.target)
    with Graft(["L0"]).applied(random_pair):
        outer = snapshot(random_pair.target)
        with Graft(["L0.q_proj", "L1"], 0.5).applied(random_pair):
            pass
        assert same(random_pair.target, outer)
    assert same(random_pair.target, kept)


def test_bridge_and_hf_see_the_graft(random_pair: Pair) -> None:
    ids = torch.tensor([[1, 20, 21, 22, 9]])
    plain = random_pair.target.bridge(ids)
    with Graft(["L1.mlp"]).applied(random_pair):
        grafted = random_pair.target.bridge(ids)
        torch.testing.assert_close(grafted, random_pair.target.hf(ids).logits, atol=1e-4, rtol=1e-4)
    assert (plain - grafted).abs().max() > 1e-3
    assert torch.equal(random_pair.target.bridge(ids), plain)


def test_refusals_change_nothing(random_model: Callable[..., LanguageModel]) -> None:
    pair = make_pair(random_model(0), random_model(1), "broken")
    kept = snapshot(pair.target)
    pair.source_parameters["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(CompatibilityError, match="NaN"), Graft(["L0", "L1"]).applied(pair):
        pass
    for bad in (["L0.q_prj"], ["L7"], ["nonsense"]):
        with pytest.raises(UsageError), Graft(bad).applied(pair):
            pass
    with pytest.raises(UsageError, match="different strength"), Graft(["L0", "L0.q_proj"], [1.0, 2.0]).applied(pair):
        pass
    with pytest.raises(UsageError, match="2 strengths for 1"):
        Graft(["L0"], [1.0, 2.0])
    with pytest.raises(UsageError, match="finite"):
        Graft(["L0"], float("nan"))
    assert same(pair.target, kept)


def test_overlap_at_equal_strength_is_applied_once(random_pair: Pair) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with Graft(["L0", "L0.attn", "L0.q_proj", "L0H1"], 0.5).applied(random_pair):
        grafted = random_pair.target_parameters[name].clone()
    with Graft(["L0"], 0.5).applied(random_pair):
        assert torch.equal(random_pair.target_parameters[name], grafted)


@pytest.mark.parametrize(
    ("modules", "kv", "said"),
    [
        (["L1H0"], "never", ["L1: K/V of head 0 stay the target's (kv='never')"]),
        (["L1H0"], "group", ["L1: moves K/V of heads 0–1, read by head 1 outside the graft as well"]),
        (["L1H0", "L1H1"], "group", ["L1: moves K/V of heads 0–1"]),
        (
            ["L1H0", "L1H1", "L1H3"],
            "whole-group",
            ["L1: moves K/V of heads 0–1", "L1: K/V of head 3 stay the target's (kv='whole-group')"],
        ),
        (["L0.mlp"], "group", []),
        # K and V that come with another module of the graft are moved all the same
        (
            ["L1H0", "L1.k_proj", "L1.v_proj"],
            "never",
            ["L1: moves K/V of heads 0–1, read by head 1 outside the graft as well"],
        ),
        (["L1H0", "L1H1", "L1.attn"], "never", ["L1: moves K/V of heads 0–1"]),
        (["L0.input_layernorm"], "never", ["moves L0.input_layernorm, which stay the target's unless they are named"]),
    ],
)
def test_consequences_are_spelled_out(random_pair: Pair, modules: list[str], kv: Any, said: list[str]) -> None:
    graft = Graft(modules, kv=kv)
    assert graft.consequences(random_pair) == said
    assert all(line in graft.describe(random_pair) for line in said)


@pytest.mark.parametrize(
    ("strength", "mode"),
    [
        (0, "nothing"),
        (1, "replacement"),
        (0.3, "interpolation"),
        (2, "extrapolation"),
        (-1, "subtraction"),
        ([1, 2], "replacement and extrapolation"),
    ],
)
def test_the_mode_of_a_strength(strength: Any, mode: str) -> None:
    assert Graft(["L0", "L1"], strength).mode == mode


def test_strengths_by_mapping_function_and_curve(random_pair: Pair) -> None:
    from mechtransplant.grafting import depth_curve

    modules = ["L0.mlp", "L1.mlp"]
    expected = Graft(modules, [0.25, 1.0])
    curve = depth_curve([0.25, 1.0], random_pair.layout.layers)
    import pandas as pd

    # a Series says whose each number is, whatever the order
    keyed = pd.Series({"L1.mlp": 1.0, "L0.mlp": 0.25})
    for strength in (
        keyed,
        torch.tensor([0.25, 1.0]),
        {"L0.mlp": 0.25, "L1.mlp": 1.0},
        lambda a: 0.25 + 0.75 * a.layer,
        curve,
    ):
        assert Graft(modules, strength) == expected
    for strength, message in (
        ({"L0.mlp": 1.0}, "L1.mlp has a strength or is in the graft, not both"),
        (depth_curve([1], 1), "L1.mlp is in none of 1 layers"),
        ("strong", "is one number, got 'strong'"),
        # digits are no list of numbers
        ("12", "is one number, got '12'"),
        (b"12", "is one number"),
        (["0.5", 1], "is one number, got '0.5'"),
        (True, "is one number, got True"),
        (None, "is one number, got None"),
    ):
        with pytest.raises(UsageError, match=message):
            Graft(modules, strength)  # type: ignore[arg-type]


def test_strict_refuses_every_overlap_and_nothing_else(random_pair: Pair) -> None:
    before = snapshot(random_pair.target)
    for modules in (["L0", "L0H1"], ["L0.attn", "L0.q_proj"], ["L1.mlp", "L1"]):
        with pytest.raises(UsageError, match="overlap"), Graft(modules, strict=True).applied(random_pair):
            pass
        assert same(random_pair.target, before)
    for modules in (["L0H0", "L0H1", "L0.mlp", "L1"], ["L0H0", "L0H1"]):
        with Graft(modules, strict=True, kv="group").applied(random_pair):
            pass


def test_heads_that_share_kv_need_one_strength(random_pair: Pair) -> None:
    with pytest.raises(UsageError, match="L0H0 at 1, L0H1 at 2 share K and V"):
        Graft(["L0H0", "L0H1"], [1, 2], kv="group").regions(random_pair)
    Graft(["L0H0", "L0H1"], [1, 2]).regions(random_pair)
    with pytest.raises(UsageError, match="did you mean group"):
        Graft(["L0H0"], kv="groups")  # type: ignore[arg-type]


def test_norms_and_embeddings_move_only_when_named(random_model: Callable[..., LanguageModel]) -> None:
    random_pair = make_pair(random_model(0), random_model(1), "norms")
    kept = snapshot(random_pair.target)
    named = {
        "L0.input_layernorm": "model.layers.0.input_layernorm.weight",
        "norm": "model.norm.weight",
        "embed_tokens": "model.embed_tokens.weight",
        "lm_head": "lm_head.weight",
    }
    for p in random_pair.source.hf.model.modules():
        if "RMSNorm" in type(p).__name__:
            p.weight.mul_(1.5)
    for address, parameter in named.items():
        with Graft([address]).applied(random_pair):
            moved = {n for n, p in random_pair.target.hf.named_parameters() if not torch.equal(p, kept[n])}
        assert moved == {parameter}
    with Graft(random_pair.modules("block")).applied(random_pair):
        assert all(torch.equal(random_pair.target_parameters[p], kept[p]) for p in named.values())


def test_the_same_block_may_be_entered_while_it_is_in_use(random_pair: Pair) -> None:
    kept = snapshot(random_pair.target)
    applied = Graft(["L0"], 0.5).applied(random_pair)
    with applied:
        once = snapshot(random_pair.target)
        with applied:
            assert not same(random_pair.target, once)
        assert same(random_pair.target, once)
    assert same(random_pair.target, kept)


def test_models_of_unlike_shape_or_dtype_are_refused(random_model: Callable[..., LanguageModel]) -> None:
    source, target = random_model(0), random_model(1)
    pair = make_pair(source, target, "unlike")
    kept = snapshot(target)
    source.hf.model.layers[1].mlp.up_proj.to(torch.bfloat16)
    with (
        pytest.raises(CompatibilityError, match="bfloat16 and the target's float32"),
        Graft(["L0", "L1"]).applied(pair),
    ):
        pass
    other = make_pair(random_model(0), target, "unlike")
    other.source.hf.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(CompatibilityError, match=r"of shape \(3, 3\)"), Graft(["L1", "L0"]).applied(other):
        pass
    assert same(target, kept)


def test_a_copy_is_the_graft_and_leaves_the_pair_alone(random_pair: Pair) -> None:
    kept = snapshot(random_pair.target)
    graft = Graft(["L0H1", "L1.mlp"], 0.7)
    model = graft.copied(random_pair)
    assert same(random_pair.target, kept)
    with graft.applied(random_pair):
        assert all(torch.equal(p, random_pair.target_parameters[n]) for n, p in model.hf.named_parameters())
    model.hf.model.layers[1].mlp.up_proj.weight.zero_()
    assert same(random_pair.target, kept)


def test_a_graft_of_strength_0_claims_to_move_nothing(random_pair: Pair) -> None:
    assert Graft(["L1H0", "L0.input_layernorm"], 0.0, kv="group").consequences(random_pair) == []


def test_a_model_that_is_given_new_parameters_is_grafted_all_the_same(
    random_model: Callable[..., LanguageModel],
) -> None:
    pair, ids = make_pair(random_model(0), random_model(1), "new"), torch.tensor([[1, 20, 21]])
    with Graft(["L0"]).applied(pair):
        expected = pair.target.hf(ids).logits
    pair.target.hf.load_state_dict({n: p.clone() for n, p in pair.target.hf.state_dict().items()}, assign=True)
    with Graft(["L0"]).applied(pair):
        assert torch.equal(pair.target.hf(ids).logits, expected)


def test_a_source_that_becomes_nan_after_a_first_graft_is_refused(random_model: Callable[..., LanguageModel]) -> None:
    pair = make_pair(random_model(0), random_model(1), "nan")
    with Graft(["L0.mlp"]).applied(pair):
        pass
    pair.source.hf.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CompatibilityError, match="NaN"), Graft(["L0.mlp"]).applied(pair):
        pass


def test_an_ancestor_that_is_not_finite_is_refused(random_model: Callable[..., LanguageModel]) -> None:
    pair = make_pair(random_model(0), random_model(1), "nan")
    pair.base = random_model(2)
    graft = Graft(["L0.up_proj"], operator="ties")
    with graft.applied(pair):
        pass
    pair.base.hf.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    kept = snapshot(pair.target)
    with pytest.raises(CompatibilityError, match=r"ancestor's .*up_proj.* NaN"), graft.applied(pair):
        pass
    assert same(pair.target, kept)


def test_a_graft_that_overflows_is_refused_and_undone(random_model: Callable[..., LanguageModel]) -> None:
    models = [random_model(seed) for seed in (0, 1)]
    for model in models:
        model.hf.half()
    pair = make_pair(*models, "half")
    models[0].hf.model.layers[0].mlp.up_proj.weight[0, 0] = 60000
    kept, ids = snapshot(pair.target), torch.tensor([[1, 20, 21]])
    graft, message = Graft(["L0"], 2), r"up_proj.* at strength 2 gives NaN or Inf in float16"
    with pytest.raises(UsageError, match=message), graft.applied(pair):
        pass
    assert same(pair.target, kept) and pair.applied == [] and guard.depth == 0
    with pytest.raises(UsageError, match=message), ConditionalGraft(graft, "prompt").applied(pair):
        pair.target.hf(ids)
    assert same(pair.target, kept) and pair.applied == [] and guard.depth == 0
    with pytest.raises(UsageError, match=message):
        graft.copied(pair)
    # the source's own numbers fit
    with Graft(["L0"]).applied(pair):
        assert pair.target.hf.model.layers[0].mlp.up_proj.weight[0, 0] == 60000


def test_a_reversed_pair_keeps_its_ancestor(random_model: Callable[..., LanguageModel]) -> None:
    pair = make_pair(random_model(0), random_model(1), "ancestor")
    pair.base = random_model(2)
    assert pair.reversed().base is pair.base


def test_modules_that_are_none_and_sets_without_an_order(random_pair: Pair) -> None:
    for modules in (None, 3):
        with pytest.raises(UsageError, match="modules are addresses"):
            Graft(modules)  # type: ignore[arg-type]
    assert len(Graft({"L0", "L1"}, 0.5)) == 2
    with pytest.raises(UsageError, match="has no order"):
        Graft({"L0", "L1"}, [0.5, 1.0])
    for method in ("applied", "describe", "copied"):
        with pytest.raises(UsageError, match="pass the pair, got LanguageModel"):
            getattr(Graft(["L0"]), method)(random_pair.target)


def test_hints_for_near_addresses(random_pair: Pair) -> None:
    for address, hint in (("L1.MLP", "L1.mlp"), ("L7H0", "Layers are 0 to 1, heads 0 to 3"), ("L1.q_prj", "L1.q_proj")):
        with pytest.raises(UsageError, match=hint):
            Graft([address]).regions(random_pair)


def test_a_description_says_what_varies(random_pair: Pair) -> None:
    from mechtransplant.grafting.operators import Ties

    said = Graft(["L0", "L1.mlp"], [0.5, 0.0], operator=Ties(density=0.1)).describe(random_pair)
    assert "density = 0.1" in said and "strengths: L0 0.5, L1.mlp 0" in said
    # what has strength 0 is not counted as written
    assert f"{Graft(['L0']).parameter_count(random_pair):,} numbers" in said
    assert "not in place" in repr(Graft(["L0"]).applied(random_pair))


def test_a_mapping_alone_is_no_set_of_modules() -> None:
    strengths = {"L0.mlp": 0.5, "L1.mlp": 1.5}
    with pytest.raises(UsageError, match=r"strengths are given beside the modules: Graft\(list\(m\), m\)"):
        Graft(strengths)
    assert Graft(list(strengths), strengths).strengths == (0.5, 1.5)


def test_how_far_a_graft_moves_the_weights(generations: Pair) -> None:
    modules = generations.modules("linear")
    ours, theirs = generations.target_parameters, generations.source_parameters
    names = {region.parameter for region in Graft(modules).regions(generations)}
    way = sum(float(((theirs[name].double() - ours[name].double()) ** 2).sum()) for name in names) ** 0.5
    assert Graft(modules).distance(generations) == pytest.approx(way, rel=1e-5)
    assert Graft(modules, 1.5).distance(generations) == pytest.approx(1.5 * way, rel=1e-5)
    few, rest = Graft(modules[:5]).distance(generations), Graft(modules[5:]).distance(generations)
    assert few**2 + rest**2 == pytest.approx(way**2, rel=1e-5) and 0 < few < way
    # the largest tenth of the changes has more than a tenth of their squares
    largest = Graft(modules, operator={"name": "ties", "density": 0.1}).distance(generations)
    assert 0.1**0.5 * way < largest < way
    # as many at random, each ten times as far, have ten times the squares of their share
    drawn = Graft(modules, operator={"name": "dare", "density": 0.1, "rescale": "density", "seed": 1})
    assert drawn.distance(generations) == pytest.approx((0.1 * 100) ** 0.5 * way, rel=0.05)
    assert Graft(modules, 0.0).distance(generations) == 0


@pytest.mark.parametrize("operator", ["replace", "ties", "dare", {"name": "low_rank", "rank": 2}])
def test_what_stays_at_strength_0_is_not_counted(random_model: Callable[..., LanguageModel], operator: Any) -> None:
    pair = make_pair(random_model(0), random_model(1), "counted")
    # with an ancestor TIES computes other numbers than the target's at strength 0 too
    pair.base = random_model(2)
    some = Graft(["L0.up_proj", "L1.mlp", "L1H2"], [0.5, 0, 0], operator=operator)
    alone = Graft(["L0.up_proj"], 0.5, operator=operator)
    before = pair.target_parameters["model.layers.0.mlp.up_proj.weight"].clone()
    with some.applied(pair):
        changed = int((pair.target_parameters["model.layers.0.mlp.up_proj.weight"] != before).sum())
    assert some.changed_count(pair) == alone.changed_count(pair) == changed
    assert some.carried_count(pair) == alone.carried_count(pair)
    assert some.distance(pair) == alone.distance(pair)
    # the size of its modules is what it was
    assert some.parameter_count(pair) > alone.parameter_count(pair)
    assert Graft(some.modules, 0, operator=operator).carried_count(pair) == 0
