"""Rows leave a batch when they have ended, and prompts are read once for grafts that leave the lower layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
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
    """(rows, tokens) of every pass of the model, which has no hooks of ours."""
    seen: list[tuple[int, int]] = []
    forward = model.hf.forward

    @wraps(forward)
    def look(*inputs: Any, **keywords: Any) -> Any:
        seen.append(tuple((keywords["input_ids"] if "input_ids" in keywords else inputs[0]).shape))
        return forward(*inputs, **keywords)

    model.hf.forward = look
    try:
        yield seen
    finally:
        del model.hf.forward


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
    model, task = random_model(3), replace(mixed(16), scorer="boxed", stop=("sort", "8"))
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
    assert any(t != base for t in texts)


@pytest.mark.parametrize("modules", [["L2H1"], ["L2H1", "L2H2"]])
def test_passes_that_fork_write_no_text(modules: list[str], generations: Pair) -> None:
    target, task = generations.target, mixed(8)
    with remembering(target) as memory:
        before = generate(target, task)
    variants = [Graft([m], kv="group").applied(generations) for m in modules]
    with forking(target, memory, 2, variants), pytest.raises(RuntimeError, match="generate under one change at a time"):
        generate(target, task)
    assert generate(target, task) == before


def test_rows_that_end_at_once(generations: Pair, random_model: Build) -> None:
    """Remembered, resumed and whole generations have the same batches at every step."""
    target, task = generations.target, mixed(16)
    firsts = [g.tokens[0] for g in generate(target, task)]
    kept = target.hf.generation_config.eos_token_id
    for share in (0.125, 0.5):
        # the end of some texts is their first token
        ends = [*([kept] if isinstance(kept, int) else kept)]
        while sum(t in ends for t in firsts) < share * len(firsts):
            ends.append(next(t for t in firsts if t not in ends))
        target.hf.generation_config.eos_token_id = ends
        try:
            with passes_of(target) as whole:
                texts = generate(target, task)
            assert sum(len(g.tokens) == 1 for g in texts) >= share * len(texts)
            with remembering(target) as memory, passes_of(target) as remembered:
                assert generate(target, task) == texts
            with resuming(target, memory, 2), passes_of(target) as resumed:
                assert generate(target, task) == texts
            assert whole == remembered == resumed
            seen: list[int] = []
            mlp = target.hf.get_submodule(f"{target.layout.block(1)}.mlp")
            handle = mlp.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.shape[0]))
            with remembering(target):
                assert generate(target, task) == texts
            handle.remove()
            assert set(seen) == {16}
        finally:
            target.hf.generation_config.eos_token_id = kept
    assert one_by_one(target, task) == generate(target, task)


def test_a_hook_on_the_output_head_sees_every_row(generations: Pair) -> None:
    model, task, seen = generations.source, mixed(), []
    handle = model.hf.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    try:
        texts = generate(model, task, batch_size=32)
    finally:
        handle.remove()
    assert set(seen) == {32} and texts == generate(model, task, batch_size=32)


def test_keys_and_values_count_as_memory(generations: Pair) -> None:
    target, task = generations.target, mixed(12)
    with remembering(target) as memory:
        generate(target, task)
    outputs = sum(t.numel() * t.element_size() for p in memory.passes for t in p.outputs)
    cached = sum(t.numel() * t.element_size() for p in memory.passes for c in p.begun or [] for t in (c.keys, c.values))
    assert cached > 0 and memory.bytes == outputs + cached
    with remembering(target, limit=outputs + cached - 1) as less:
        again = generate(target, task)
    assert not less.usable and not less.passes and again == generate(target, task)


def test_an_interrupted_generation_leaves_nothing_behind(generations: Pair) -> None:
    target, task = generations.target, mixed(8)
    before = generate(target, task)
    forward, calls = target.hf.forward, [0]

    @wraps(forward)
    def stop(*inputs: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] > 2:
            raise KeyboardInterrupt
        return forward(*inputs, **keywords)

    for _ in range(2):
        calls[0] = 0
        target.hf.forward = stop
        try:
            with remembering(target), pytest.raises(KeyboardInterrupt):
                generate(target, task)
        finally:
            del target.hf.forward
    with remembering(target) as memory:
        assert generate(target, task) == before
    assert memory.usable and len(memory.passes) == 1
    with Graft(["L3.mlp"]).applied(generations):
        after = generate(target, task)
        with resuming(target, memory, 3):
            assert generate(target, task) == after


@pytest.mark.parametrize("options", [{"one_at_a_time": True}, {"device_map": {"": "cpu"}}])
def test_rows_leave_wherever_the_weights_are(options: dict[str, Any], generations: Pair) -> None:
    pair, task = mt.load_pair("family/generations", **options), mixed()
    with passes_of(pair.source) as seen:
        found = generate(pair.source, task, batch_size=32)
    assert found == generate(generations.source, task, batch_size=32)
    assert len({rows for rows, _ in seen}) > 3
