"""Rows leave a batch when they have ended, and prompts are read once for grafts that leave the lower layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from test_forked import deep

import mechtransplant as mt
from mechtransplant.evaluation import evaluate, evaluate_budgets, generate
from mechtransplant.evaluation.forked import forking, resuming
from mechtransplant.evaluation.generation import Generation
from mechtransplant.evaluation.remembered import remembering
from mechtransplant.grafting import Graft
from mechtransplant.pair import LanguageModel, Pair
from mechtransplant.patching import Patch
from mechtransplant.tasks import Task

Build = Callable[..., LanguageModel]


@contextmanager
def passes_of(model: LanguageModel) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of every pass of the model; its layers have no hooks of ours."""
    seen: list[tuple[int, int]] = []

    def look(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(tuple((keywords["input_ids"] if "input_ids" in keywords else inputs[0]).shape))

    handle = model.hf.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def mixed(n: int = 32) -> Task:
    """Answers of one to twelve characters."""
    examples = [e for name in ("addition", "copy", "max", "sort") for e in mt.load_task(name, n // 4)]
    return Task("mixed", tuple(examples), max_new_tokens=14)


def one_by_one(model: LanguageModel, task: Task, budget: int | None = None) -> list[Generation]:
    return [generate(model, task.subset([i]), budget, 1)[0] for i in range(len(task))]


def test_rows_that_have_ended_leave_their_batch(generations: Pair) -> None:
    model, task = generations.source, mixed()
    single = one_by_one(model, task)
    lengths = [len(g.tokens) for g in single]
    assert len(set(lengths)) > 3 and all(g.ended for g in single)
    with passes_of(model) as seen:
        assert generate(model, task, batch_size=32) == single
    rows, tokens = zip(*seen, strict=True)
    assert set(tokens[1:]) == {1} and len(seen) == max(lengths)
    assert list(rows) == sorted(rows, reverse=True) and len(set(rows)) > 3
    # at every step at least the rows that are not done, and at most a third more
    for step, row in enumerate(rows):
        going = sum(n > step for n in lengths)
        assert going <= row <= going / 0.75 + 1e-9


def test_rows_stay_where_hooks_or_patches_see_the_layers(generations: Pair) -> None:
    model, task = generations.target, mixed()
    plain = generate(model, task, batch_size=32)
    seen = []
    mlp = model.hf.get_submodule(f"{model.layout.block(1)}.mlp")
    handle = mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    try:
        assert generate(model, task, batch_size=32) == plain
    finally:
        handle.remove()
    assert set(seen) == {32} and len(seen) == max(len(g.tokens) for g in plain)
    with Patch(["L1.mlp"]).applied(generations), passes_of(model) as passes:
        patched = generate(model, task, batch_size=32)
        assert patched == one_by_one(model, task)
    assert patched != plain and {rows for rows, _ in passes[: max(len(g.tokens) for g in patched)]} == {32}


@pytest.mark.parametrize("stops", [("sort", "8"), ("k", "zx"), ("never",)])
def test_a_stop_ends_a_text(random_model: Build, generations: Pair, stops: tuple[str, ...]) -> None:
    for model in (random_model(3), generations.target):
        task = replace(mixed(16), max_new_tokens=24)
        whole = generate(model, task)
        stopped = replace(task, stop=stops)
        with passes_of(model) as seen:
            found = generate(model, stopped)
        assert found == one_by_one(model, stopped)
        for short, long in zip(found, whole, strict=True):
            steps = long.steps(model.tokenizer, stops)
            assert short.tokens == long.tokens[:steps]
            assert short.text(model.tokenizer, stops) == long.text(model.tokenizer, stops)
        assert len(seen) == max(len(g.tokens) for g in found)
        if stops != ("never",):
            assert sum(len(g.tokens) for g in found) < sum(len(g.tokens) for g in whole)


def test_a_stop_gives_the_verdicts_of_every_budget(random_model: Build) -> None:
    model, task = random_model(3), replace(mixed(16), scorer="number", stop=("sort", "8"))
    results = evaluate_budgets(model, task, [1, 3, 9, 24])
    for budget, found in results.items():
        again = evaluate(model, task, "generate", budget)
        assert again.texts == found.texts and (again.ended == found.ended).all()


def with_shots(task: Task) -> Task:
    shots = (("12+25=", "37"), ("copy abc=", "abc"), ("max 11 22 33=", "33"))
    return replace(task, format=mt.PromptFormat(shots=shots, shot_separator=" "))


@contextmanager
def runs_of(model: LanguageModel, layer: int) -> Iterator[list[int]]:
    """Tokens a row that a layer's attention was given: what is not there ran nowhere."""
    seen: list[int] = []
    block = model.hf.get_submodule(model.layout.block(layer))
    child = next(m for m in block.children() if any(True for _ in m.parameters()))
    forward = child.forward

    def look(*inputs: Any, **keywords: Any) -> Any:
        hidden = inputs[0] if inputs else keywords["hidden_states"]
        seen.append(hidden.shape[1])
        return forward(*inputs, **keywords)

    child.forward = look
    try:
        yield seen
    finally:
        del child.forward


@pytest.mark.filterwarnings("ignore:prompt and answer have:UserWarning")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_graft_reads_prompts_from_its_layer_on(architecture: str, shared: bool, generations: Pair) -> None:
    pair = deep(architecture, generations.target.tokenizer)
    target = pair.target
    task = replace(mixed(12), max_new_tokens=6, short_answer=False)
    task = with_shots(task) if shared else task
    with remembering(target) as memory:
        base = evaluate(target, task, "generate", batch_size=5)
    assert memory.usable and base.texts == evaluate(target, task, "generate", batch_size=5).texts
    for layer in (1, 3):
        with Graft([f"L{layer}"]).applied(pair):
            whole = evaluate(target, task, "generate", batch_size=5)
            with resuming(target, memory, layer), runs_of(target, layer - 1) as below, runs_of(target, layer) as above:
                found = evaluate(target, task, "generate", batch_size=5)
        # below the graft the steps alone run
        assert set(below) == {1} and max(above) > 10
        assert found.texts == whole.texts
        for name in ("correct", "log_probability", "logit_difference"):
            assert (getattr(found, name) == getattr(whole, name)).all()
    assert evaluate(target, task, "generate", batch_size=5).texts == base.texts


def test_texts_of_grafts_differ_and_are_those_of_whole_passes(generations: Pair) -> None:
    target, task = generations.target, with_shots(mixed(24))
    with remembering(target) as memory:
        base = generate(target, task, batch_size=7)
    texts = []
    for module in ("L1", "L2H3", "L3.mlp"):
        with Graft([module], kv="group").applied(generations):
            texts.append(generate(target, task, batch_size=7))
            with resuming(target, memory, int(module[1])):
                assert generate(target, task, batch_size=7) == texts[-1]
        with forking(target, memory, int(module[1]), [Graft([module], kv="group").applied(generations)]):
            assert generate(target, task, batch_size=7) == texts[-1]
    assert any(t != base for t in texts)


def test_several_variants_write_no_text_together(generations: Pair) -> None:
    target, task = generations.target, mixed(8)
    with remembering(target) as memory:
        generate(target, task)
    variants = [Graft([m], kv="group").applied(generations) for m in ("L2H1", "L2H2")]
    with forking(target, memory, 2, variants), pytest.raises(RuntimeError, match="generate under one at a time"):
        generate(target, task)
    assert torch.isfinite(torch.tensor(evaluate(target, task, "generate").log_probability)).all()
