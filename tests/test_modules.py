"""Addresses: parsing, enumeration, and the parameters that each one stands for."""

from __future__ import annotations

import pytest
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
    from transformers import GPT2Config, GPT2LMHeadModel

    layout = layout_of(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)))
    assert layout.of_kind("linear")[:4] == ["L0.c_attn", "L0.attn.c_proj", "L0.c_fc", "L0.mlp.c_proj"]
    assert layout.is_feed_forward("L1.mlp.c_proj") and not layout.is_feed_forward("L1.attn.c_proj")
    with pytest.raises(UsageError, match="fused"):
        layout.regions("L0H1", {})
