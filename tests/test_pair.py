"""Pairs: what the compatibility report says, what it forbids, and the bridge over shared parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES, build

from mechtransplant.errors import CompatibilityError, UsageError
from mechtransplant.pair import Compatibility, LanguageModel, Pair, load_pair, make_pair

Build = Callable[..., LanguageModel]


def test_a_turned_pair_keeps_what_differed_between_the_tokenizers() -> None:
    pair = load_pair("family/generations")
    rows = pair.compatibility.checks.set_index("what")
    template = ("yes", "none", "the source's is used for both")
    checks = pair.compatibility.checks.copy()
    checks.loc[checks.what == "chat template", ["source", "target", "verdict"]] = template
    pair.compatibility = Compatibility(checks, pair.compatibility.shapes)
    turned = pair.reversed().compatibility
    row = turned.checks.set_index("what").loc["chat template"]
    assert (row.source, row.target, row.verdict) == ("none", "yes", "stays the target's")
    assert turned.checks.set_index("what").loc["hidden_size"].equals(rows.loc["hidden_size"])
    back = pair.reversed().reversed().compatibility.checks
    assert list(back.itertuples(index=False)) == list(checks.itertuples(index=False))


def test_report_of_the_family(generations: Pair) -> None:
    report = generations.compatibility
    assert report.forbidden == []
    assert set(report.checks.verdict) <= {"same", "stays the target's"}
    assert len(report.shapes) == 28 and report.shapes.match.all() and (report.shapes.relative_change > 0).all()
    assert any("norm scales" in text for text in report.stays), "the second generation trained its norms too"
    assert "28 linear layers" in str(report)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"intermediate_size": 64}, "intermediate_size"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"attention_bias": True}, "q_proj"),
    ],
)
def test_models_of_different_shape_are_refused(random_model: Build, changes: dict[str, int], reason: str) -> None:
    with pytest.raises(CompatibilityError, match=reason):
        make_pair(random_model(0), random_model(1, **changes))


@pytest.mark.parametrize(
    ("architecture", "spelled_out", "other"),
    [
        ("qwen2", {"head_dim": 8}, {"head_dim": 16}),
        ("phi3", {"head_dim": 8}, {"head_dim": 16}),
        ("gpt2", {"num_key_value_heads": 4}, {"num_key_value_heads": 2}),
    ],
)
def test_what_one_config_leaves_out_is_derived(
    generations: Pair, architecture: str, spelled_out: dict[str, int], other: dict[str, int]
) -> None:
    tokenizer = generations.target.tokenizer
    models = [LanguageModel(f"{seed}", build(ARCHITECTURES[architecture][0](), seed), tokenizer) for seed in (0, 1)]
    for name, value in spelled_out.items():
        setattr(models[0].hf.config, name, value)
    for ours, theirs in (models, models[::-1]):
        pair = make_pair(ours, theirs)
        row = pair.compatibility.checks.set_index("what").loc[next(iter(spelled_out))]
        assert (row.source, row.target, row.verdict) == (*2 * tuple(spelled_out.values()), "same")
    for name, value in other.items():
        setattr(models[0].hf.config, name, value)
    with pytest.raises(CompatibilityError, match=next(iter(other))):
        make_pair(*models)


def test_a_different_tokenizer_is_refused(random_model: Build) -> None:
    source, target = random_model(0), random_model(1)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {t: i for i, t in enumerate(["<unk>", *map(chr, range(33, 90))])}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(CompatibilityError, match="tokenizer vocabulary"):
        make_pair(LanguageModel("other", source.hf, other), target)


def test_settings_that_differ_stay_the_targets(random_model: Build) -> None:
    pair = make_pair(
        random_model(0, rms_norm_eps=1e-5), random_model(1, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    )
    stays = " ".join(pair.compatibility.stays)
    assert "rms_norm_eps" in stays and "rope_parameters" in stays


def test_the_siblings_chat_template_serves_both(random_model: Build) -> None:
    source, target = random_model(0), random_model(1)
    source.tokenizer = copy.deepcopy(source.tokenizer)
    source.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    pair = make_pair(source, target)
    assert pair.target.tokenizer is pair.source.tokenizer
    verdict = pair.compatibility.checks.set_index("what").verdict["chat template"]
    assert verdict == "the source's is used for both"
    assert any("chat template" in text and "used for both" in text for text in pair.compatibility.stays)
    assert pair.target.tokenizer is not random_model(1).tokenizer, "a tokenizer that other models use stays as it was"
    assert not getattr(random_model(1).tokenizer, "chat_template", None)


def test_bridge_shares_every_parameter_and_leaves_hf_clean(random_model: Build) -> None:
    model = random_model(3)
    keys = list(model.hf.state_dict())
    ids = torch.tensor([[1, 20, 21, 22, 9]])
    before = model.hf(ids).logits
    torch.testing.assert_close(model.bridge(ids), before, atol=1e-4, rtol=1e-4)
    assert list(model.hf.state_dict()) == keys
    addresses = {p.data_ptr() for p in model.hf.parameters()}
    assert {p.data_ptr() for p in model.bridge.original_model.parameters()} == addresses
    assert torch.equal(model.hf(ids).logits, before)


def test_bridge_of_a_trained_model_gives_its_logits(generations: Pair) -> None:
    ids = torch.tensor([generations.target.tokenizer("47+85=")["input_ids"]])
    logits, cache = generations.target.bridge.run_with_cache(ids, names_filter="blocks.1.attn.hook_z")
    torch.testing.assert_close(logits, generations.target.hf(ids).logits, atol=1e-3, rtol=1e-4)
    assert cache["blocks.1.attn.hook_z"].shape == (1, ids.shape[1], 8, 16)


def test_reversed(random_pair: Pair) -> None:
    turned = random_pair.reversed()
    assert turned.source is random_pair.target and turned.target is random_pair.source


def test_bad_names() -> None:
    with pytest.raises(UsageError, match=r"unknown pair.*family/generations"):
        load_pair("family/generation")
    with pytest.raises(UsageError, match="not both"):
        load_pair("family/generations", source="x")
    with pytest.raises(UsageError, match="needs a name"):
        load_pair(source="x")
