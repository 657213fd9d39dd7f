"""Shifts equal slow, explicit definitions on every architecture; batches, padding and order change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import random_pair_of
from scipy import stats

from mechtransplant.activations import cache_activations
from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.evaluation.batches import encode
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.shifts import (
    MEASURES,
    average_by_template,
    measure_shifts,
    shift_vectors,
    shifts_and_vectors,
    summarize_shifts,
)
from mechtransplant.significance import test_shifts as table_of
from mechtransplant.tasks import Example, Task, load_task

#: the issue's list; grouped-query heads in all that have them
SUPPORTED = ["llama", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "gpt2", "neox"]
DIRECT = ("magnitude", "distance", "own", "inherited")


@pytest.fixture(params=SUPPORTED)
def pair(request: pytest.FixtureRequest, generations: Pair) -> Pair:
    return random_pair_of(request.param, generations.target.tokenizer)


@pytest.fixture(scope="module")
def task() -> Task:
    """Prompts of unequal length, with answers."""
    examples = [*load_task("addition", 3).examples, *load_task("max", 3).examples, *load_task("reverse", 2).examples]
    task = Task("mixed", tuple(examples))
    return task


# --- slow definitions -------------------------------------------------------------------------------------------------


def outputs(hf: Any, layout: Any, ids: list[int]) -> dict[str, torch.Tensor]:
    """Every module's explicit output on one text, without padding: address → (position, width)."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for address, name in layout.linears.items():
        linear = hf.get_submodule(name)
        handles.append(
            linear.register_forward_hook(
                lambda m, i, o, a=address: seen.update({a: o[0], a + " in": i[0][0]})  # type: ignore[misc]
            )
        )
    with torch.no_grad():
        hf(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    found = {a: seen[a] for a in layout.linears}
    for layer in range(layout.layers):
        attention, mlp = layout.attention_output(layer), layout.mlp_output(layer)
        found[f"L{layer}.attn"], found[f"L{layer}.mlp"] = seen[attention], seen[mlp]
        weight = hf.get_submodule(layout.linears[attention]).weight
        inward = weight if type(hf.get_submodule(layout.linears[attention])).__name__ == "Conv1D" else weight.T
        for head in range(layout.heads):
            columns = slice(head * layout.d_head, (head + 1) * layout.d_head)
            found[f"L{layer}H{head}"] = seen[attention + " in"][:, columns] @ inward[columns]
        weight = hf.get_submodule(layout.linears[mlp]).weight
        inward = weight if type(hf.get_submodule(layout.linears[mlp])).__name__ == "Conv1D" else weight.T
        for neuron in range(len(inward)):
            found[f"L{layer}N{neuron}"] = seen[mlp + " in"][:, neuron : neuron + 1] * inward[neuron]
    return found


def hybrid(pair: Pair, prefix: str) -> Any:
    """The target with the parameters under one name prefix taken from the source."""
    model = copy.deepcopy(pair.target.hf)
    ours, theirs = dict(model.named_parameters()), pair.source_parameters
    with torch.no_grad():
        for name, parameter in ours.items():
            if name.startswith(prefix):
                parameter.copy_(theirs[name])
    return model


def moved_outputs(pair: Pair, address: str, ids: list[int]) -> torch.Tensor:
    """f^S(x^T): in a target whose one block is the source's, the block's input is still the target's own."""
    layout = pair.layout
    layer = int(address[1:].replace("H", ".").replace("N", ".").split(".")[0])
    if address in layout.linears:
        prefix = layout.linears[address]
    elif address.endswith("mlp") or "N" in address:
        prefix = layout.linears[layout.mlp_output(layer)].rsplit(".", 1)[0] + "."
    else:
        prefix = layout.linears[layout.attention_output(layer)].rsplit(".", 1)[0] + "."
    return outputs(hybrid(pair, prefix), layout, ids)[address]


def slow_values(pair: Pair, address: str, ids: list[int], span: slice) -> dict[str, float]:
    """Every direct measure of one module on one text, from the contract's definitions."""
    a_s, a_t = (outputs(m.hf, pair.layout, ids)[address][span] for m in (pair.source, pair.target))
    moved = moved_outputs(pair, address, ids)[span]
    scale = (a_s.norm(dim=-1) + a_t.norm(dim=-1)) / 2
    if "N" in address:
        # what all neurons of the layer write
        names = pair.layout.neurons_of(int(address[1:].split("N")[0]))
        alls = [outputs(m.hf, pair.layout, ids) for m in (pair.source, pair.target)]
        scale = sum(sum(found[n] for n in names)[span].norm(dim=-1) for found in alls) / 2  # type: ignore[index]
    return {
        "magnitude": float((a_s.abs().mean(-1) - a_t.abs().mean(-1)).mean()),
        "distance": float(((a_s - a_t).norm(dim=-1) / scale).mean()),
        "own": float(((moved - a_t).norm(dim=-1) / scale).mean()),
        "inherited": float(((a_s - moved).norm(dim=-1) / scale).mean()),
    }


def test_every_measure_equals_its_definition(pair: Pair, task: Task) -> None:
    kinds = ("head", "neuron", "attn", "mlp", "linear")
    shifts = measure_shifts(pair, task, kinds, DIRECT, "answer", batch_size=3)
    indexed = shifts.set_index(["module", "prompt", "measure"]).value
    encoded = encode(task, pair.target.tokenizer)
    addresses = [
        "L0H1",
        "L1H0",
        "L1H3",
        "L0N0",
        "L1N47",
        "L1N13",
        "L0.attn",
        "L1.attn",
        "L1.mlp",
        pair.modules("linear")[-2],
    ]
    for address in addresses:
        for prompt in (0, 4):
            ids = encoded.prompts[prompt] + encoded.completions[prompt][:-1]
            span = slice(len(encoded.prompts[prompt]) - 1, len(ids))
            for measure, expected in slow_values(pair, address, ids, span).items():
                assert indexed[address, prompt, measure] == pytest.approx(expected, rel=1e-4, abs=1e-5), (
                    address,
                    measure,
                )
    wide = shifts.pivot(index=["module", "prompt"], columns="measure", values="value")
    assert (wide.distance <= wide.own + wide.inherited + 1e-5).all()
    assert (wide[["distance", "own", "inherited"]] >= 0).all(axis=None)


def test_batch_size_padding_side_and_order_change_nothing(pair: Pair, task: Task) -> None:
    def values(t: Task = task, **options: Any) -> np.ndarray:
        frame = measure_shifts(pair, t, ("head", "neuron", "attn", "mlp", "linear"), MEASURES[:5], **options)
        return frame.pivot(index=["measure", "module"], columns="prompt", values="value").to_numpy()

    reference = values(batch_size=1)
    for size, side in ((8, "left"), (8, "right"), (3, "left"), (3, "right")):
        np.testing.assert_allclose(values(batch_size=size, padding_side=side), reference, atol=1e-5)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    np.testing.assert_allclose(values(task.subset(order), batch_size=8), reference[:, order], atol=1e-5)


def test_head_writes_by_factor_equal_the_explicit_product(pair: Pair) -> None:
    from mechtransplant.shifts.heads import HeadWrites, Written

    writes = HeadWrites.of(pair, 1)
    torch.manual_seed(0)
    z_source, z_target = torch.randn(2, 50, pair.layout.heads, pair.layout.d_head)
    source = torch.einsum("chd,hdm->chm", z_source, pair.source.output_weights(1))
    target = torch.einsum("chd,hdm->chm", z_target, pair.target.output_weights(1))
    close: Callable[..., None] = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    z_moved = torch.randn(z_source.shape)
    moved = torch.einsum("chd,hdm->chm", z_moved, pair.source.output_weights(1))
    norms = {"distance": source - target, "own": moved - target, "inherited": source - moved}
    found = writes.norms(z_source, z_target, z_moved)
    for name, vectors in norms.items():
        close(found[name], vectors.norm(dim=-1))
    written, output = Written.of(z_source.flatten(1), pair.source.output_weights(1))
    close(written.sums, source.abs().sum(-1))
    close(written.norms, source.norm(dim=-1))
    close(output, source.sum(1))
    # inner products of large vectors, as cosines: what cancels is not compared with what is left
    mine, explicit = (
        torch.nn.functional.normalize(v, dim=-1) for v in (writes.difference(z_source, z_target), source - target)
    )
    close(torch.einsum("chw,ehw->hce", mine, mine), torch.einsum("chm,ehm->hce", explicit, explicit))


def test_head_writes_equal_transformer_lens(generations: Pair, task: Task) -> None:
    """The residual write that TransformerLens computes itself, at every position."""
    bridge, model = generations.target.bridge, generations.target
    cache = cache_activations(model, task, ["attn.hook_result"])
    bridge.set_use_attn_result(True)
    try:
        ids = torch.tensor([encode(task, model.tokenizer).prompts[0]])
        _, theirs = bridge.run_with_cache(ids, names_filter="blocks.2.attn.hook_result")
    finally:
        bridge.set_use_attn_result(False)
    ours = cache.prompt(0, "blocks.2.attn.hook_result")
    torch.testing.assert_close(ours, theirs["blocks.2.attn.hook_result"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["all", "last", "answer"])
def test_streamed_shifts_equal_cached_activations(generations: Pair, task: Task, positions: Any) -> None:
    hooks = ("attn.hook_result", "hook_mlp_out")
    source, target = (cache_activations(m, task, hooks, positions) for m in (generations.source, generations.target))
    shifts = measure_shifts(generations, task, ("head", "mlp"), ("magnitude", "distance"), positions)
    indexed = shifts.set_index(["measure", "module", "prompt"]).value
    for prompt in range(len(task)):
        for layer in range(4):
            for name, address in ((f"blocks.{layer}.attn.hook_result", None), (f"blocks.{layer}.hook_mlp_out", "mlp")):
                a_s, a_t = (
                    c.prompt(prompt, name).reshape(len(c.prompt(prompt, name)), -1, 128) for c in (source, target)
                )
                magnitude = (a_s.abs().mean(-1) - a_t.abs().mean(-1)).mean(0)
                scale = (a_s.norm(dim=-1) + a_t.norm(dim=-1)) / 2
                distance = ((a_s - a_t).norm(dim=-1) / scale).mean(0)
                for at in range(len(magnitude)):
                    module = f"L{layer}H{at}" if address is None else f"L{layer}.mlp"
                    assert indexed["magnitude", module, prompt] == pytest.approx(float(magnitude[at]), abs=1e-5)
                    assert indexed["distance", module, prompt] == pytest.approx(float(distance[at]), abs=1e-5)


# --- directions -------------------------------------------------------------------------------------------------------


def explicit_shift_vectors(pair: Pair, task: Task, address: str) -> np.ndarray:
    rows = []
    for prompt in encode(task, pair.target.tokenizer).prompts:
        a_s, a_t = (outputs(m.hf, pair.layout, prompt)[address] for m in (pair.source, pair.target))
        rows.append((a_s - a_t).mean(0).double().numpy())
    return np.array(rows)


@pytest.mark.parametrize("address", ["L1H2", "L2H7", "L3.mlp", "L1.attn", "L2N11"])
def test_alignment_and_projection_equal_their_definitions(generations: Pair, task: Task, address: str) -> None:
    vectors = shift_vectors(generations, task, ("head", "mlp", "attn", "neuron"))
    explicit = explicit_shift_vectors(generations, task, address)
    np.testing.assert_allclose(vectors.gram(address), explicit @ explicit.T, rtol=1e-4, atol=1e-5)
    cosines = []
    for i, row in enumerate(explicit):
        others = np.delete(explicit, i, 0).mean(0)
        cosines.append(row @ others / np.linalg.norm(row) / np.linalg.norm(others))
    np.testing.assert_allclose(vectors.alignment(address), cosines, atol=1e-5)
    fit, project = vectors.halves(3)
    assert sorted([*fit, *project]) == list(range(len(task)))
    direction = explicit[fit].mean(0)
    expected = explicit[project] @ direction / np.linalg.norm(direction)
    frame = measure_shifts(generations, task, ("head", "mlp", "attn", "neuron"), "projection", seed=3)
    found = frame[frame.module == address].set_index("prompt").value
    assert list(found.index) == list(project), "the half that fixed the direction is not tested"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    table = table_of(frame)
    assert (table.test == "direction").all() and (table.n == len(project)).all()


# --- exact zeros ------------------------------------------------------------------------------------------------------


def test_a_model_does_not_shift_from_itself(generations: Pair, task: Task) -> None:
    itself = make_pair(
        generations.target, LanguageModel("copy", generations.target.hf, generations.target.tokenizer), "self"
    )
    shifts = measure_shifts(itself, task, ("head", "mlp", "attn", "linear", "neuron"), DIRECT)
    assert (shifts.value == 0).all() and len(shifts) == 4 * 8 * (32 + 4 + 4 + 28 + 4 * 384)
    vectors = shift_vectors(itself, task)
    assert np.isnan(vectors.alignment("L0H0")).all() and not vectors.gram("L0.mlp").any()


def test_one_model_object_on_both_sides(generations: Pair, task: Task) -> None:
    shifts = measure_shifts(make_pair(generations.target, generations.target, "one"), task, measures=DIRECT)
    assert (shifts.value == 0).all() and not any(m._forward_hooks for m in generations.target.hf.modules())


def test_decoding_positions_read_one_text(generations: Pair, task: Task) -> None:
    frames = [
        measure_shifts(generations, task, "mlp", "distance", "decoding", text=t) for t in ("target", "source", "gold")
    ]
    answers = measure_shifts(generations, task, "mlp", "distance", "answer")
    np.testing.assert_allclose(frames[2].value, answers.value)
    assert not np.allclose(frames[0].value, frames[1].value)


def is_as_it_was(pair: Pair) -> bool:
    """No hook is left on either model, and every module has its own forward."""
    modules = [module for model in (pair.source, pair.target) for module in model.hf.modules()]
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


def test_hooks_are_gone_afterwards(generations: Pair, task: Task) -> None:
    measure_shifts(generations, task)
    assert is_as_it_was(generations)


def test_hooks_are_gone_after_a_failure(generations: Pair, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechtransplant.shifts.collector import Collector

    def fails(*_: Any) -> None:
        raise RuntimeError("cut off")

    monkeypatch.setattr(Collector, "_values", fails)
    with pytest.raises(RuntimeError, match="cut off"):
        measure_shifts(generations, task)
    assert is_as_it_was(generations)


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_either_model_may_fail_while_the_other_waits(generations: Pair, task: Task, role: str, error: Any) -> None:
    expected = measure_shifts(generations, task)

    def fails(*_: Any) -> None:
        raise error

    hook = getattr(generations, role).hf.model.layers[2].register_forward_pre_hook(fails)
    try:
        with pytest.raises(error):
            measure_shifts(generations, task)
    finally:
        hook.remove()
    assert is_as_it_was(generations)
    pd.testing.assert_frame_equal(measure_shifts(generations, task), expected)


# --- what is wrong is said --------------------------------------------------------------------------------------------


def test_wrong_arguments(generations: Pair, task: Task) -> None:
    with pytest.raises(UnknownNameError, match="did you mean head"):
        measure_shifts(generations, task, "heads")
    with pytest.raises(UnknownNameError, match="did you mean magnitude"):
        measure_shifts(generations, task, measures=["magnitud"])
    with pytest.raises(UnknownNameError, match="unknown positions"):
        measure_shifts(generations, task, positions="first")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no measure was named"):
        measure_shifts(generations, task, measures=[])
    with pytest.raises(UsageError, match="at least two"):
        measure_shifts(generations, task.subset([0]), measures="alignment")
    with pytest.raises(UsageError, match="batch_size"):
        measure_shifts(generations, task, batch_size=0)
    with pytest.raises(UsageError, match="kinds that were asked"):
        shift_vectors(generations, task, "mlp").of("L0H0")


def test_one_pass_gives_both(generations: Pair, task: Task) -> None:
    shifts, vectors = shifts_and_vectors(generations, task, measures=("own", "projection"), seed=3)
    apart = measure_shifts(generations, task, measures=("own", "projection"), seed=3)
    pd.testing.assert_frame_equal(shifts, apart)
    np.testing.assert_array_equal(vectors.gram("L2H3"), shift_vectors(generations, task).gram("L2H3"))


def test_what_is_no_pair_or_no_task(generations: Pair, task: Task) -> None:
    for arguments in ((generations, "addition"), ("family/generations", task), (task, generations)):
        with pytest.raises(UsageError, match=r"expected a (pair|task)"):
            measure_shifts(*arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected a pair"):
        shift_vectors(generations.target, task)  # type: ignore[arg-type]
    for change in ({"seed": -1}, {"batch_size": "4"}, {"padding_side": "middle"}, {"max_new_tokens": 0}):
        with pytest.raises(UsageError, match=r"seed|batch_size|padding side|max_new_tokens"):
            measure_shifts(generations, task, positions="decoding", **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="kind of module"):
        measure_shifts(generations, task, None)  # type: ignore[arg-type]


def test_two_dtypes_cannot_be_moved(generations: Pair, task: Task) -> None:
    mixed = random_pair_of("llama", generations.target.tokenizer)
    mixed.source.hf.to(torch.bfloat16)
    assert len(measure_shifts(mixed, task, "mlp", "distance")) == 2 * len(task)
    with pytest.raises(UsageError, match="load both alike"):
        measure_shifts(mixed, task, "mlp", "own")


def test_bfloat16_is_measured_in_float32(generations: Pair, task: Task) -> None:
    """Against the same bfloat16 numbers computed in float32: bfloat16 keeps three digits, and sums lose none."""
    half = random_pair_of("llama", generations.target.tokenizer)
    for model in (half.source, half.target):
        model.hf.to(torch.bfloat16)
    found = measure_shifts(half, task, ("head", "mlp"), DIRECT)
    for model in (half.source, half.target):
        model.hf.to(torch.float32)
    whole = measure_shifts(half, task, ("head", "mlp"), DIRECT)
    assert np.isfinite(found.value).all()
    assert np.median(np.abs(found.value - whole.value)) < 0.03


def test_no_room_for_vectors() -> None:
    from mechtransplant.shifts.vectors import ShiftVectors

    with pytest.raises(UsageError, match="no room for"):
        ShiftVectors.empty({"L0H0": 10**13}, 1)


def test_mlps_without_a_module_cannot_be_moved(generations: Pair, task: Task) -> None:
    opt = random_pair_of("opt", generations.target.tokenizer)
    assert len(measure_shifts(opt, task, ("head", "mlp"), ("magnitude", "distance"))) == 2 * 8 * (8 + 2)
    assert len(measure_shifts(opt, task, ("head", "linear"), "own")) == 8 * (8 + 12)
    with pytest.raises(UsageError, match="no module for its MLPs"):
        measure_shifts(opt, task, "mlp", "own")


def test_broken_weights_are_said(generations: Pair, task: Task) -> None:
    broken = random_pair_of("llama", generations.target.tokenizer)
    with torch.no_grad():
        broken.source_parameters["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"L1\.mlp has activations that are NaN"):
        measure_shifts(broken, task, "mlp")


def test_templates_can_be_the_unit(generations: Pair) -> None:
    task = load_task("addition").split(12, 8, 8).discover
    shifts = measure_shifts(generations, task)
    by_template = average_by_template(shifts, task)
    assert set(by_template.prompt) == {0, 1} and len(by_template) == 2 * 36 * 3
    names = sorted({e.template for e in task})
    first = [i for i, e in enumerate(task) if e.template == names[0]]
    rows = shifts[(shifts.module == "L2.mlp") & (shifts.measure == "own") & shifts.prompt.isin(first)]
    found = by_template[(by_template.module == "L2.mlp") & (by_template.measure == "own") & (by_template.prompt == 0)]
    assert float(found.value.iloc[0]) == pytest.approx(rows.value.mean())
    with pytest.raises(UsageError, match="both sides"):
        average_by_template(measure_shifts(generations, task, measures="projection"), task)
    with pytest.raises(UsageError, match="give the task that was measured"):
        average_by_template(shifts.assign(prompt=shifts.prompt - 1), task)
    assert len(average_by_template(shifts.assign(head=np.nan), task)) == len(by_template)
    with pytest.raises(UsageError, match="template"):
        average_by_template(shifts, replace(task, examples=(Example("1+1=", "2"), *task.examples[:0])))


def test_nothing_is_held_but_what_has_yet_to_meet(generations: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models go in turns: of all layers one module's tensors are held, whatever the number of prompts."""
    from mechtransplant.shifts.recorder import PairRecorder

    arrive, held = PairRecorder._arrive, []

    def counted(self: Any, slot: Any, tensor: Any) -> None:
        arrive(self, slot, tensor)
        held.append((len(self.kept), len(self.moved)))

    monkeypatch.setattr(PairRecorder, "_arrive", counted)
    for positions in ("all", "last"):
        measure_shifts(generations, load_task("addition", 160), positions=positions, batch_size=16)  # type: ignore[arg-type]
    # 4 layers, heads and MLP; target's, moved and source's; ten batches, twice. The moved one comes last
    assert len(held) == 4 * 2 * 3 * 10 * 2 and [max(of) for of in zip(*held, strict=True)] == [1, 0]
    held.clear()
    measure_shifts(generations, load_task("addition", 16), measures="distance")
    assert len(held) == 4 * 2 * 2 and set(held) == {(0, 0)}


def test_few_positions_and_all_are_one_measure(generations: Pair, task: Task) -> None:
    """Writes of whole layers where most positions count, coordinates of z where few do."""
    from mechtransplant.shifts import recorder

    whole = measure_shifts(generations, task, measures=MEASURES[:5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "_is_plain", lambda linear: False)
        by_z = measure_shifts(generations, task, measures=MEASURES[:5])
    np.testing.assert_allclose(whole.value, by_z.value, atol=2e-6)
    assert not (whole.value == by_z.value).all()


def test_frames_are_tidy_and_aligned(generations: Pair, task: Task) -> None:
    shifts = measure_shifts(generations, task)
    assert list(shifts) == ["module", "kind", "layer", "head", "prompt", "measure", "value"]
    assert list(dict.fromkeys(shifts.module)) == [*generations.modules("head"), *generations.modules("mlp")]
    assert list(dict.fromkeys(shifts.measure)) == ["magnitude", "distance", "own"]
    assert shifts.groupby(["module", "measure"]).size().eq(len(task)).all()
    assert isinstance(shifts, pd.DataFrame)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_summary_is_the_summary_of_all_values(generations: Pair, addition: Task, batch_size: int) -> None:
    task = addition.subset(range(23))
    measures = ("magnitude", "distance", "own")
    every = measure_shifts(generations, task, measures=measures, positions="answer", batch_size=batch_size)
    found = summarize_shifts(generations, task, measures=measures, positions="answer", batch_size=batch_size)
    by = every.groupby(["measure", "module"], observed=True, sort=False).value
    keys = list(zip(found.measure, found.module, strict=True))
    assert len(keys) == len(measures) * len(generations.modules(("head", "mlp"))) and (found.n == 23).all()
    for column, expected in (
        ("mean", by.mean()), ("sd", by.std()), ("se", by.sem()), ("smallest", by.min()), ("largest", by.max()),
    ):  # fmt: skip
        np.testing.assert_allclose(found[column], expected.reindex(keys), rtol=1e-9, atol=1e-12)
    one = every[(every.measure == "own") & (every.module == "L2H1")].value
    low, high = stats.t.interval(0.95, 22, one.mean(), one.sem())
    row = found[(found.measure == "own") & (found.module == "L2H1")].iloc[0]
    np.testing.assert_allclose([row.low, row.high], [low, high], rtol=1e-9)


def test_a_summary_of_one_prompt_has_no_spread(generations: Pair, addition: Task) -> None:
    found = summarize_shifts(generations, addition.subset([0]), measures="distance")
    assert found[["sd", "se", "low", "high"]].isna().all().all() and (found.smallest == found["mean"]).all()
    with pytest.raises(UsageError, match="alignment compares prompts with each other: use measure_shifts"):
        summarize_shifts(generations, addition, measures="alignment")
