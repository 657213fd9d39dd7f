"""Passes that begin at the layer that changed are equal to whole ones, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, random_pair_of

import mechtransplant as mt
from mechtransplant.evaluation import gold_outcomes, gold_scores
from mechtransplant.evaluation.resumed import remembering, resuming
from mechtransplant.grafting import Graft
from mechtransplant.patching import Patch


@pytest.fixture(scope="module")
def questions() -> Any:
    task = mt.load_task("addition")
    return task.split(12, 1, 1).discover


def same(found: Any, expected: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_of_every_architecture(architecture: str, generations: Any, questions: Any) -> None:
    pair = random_pair_of(architecture, generations.target.tokenizer)
    with remembering(pair.target) as memory:
        base = gold_outcomes(pair.target, questions, 5)
    assert memory.usable and same(base, gold_outcomes(pair.target, questions, 5))
    for layer in range(pair.layout.layers):
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


def test_layers_below_do_not_run(generations: Any, questions: Any) -> None:
    target, ran = generations.target, []
    blocks = [target.hf.get_submodule(target.layout.block(n)) for n in range(4)]
    with remembering(target) as memory:
        gold_scores(target, questions)
    hooks = [b.mlp.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, b in enumerate(blocks)]
    try:
        with resuming(target, memory, 2):
            gold_scores(target, questions)
    finally:
        for hook in hooks:
            hook.remove()
    assert set(ran) == {2, 3}
    assert all("forward" not in b.__dict__ for b in blocks)


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


@pytest.mark.parametrize("kv", ["never", "whole-group"])
def test_rules_that_try_grafts_are_as_without_it(
    generations: Any, questions: Any, kv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = mt.rank_modules(generations, questions, "single_swap", ("head", "mlp"), kv=kv)
    base = gold_scores(generations.target, questions)[1].mean()
    for row in found.itertuples():
        with Graft([row.module], kv=kv).applied(generations):
            assert row.score == gold_scores(generations.target, questions)[1].mean() - base
    choose = mt.load_task("addition").split(1, 16, 1).choose
    options: Any = {"kind": "linear", "pool": 4, "stop": 6}
    quick = mt.rank_modules(generations, choose, "greedy", **options)
    from mechtransplant.evaluation import resumed

    monkeypatch.setattr(resumed, "_shares_parameters", lambda blocks: True)
    whole = mt.rank_modules(generations, choose, "greedy", **options)
    assert list(quick.module) == list(whole.module)


def test_blocks_that_share_parameters_are_computed_whole(random_model: Any, questions: Any) -> None:
    model = random_model()
    model.hf.model.layers[1].mlp.up_proj.weight = model.hf.model.layers[0].mlp.up_proj.weight
    with remembering(model) as memory:
        gold_scores(model, questions)
    assert not memory.usable
