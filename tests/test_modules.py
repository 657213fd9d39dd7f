"""Addresses: parsing, enumeration, and the parameters that each one stands for."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build
from hypothesis import given
from hypothesis import strategies as st

from mechtransplant.errors import UsageError
from mechtransplant.modules import layout_of, parse_address
from mechtransplant.pair import Pair


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from(["mlp", "attn", "q_proj", "attn.c_proj", ""]))
def test_parse_and_print_are_inverse(layer: int, head: int, name: str) -> None:
    for text in (f"L{layer}H{head}", f"L{layer}.{name}" if name else f"L{layer}"):
        assert str(parse_address(text)) == text


@pytest.mark.parametrize("text", ["", "5", "L", "LxH3", "L5H", "L5.", "l5.mlp", "L5.1x", "L5H3.q"])
def test_not_an_address(text: str) -> None:
    with pytest.raises(UsageError, match="not a module address"):
        parse_address(text)


def test_enumeration(generations: Pair) -> None:
    assert len(generations.modules("linear")) == 4 * 7
    assert len(generations.modules("head")) == 4 * 8
    assert generations.modules("mlp") == ["L0.mlp", "L1.mlp", "L2.mlp", "L3.mlp"]
    assert generations.layout.linears_of("L2.attn") == ["L2.q_proj", "L2.k_proj", "L2.v_proj", "L2.o_proj"]
    assert generations.layout.linears_of("L2.mlp") == ["L2.gate_proj", "L2.up_proj", "L2.down_proj"]
    assert len(generations.layout.linears_of("L0")) == 7


def test_unknown_module_names_the_nearest(generations: Pair) -> None:
    with pytest.raises(UsageError, match=r"unknown module 'L3.q_prj'.*L3.q_proj"):
        generations.layout.check("L3.q_prj")
    with pytest.raises(UsageError, match="unknown module 'L9H0'"):
        generations.layout.check("L9H0")


def test_fused_layout_is_addressed_by_unique_names() -> None:
    layout = layout_of(build(ARCHITECTURES["gpt2"][0](), 0))
    assert layout.of_kind("linear")[:4] == ["L0.c_attn", "L0.attn.c_proj", "L0.c_fc", "L0.mlp.c_proj"]
    assert layout.of_kind("part")[:4] == ["L0.q_proj", "L0.k_proj", "L0.v_proj", "L0.attn.c_proj"]
    assert layout.is_feed_forward("L1.mlp.c_proj") and not layout.is_feed_forward("L1.attn.c_proj")
    assert layout.check("L0.q_proj").kind == "part" and layout.check("L0.c_attn").kind == "linear"
    assert layout.of_kind("norm") == ["ln_f", "L0.ln_1", "L0.ln_2", "L1.ln_1", "L1.ln_2"]
    # the output head is tied to the embedding: one tensor, one address
    assert layout.of_kind("embedding") == ["wte", "wpe"]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_parts_cover_every_linear_layer_once(architecture: str) -> None:
    model = build(ARCHITECTURES[architecture][0](), 0)
    layout, parameters = layout_of(model), dict(model.named_parameters())
    written = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for part in layout.of_kind("part"):
        for region in layout.regions(part, parameters):
            region.of(written[region.parameter]).add_(1)
    linear = {r.parameter for a in layout.of_kind("linear") for r in layout.regions(a, parameters)}
    assert {name for name, w in written.items() if w.any()} == linear
    assert all((written[name] == 1).all() for name in linear)


def test_an_unknown_fused_layout_keeps_its_linear_layers_and_refuses_heads() -> None:
    config = transformers.BloomConfig(vocab_size=57, hidden_size=32, n_layer=2, n_head=4)
    model = build(config, 0)
    layout, parameters = layout_of(model), dict(model.named_parameters())
    assert layout.regions("L0.query_key_value", parameters)
    with pytest.raises(UsageError, match=r"where its heads lie inside L0\.query_key_value"):
        layout.regions("L0H1", parameters)
