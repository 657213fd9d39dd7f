"""Conditional grafts: for the prompt alone, while decoding alone, or for some questions alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mechtransplant.activations import cache_activations
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate, gold_scores
from mechtransplant.evaluation.batches import encode
from mechtransplant.evaluation.interventions import interventions_on
from mechtransplant.grafting import ConditionalGraft, Graft, conditional
from mechtransplant.interrupts import guard
from mechtransplant.pair import Pair, make_pair
from mechtransplant.shifts import measure_shifts
from mechtransplant.tasks import Example, Task

MODULES = ["L0", "L1.mlp", "L2H3"]


@pytest.fixture(scope="module")
def test(addition: Task) -> Task:
    return addition.split(8, 8, 48).test


def by_hand(pair: Pair, prompt: list[int], when: str, steps: int) -> list[int]:
    """Greedy text, the weights exchanged by hand between the prompt's pass and the others."""
    graft, written, past = Graft(MODULES), [], None
    ids = torch.tensor([prompt])
    for step in range(steps):
        on = (step == 0) == (when == "prompt")
        with torch.no_grad(), (graft if on else Graft([])).applied(pair):
            out = pair.target.hf(ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        written.append(int(ids))
    return written


@pytest.mark.parametrize("when", ["prompt", "decoding"])
def test_prompt_or_decoding_alone(unchanged: Pair, test: Task, when: Any) -> None:
    pair = unchanged
    with ConditionalGraft(Graft(MODULES), when).applied(pair):
        forced, written = evaluate(pair.target, test), evaluate(pair.target, test, "generate")
        alone = gold_scores(pair.target, test, 1)[1]
    assert (forced.correct == written.correct).all()
    np.testing.assert_allclose(forced.log_probability, alone, atol=1e-3)
    prompts = encode(test, pair.target.tokenizer).prompts
    ends = pair.target.tokenizer.eos_token_id
    for i in range(12):
        tokens = by_hand(pair, prompts[i], when, test.max_new_tokens)
        text = tokens[: tokens.index(ends)] if ends in tokens else tokens
        assert written.texts is not None
        assert written.texts[i] == pair.target.tokenizer.decode(text)
    with Graft(MODULES).applied(pair):
        always = gold_scores(pair.target, test)[1]
    for other in (always, gold_scores(pair.target, test)[1]):
        assert np.abs(alone - other).max() > 0.01


def test_only_for_questions_that_are_accepted(unchanged: Pair, test: Task) -> None:
    pair = unchanged
    plain = gold_scores(pair.target, test)
    with Graft(MODULES).applied(pair):
        grafted = gold_scores(pair.target, test)

    def carries(example: Example) -> bool:
        return example.template == "carry"

    accepted = np.array([carries(e) for e in test.examples])
    assert 0 < accepted.sum() < len(test)
    with ConditionalGraft(Graft(MODULES), accepts=carries).applied(pair):
        for size in (7, 64):
            correct, log_probability = gold_scores(pair.target, test, size)
            assert (correct == np.where(accepted, grafted[0], plain[0])).all()
            np.testing.assert_allclose(log_probability, np.where(accepted, grafted[1], plain[1]), atol=1e-3)
        written = evaluate(pair.target, test, "generate")
        assert (written.correct == correct).all()
    everywhere = ConditionalGraft(Graft(MODULES), accepts=lambda example: True)
    nowhere = ConditionalGraft(Graft(MODULES), accepts=lambda example: False)
    for each, expected in ((everywhere, grafted), (nowhere, plain)):
        with each.applied(pair):
            np.testing.assert_allclose(gold_scores(pair.target, test)[1], expected[1], atol=1e-3)


def test_two_conditions_together(unchanged: Pair, test: Task) -> None:
    pair = unchanged
    first = ConditionalGraft(Graft(["L0.mlp"]), accepts=lambda e: e.template == "carry")
    second = ConditionalGraft(Graft(["L2.mlp"]), "decoding")
    with first.applied(pair), second.applied(pair):
        both = gold_scores(pair.target, test)[1]
    accepted = np.array([e.template == "carry" for e in test.examples])
    with second.applied(pair):
        rest = gold_scores(pair.target, test)[1]
        with Graft(["L0.mlp"]).applied(pair):
            inner = gold_scores(pair.target, test)[1]
    np.testing.assert_allclose(both, np.where(accepted, inner, rest), atol=1e-3)


def test_the_bridge_is_under_the_condition_too(unchanged: Pair) -> None:
    pair, ids = unchanged, torch.tensor([[1, 20, 21, 22, 9]])
    # made inside of the block, a bridge must not carry a copy of its hooks away
    pair.target.__dict__.pop("bridge", None)
    with ConditionalGraft(Graft(MODULES), "prompt").applied(pair):
        on = pair.target.bridge(ids)
        # the weights are the graft's or not, depending on the last pass
        with pytest.raises(UsageError, match="conditional graft is in place"):
            Graft([]).copied(pair)
    with ConditionalGraft(Graft(MODULES), "decoding").applied(pair):
        off = pair.target.bridge(ids)
    assert torch.equal(off, pair.target.bridge(ids))
    with Graft(MODULES).applied(pair):
        assert torch.equal(on, pair.target.bridge(ids))


def test_undone_on_any_exit(random_pair: Pair) -> None:
    before, ids = random_pair.target.fingerprint, torch.tensor([[1, 20, 21]])
    applied = ConditionalGraft(Graft(["L0", "L1H1"], 0.5), "prompt").applied(random_pair)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), applied:
            random_pair.target.hf(ids)
            assert random_pair.target.fingerprint != before
            raise error
        assert random_pair.target.fingerprint == before
    hf = random_pair.target.hf
    assert interventions_on(hf) == [] and random_pair.conditional == [] and guard.depth == 0
    assert random_pair.target.when_bridged == [] and not hf._forward_pre_hooks


def test_refusals(random_pair: Pair, addition: Task) -> None:
    before, ids = random_pair.target.fingerprint, torch.tensor([[1, 20, 21]])
    for options, message in (
        ({}, "without a condition"),
        ({"when": "promt"}, "did you mean prompt"),
        ({"accepts": "carry"}, "function of an example"),
    ):
        with pytest.raises(UsageError, match=message):
            ConditionalGraft(Graft(["L0"]), **options)  # type: ignore[arg-type]
    some = addition.split(8, 8, 8).discover
    conditional = ConditionalGraft(Graft(["L0.mlp"]), "prompt").applied(random_pair)
    with conditional:
        with pytest.raises(UsageError, match="enter its block inside"), Graft(["L0"]).applied(random_pair):
            pass
        with pytest.raises(UsageError, match="in place already"), conditional:
            pass
        with Graft(["L1"]).applied(random_pair):
            pass
        # what is read in one pass has no phases
        with pytest.raises(UsageError, match="read in one pass"):
            cache_activations(random_pair.target, some)
        with pytest.raises(UsageError, match="read in one pass"):
            measure_shifts(random_pair, some)
    with (
        ConditionalGraft(Graft(["L0"]), accepts=bool).applied(random_pair),
        pytest.raises(UsageError, match="direct forward pass"),
    ):
        random_pair.target.hf(ids)
    with pytest.raises(UsageError, match="unknown module"):
        ConditionalGraft(Graft(["L0.q_prj"]), "prompt").applied(random_pair)
    assert random_pair.target.fingerprint == before


def test_a_bridge_of_copies_cannot_be_switched(generations: Pair) -> None:
    from architectures import random_pair_of

    pair, ids = random_pair_of("neox", generations.target.tokenizer), torch.tensor([[1, 20, 21]])
    pair.target.bridge(ids)
    with Graft(["L0", "L1"]).applied(pair):
        # a plain graft shows in the bridge: it is made again
        torch.testing.assert_close(pair.target.bridge(ids), pair.target.hf(ids).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pair.target.bridge(ids), pair.target.hf(ids).logits, atol=1e-4, rtol=1e-4)
    plain = pair.target.hf(ids).logits
    with ConditionalGraft(Graft(["L0"]), "prompt").applied(pair):
        assert not torch.equal(pair.target.hf(ids).logits, plain)
        with pytest.raises(UsageError, match="holds copies"):
            pair.target.bridge(ids)
    torch.testing.assert_close(pair.target.bridge(ids), plain, atol=1e-4, rtol=1e-4)
    assert interventions_on(pair.target.hf) == []


def test_two_pairs_that_share_a_target(random_model: Any) -> None:
    target = random_model(1)
    one, other = make_pair(random_model(0), target, "one"), make_pair(random_model(2), target, "other")
    before, ids = target.fingerprint, torch.tensor([[1, 20, 21]])
    with ConditionalGraft(Graft(["L0.mlp"]), "prompt").applied(one):
        target.hf(ids)
        with pytest.raises(UsageError, match="enter its block inside"), Graft(["L0.mlp"]).applied(other):
            pass
    assert target.fingerprint == before
    first, second = Graft(["L0"]).applied(one), Graft(["L0"]).applied(other)
    first.__enter__()
    second.__enter__()
    with pytest.raises(UsageError, match="nest"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert target.fingerprint == before


def test_a_plain_graft_that_is_left_first_is_restored_all_the_same(random_pair: Pair) -> None:
    before, ids = random_pair.target.fingerprint, torch.tensor([[1, 20, 21]])
    plain = Graft(["L1.mlp"]).applied(random_pair)
    behind = ConditionalGraft(Graft(["L1.mlp"], 0.5), "prompt").applied(random_pair)
    # twice: a block that was left may be entered again
    for _ in range(2):
        plain.__enter__()
        behind.__enter__()
        random_pair.target.hf(ids)
        with pytest.raises(UsageError, match="nest"):
            plain.__exit__(None, None, None)
        behind.__exit__(None, None, None)
        assert random_pair.target.fingerprint == before and random_pair.applied == []
    # one that writes other weights is entered inside, and may be left after it
    inside = Graft(["L0"]).applied(random_pair)
    behind.__enter__()
    inside.__enter__()
    random_pair.target.hf(ids)
    behind.__exit__(None, None, None)
    inside.__exit__(None, None, None)
    assert random_pair.target.fingerprint == before and random_pair.applied == [] and guard.depth == 0


def test_a_switch_that_fails_midway_leaves_nothing_half_written(
    random_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, ids = random_pair.target.fingerprint, torch.tensor([[1, 20, 21]])
    plain, calls = random_pair.target.hf(ids).logits, []
    with Graft(["L0"]).applied(random_pair):
        grafted = random_pair.target.hf(ids).logits
    write = conditional.write

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        write(*arguments)

    monkeypatch.setattr(conditional, "write", failing)
    with ConditionalGraft(Graft(["L0"]), "prompt").applied(random_pair):
        with pytest.raises(MemoryError):
            random_pair.target.hf(ids)
        assert random_pair.target.fingerprint == before
        assert torch.equal(random_pair.target.hf(ids).logits, grafted)
    assert torch.equal(random_pair.target.hf(ids).logits, plain)


def test_a_ctrl_c_during_a_switch_is_raised_once(random_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    before, ids, calls = random_pair.target.fingerprint, torch.tensor([[1, 20, 21]]), []
    write = conditional.write

    def interrupted(*arguments: Any) -> None:
        write(*arguments)
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(conditional, "write", interrupted)
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ConditionalGraft(Graft(["L0"]), "prompt").applied(random_pair):
            with pytest.raises(KeyboardInterrupt):
                random_pair.target.hf(ids)
            random_pair.target.hf(ids)
    finally:
        signal.signal(signal.SIGINT, kept)
    assert random_pair.target.fingerprint == before and guard.depth == 0 and not guard.pending


def test_without_a_cache_the_prompt_cannot_be_told(random_pair: Pair) -> None:
    with (
        ConditionalGraft(Graft(["L0"]), "decoding").applied(random_pair),
        pytest.raises(UsageError, match="cannot be told"),
    ):
        random_pair.target.hf.generate(torch.tensor([[1, 20]]), use_cache=False, max_new_tokens=2)
