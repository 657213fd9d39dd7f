"""What a graft is, on every architecture, in multi-head, grouped-query and multi-query form, in both dtypes.

Random grafts are compared with slicing state dicts by hand, where the slices are written out here, architecture by
architecture, and with the logits of a plain Hugging Face model that holds the sliced weights.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import parse_address
from mechtransplant.pair import LanguageModel, Pair, load_pair, make_pair

D_HEAD, HEADS = 8, 4
GROUPED = [a for a in ARCHITECTURES if a not in ("gpt2", "neox", "opt")]
FORMS = [(a, kv) for a in GROUPED for kv in (4, 2, 1)] + [("gpt2", 4), ("neox", 4), ("opt", 4)]
DTYPES = (torch.float32, torch.bfloat16)
IDS = torch.tensor([[1, 20, 21, 22, 9, 30, 7, 12]])
POLICIES: tuple[KV, ...] = ("never", "group", "whole-group")


@cache
def pair_of(architecture: str, kv_heads: int, dtype: torch.dtype) -> Pair:
    tokenizer = load_pair("family/generations").target.tokenizer
    models = []
    for seed in (0, 1):
        config = ARCHITECTURES[architecture][0]()
        if architecture in GROUPED:
            config.num_key_value_heads = kv_heads
        hf = build(config, seed).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        for p in hf.parameters():
            # biases and norm scales start equal in both models, and a test could not see them move
            p.add_(torch.randn(p.shape, generator=generator).to(dtype) * 0.05)
        models.append(LanguageModel(f"{architecture}-{seed}", hf, tokenizer))
    return make_pair(models[0], models[1], f"{architecture}-{kv_heads}")


@pytest.fixture(params=[(*form, dtype) for form in FORMS for dtype in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}")
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(*request.param)


def snapshot(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.hf.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p.view(torch.uint8), other[n].view(torch.uint8)) for n, p in one.items())


def under(graft: Graft, pair: Pair) -> dict[str, torch.Tensor]:
    with graft.applied(pair):
        return snapshot(pair.target)


# --- slices written out --------------------------------------------------------------------------------------------


def put_rows(state: dict, source: dict, layer: int, which: str, number: int) -> None:
    """Copy the rows of one head of Q, K or V, with their bias, in the architecture's own storage."""
    at = slice(number * D_HEAD, (number + 1) * D_HEAD)
    q, kv = HEADS * D_HEAD, kv_width(state)
    for name in state:
        if f".{layer}." not in name:
            continue
        if "query_key_value" in name:
            place = (number, "qkv".index(which))
            state[name].view(HEADS, 3, D_HEAD, -1)[place] = source[name].view(HEADS, 3, D_HEAD, -1)[place]
        elif "c_attn" in name:
            start = "qkv".index(which) * q + number * D_HEAD
            state[name][..., start : start + D_HEAD] = source[name][..., start : start + D_HEAD]
        elif "qkv_proj" in name:
            start = {"q": 0, "k": q, "v": q + kv}[which] + number * D_HEAD
            state[name][start : start + D_HEAD] = source[name][start : start + D_HEAD]
        elif f".{which}_proj." in name:
            state[name][at] = source[name][at]


def kv_width(state: dict) -> int:
    """Outputs of K in a layer that holds Q, K and V one after the other."""
    fused = [p for n, p in state.items() if "qkv_proj.weight" in n]
    return (fused[0].shape[0] - HEADS * D_HEAD) // 2 if fused else 0


def put_columns(state: dict, source: dict, layer: int, head: int) -> None:
    at = slice(head * D_HEAD, (head + 1) * D_HEAD)
    for name in state:
        attention = "attn" in name or "attention" in name
        if f".{layer}." not in name or not attention or not name.endswith(".weight"):
            continue
        if ".attn.c_proj." in name:
            state[name][at] = source[name][at]
        elif any(f".{o}." in name for o in ("o_proj", "out_proj", "attention.dense")):
            state[name][:, at] = source[name][:, at]


def by_hand(pair: Pair, modules: list[str], kv: KV) -> dict[str, torch.Tensor]:
    """The target's parameters with the modules sliced in at strength 1."""
    state, source = snapshot(pair.target), snapshot(pair.source)
    size = HEADS // pair.layout.kv_heads
    heads: dict[int, set[int]] = {}
    for module in modules:
        address = parse_address(module)
        if address.head is not None:
            put_rows(state, source, address.layer, "q", address.head)
            put_columns(state, source, address.layer, address.head)
            heads.setdefault(address.layer, set()).add(address.head)
            continue
        for name in state:
            in_block = f".{address.layer}." in name and "norm" not in name and ".ln_" not in name
            feed_forward = ".mlp." in name or ".fc" in name
            wanted = {"mlp": feed_forward, "attn": not feed_forward, "block": True}[address.kind]
            if in_block and wanted:
                state[name] = source[name].clone()
    for layer, chosen in heads.items():
        for group in range(HEADS // size):
            members = set(range(group * size, (group + 1) * size))
            if (kv == "group" and members & chosen) or (kv == "whole-group" and members <= chosen):
                put_rows(state, source, layer, "k", group)
                put_rows(state, source, layer, "v", group)
    return state


MODULES = [f"L{layer}{m}" for layer in range(2) for m in ("", ".mlp", ".attn", *(f"H{h}" for h in range(HEADS)))]
some = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
modules_of = st.lists(st.sampled_from(MODULES), unique=True, max_size=6)
heads_of = st.lists(st.sampled_from([m for m in MODULES if "H" in m]), unique=True, min_size=1, max_size=6)


# --- identities ----------------------------------------------------------------------------------------------------


@some
@given(modules=modules_of, kv=st.sampled_from(POLICIES))
def test_strength_0_and_the_empty_graft_change_no_byte(pair: Pair, modules: list[str], kv: KV) -> None:
    before = snapshot(pair.target)
    assert same(under(Graft(modules, 0.0, kv=kv), pair), before)
    assert same(under(Graft([], 1.0), pair), before)


def test_strength_1_on_all_linear_layers_is_the_source_byte_for_byte(pair: Pair) -> None:
    before, source = snapshot(pair.target), snapshot(pair.source)
    for kind in ("linear", "part", "block"):
        after = under(Graft(pair.modules(kind)), pair)  # type: ignore[arg-type]
        for name, p in after.items():
            linear = name.rpartition(".")[0] in pair.layout.linears.values()
            assert torch.equal(p, source[name] if linear else before[name]), name
    after = under(Graft([m for k in ("linear", "norm", "embedding") for m in pair.modules(k)]), pair)  # type: ignore[arg-type]
    assert same(after, source)


@some
@given(modules=modules_of, strength=st.sampled_from([-1.0, 0.3, 1.0, 2.0]), kv=st.sampled_from(POLICIES))
def test_undo_restores_all_bytes(pair: Pair, modules: list[str], strength: float, kv: KV) -> None:
    before = snapshot(pair.target)
    applied = Graft(modules, strength, kv=kv).applied(pair)
    with applied, applied:
        pass
    assert same(snapshot(pair.target), before)


@some
@given(modules=modules_of, kv=st.sampled_from(POLICIES))
def test_a_graft_is_slicing_by_hand_and_gives_a_plain_copys_logits(pair: Pair, modules: list[str], kv: KV) -> None:
    expected = by_hand(pair, modules, kv)
    graft = Graft(modules, kv=kv)
    assert same(under(graft, pair), expected)
    plain = copy.deepcopy(pair.target.hf)
    for name, p in plain.named_parameters():
        p.copy_(expected[name])
    with graft.applied(pair):
        torch.testing.assert_close(pair.target.hf(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(graft.copied(pair).hf(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=0)


@some
@given(one=heads_of, other=heads_of, kv=st.sampled_from(("never", "group")), strength=st.sampled_from([1.0, 2.0]))
def test_heads_a_then_b_are_a_and_b(pair: Pair, one: list[str], other: list[str], kv: KV, strength: float) -> None:
    if strength != 1:
        # at other strengths what both hold would move twice, as any two nested grafts do
        held = claimed(Graft(one, kv=kv), pair)
        other = [m for m in other if not held & claimed(Graft([m], kv=kv), pair)]
    with Graft(one, strength, kv=kv).applied(pair):
        after = under(Graft(other, strength, kv=kv), pair)
    assert same(after, under(Graft([*one, *other], strength, kv=kv), pair))


def claimed(graft: Graft, pair: Pair) -> set[Any]:
    return {region for region in graft.regions(pair)}


@some
@given(groups=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), unique=True), cut=st.integers(0, 8))
def test_whole_groups_a_then_b_are_a_and_b(pair: Pair, groups: list[tuple[int, int]], cut: int) -> None:
    size = pair.layout.group_size
    sets = [[f"L{n}H{h}" for n, g in part for h in range(g * size, g * size + size) if h < HEADS]
            for part in (groups[:cut], groups[cut:])]  # fmt: skip
    with Graft(sets[0], kv="whole-group").applied(pair):
        after = under(Graft(sets[1], kv="whole-group"), pair)
    assert same(after, under(Graft([*sets[0], *sets[1]], kv="whole-group"), pair))


@some
@given(modules=modules_of, cut=st.integers(0, 6), strengths=st.tuples(*[st.sampled_from([-0.5, 0.5, 1.0, 1.7])] * 2))
def test_disjoint_grafts_commute(pair: Pair, modules: list[str], cut: int, strengths: tuple[float, float]) -> None:
    one = Graft(modules[:cut], strengths[0])
    held = {(r.parameter, i) for r in one.regions(pair) for i in numbers(pair, r)}
    rest = [m for m in modules[cut:] if not any((r.parameter, i) in held for r in Graft([m]).regions(pair)
                                                for i in numbers(pair, r))]  # fmt: skip
    other = Graft(rest, strengths[1])
    with one.applied(pair):
        first = under(other, pair)
    with other.applied(pair):
        second = under(one, pair)
    assert same(first, second)


def numbers(pair: Pair, region: Any) -> range:
    """Rows (or columns) that a region covers, whole tensors as all of their rows and columns."""
    return range(region.start, region.stop) if region.axis is not None else range(max(
        pair.target_parameters[region.parameter].shape))  # fmt: skip


@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "neox"])
def test_the_parts_of_a_fused_layer_and_its_heads_are_the_layer(architecture: str) -> None:
    pair = pair_of(architecture, 4, torch.float32)
    fused = pair.layout.linears_of("L1.attn")[0 if architecture != "phi3" else 1]
    assert pair.layout.parts["L1.q_proj"].linear == fused
    whole = under(Graft([fused]), pair)
    assert same(under(Graft(["L1.q_proj", "L1.k_proj", "L1.v_proj"]), pair), whole)
    heads = Graft([f"L1H{h}" for h in range(HEADS)], kv="whole-group")
    output = pair.layout.attention_output(1)
    with_output = under(Graft([fused, output]), pair)
    bias = f"{pair.layout.linears[output]}.bias"
    by_heads = under(heads, pair)
    assert all(torch.equal(p, with_output[n]) for n, p in by_heads.items() if n != bias)
    # the output's bias is no head's own
    assert bias not in by_heads or torch.equal(by_heads[bias], pair.target_parameters[bias])
