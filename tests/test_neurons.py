"""Neurons as modules: what a graft of them writes, what a patch moves, and that rules score them as they do MLPs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, random_pair_of
from test_forked import close, deep

import mechtransplant as mt
from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.evaluation import GoldOutcomes, gold_outcomes
from mechtransplant.grafting.overlaps import joined
from mechtransplant.pair import Pair
from mechtransplant.patching import patch_effects
from mechtransplant.ranking.strengths import _fitting
from mechtransplant.significance import effects
from mechtransplant.tasks import Task


@pytest.fixture(scope="module")
def questions() -> Task:
    return mt.load_task("addition").split(16, 1, 1).discover


@pytest.fixture(params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, generations: Pair) -> Pair:
    return random_pair_of(request.param, generations.target.tokenizer)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.hf.named_parameters()}


def test_all_neurons_of_a_layer_are_its_mlp_but_for_the_last_bias(pair: Pair) -> None:
    layout = pair.layout
    bias = f"{layout.linears[layout.mlp_output(1)]}.bias"
    before = weights(pair.target)
    with mt.Graft(layout.neurons_of(1)).applied(pair):
        neurons = weights(pair.target)
    with mt.Graft(["L1.mlp"]).applied(pair):
        mlp = weights(pair.target)
    for name, now in neurons.items():
        expected = before[name] if name == bias else mlp[name]
        assert torch.equal(now, expected), name
    assert all(torch.equal(now, before[name]) for name, now in weights(pair.target).items())


def test_a_neuron_moves_what_it_does_and_nothing_else(pair: Pair, questions: Task) -> None:
    """With the source's input and the source's neuron, the target's neuron writes what the source's would."""
    layout, chosen = pair.layout, 5
    last = layout.linears[layout.mlp_output(0)]
    block = last.rsplit(".", 1)[0] if "mlp" in last else layout.block(0)
    torch.manual_seed(0)
    given = torch.randn(3, 4, pair.target.hf.config.hidden_size)

    def activations(model: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = model.hf.get_submodule(last).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        if block.endswith("mlp"):
            model.hf.get_submodule(block)(given)
        else:
            # no module of its own (OPT): the first of its layers, and the activation function
            model.hf.get_submodule(last)(torch.relu(model.hf.get_submodule(f"{block}.fc1")(given)))
        hook.remove()
        return seen[0].reshape(12, -1)

    theirs, ours = activations(pair.source), activations(pair.target)
    with mt.Graft([f"L0N{chosen}"]).applied(pair):
        grafted, columns = activations(pair.target), pair.target.neuron_weights(0).clone()
    others = [n for n in range(layout.neurons_in(0)) if n != chosen]
    torch.testing.assert_close(grafted[:, chosen], theirs[:, chosen])
    torch.testing.assert_close(grafted[:, others], ours[:, others])
    assert torch.equal(columns[chosen], pair.source.neuron_weights(0)[chosen])
    assert torch.equal(columns[others], pair.target.neuron_weights(0)[others])


def test_counts_and_addresses(generations: Pair) -> None:
    layout = generations.layout
    assert layout.neurons == (384,) * 4 and len(generations.modules("neuron")) == 4 * 384
    assert mt.Graft(["L2N3"]).parameter_count(generations) == 3 * 128
    for wrong, said in (
        ("L2N384", r"did you mean .*neurons 0 to 383"),
        ("L4N0", "Layers are 0 to 3"),
        ("L2N", "no.* a module address"),
    ):
        with pytest.raises(UsageError, match=said):
            layout.check(wrong)


def test_neighbours_are_written_as_one_and_as_each(generations: Pair) -> None:
    names = [f"L1N{n}" for n in (3, 4, 5, 9)] + ["L1H0", "L1H1"]
    strengths = [1.5, 1.5, 0.5, 0.5, 1.5, 1.5]
    graft = mt.Graft(names, strengths)
    regions = graft.regions(generations)
    together = joined(regions)
    # gate, up and down of neurons 3–4, 5, 9; q and o of both heads as one
    assert (len(regions), len(together)) == (3 * 4 + 2 * 2, 3 * 3 + 2)
    size = sum(r.of(generations.target_parameters[r.parameter]).numel() for r in together)
    assert size == graft.parameter_count(generations)
    with graft.applied(generations):
        at_once = weights(generations.target)
    # one by one is never joined
    before = weights(generations.target)
    for name, strength in zip(names, strengths, strict=True):
        with mt.Graft([name], strength).applied(generations):
            alone = weights(generations.target)
        for parameter, now in alone.items():
            changed = now != before[parameter]
            assert torch.equal(at_once[parameter][changed], now[changed])


def test_gradient_rules_agree_with_the_mlp_that_neurons_make_up(generations: Pair, questions: Task) -> None:
    for rule in ("gradient", "integrated_gradient"):
        mlps = mt.rank_modules(generations, questions, rule, "mlp").set_index("module").score
        neurons = mt.rank_modules(generations, questions, rule, "neuron")
        sums = neurons.groupby("layer").score.sum()
        np.testing.assert_allclose(sums, [mlps[f"L{layer}.mlp"] for layer in range(4)], rtol=1e-4)
        assert neurons.score.is_monotonic_decreasing and neurons.score.nunique() > 1500
    squares = mt.rank_modules(generations, None, "weight_delta", "neuron").assign(score=lambda f: f.score**2)
    moved = mt.rank_modules(generations, None, "weight_delta", "mlp").set_index("module").score
    np.testing.assert_allclose(
        squares.groupby("layer").score.sum() ** 0.5, [moved[f"L{layer}.mlp"] for layer in range(4)], rtol=1e-5
    )


def test_activation_gradient_is_the_first_order_effect_of_a_patch(generations: Pair, questions: Task) -> None:
    ranked = mt.rank_modules(generations, questions, "activation_gradient", "neuron").set_index("module").score
    names, small = [str(m) for m in ranked.index[[0, 1, -1]]], 0.002
    before = gold_outcomes(generations.target, questions).log_probability.mean()
    for name in names:
        with mt.Patch([name], strength=small).applied(generations):
            after = gold_outcomes(generations.target, questions).log_probability.mean()
        assert (after - before) / small == pytest.approx(ranked[name], rel=0.1, abs=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "neox", "gemma2"])
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_patch_sweeps_are_every_patch_by_itself(
    architecture: str, positions: Any, generations: Pair, questions: Task
) -> None:
    pair = deep(architecture, generations.target.tokenizer)
    modules = ["L0N1", "L0N7", "L2N0", "L3N5", "L1H1"]
    before, after = patch_effects(pair, questions, modules, positions, batch_size=5)
    close(before, gold_outcomes(pair.target, questions, 5))
    for at, module in enumerate(modules):
        with mt.Patch([module], positions, heads="result").applied(pair):
            close(GoldOutcomes(*(values[at] for values in after)), gold_outcomes(pair.target, questions, 5))
    assert len({round(float(x), 9) for x in after.log_probability.mean(1)}) == len(modules)


def test_a_patch_brings_the_sources_activations(generations: Pair) -> None:
    """hook_post of the bridge has the source's numbers at the patched neurons, and the target's at the others."""
    ids = torch.tensor([[1, 5, 9, 4]])
    names = [f"L2N{n}" for n in (0, 7, 100)]
    _, theirs = generations.source.bridge.run_with_cache(ids, names_filter="blocks.2.mlp.hook_post")
    _, ours = generations.target.bridge.run_with_cache(ids, names_filter="blocks.2.mlp.hook_post")
    expected = ours["blocks.2.mlp.hook_post"].clone()
    expected[..., [0, 7, 100]] = theirs["blocks.2.mlp.hook_post"][..., [0, 7, 100]]
    seen: list[torch.Tensor] = []
    with mt.Patch(names).applied(generations):
        last = generations.target.hf.model.layers[2].mlp.down_proj
        hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        generations.target.hf(ids)
        hook.remove()
        _, bridged = generations.target.bridge.run_with_cache(ids, names_filter="blocks.2.mlp.hook_post")
    for found in (seen[0], bridged["blocks.2.mlp.hook_post"]):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_ablations_take_the_neuron_out(generations: Pair, questions: Task) -> None:
    reference = mt.reference_activations(generations.source, questions, ["L1N4"])
    means = torch.stack([reference.prompt(i, "blocks.1.mlp.hook_post").float().mean(0) for i in range(16)]).mean(0)
    ids = torch.tensor([[1, 5, 9, 4]])
    for method, expected in (("zero", 0.0), ("mean", float(means[4]))):
        seen: list[torch.Tensor] = []
        ablation = mt.Ablation(["L1N4"], method, None if method == "zero" else reference)  # type: ignore[arg-type]
        last = generations.source.hf.model.layers[1].mlp.down_proj
        plain = last.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        generations.source.hf(ids)
        plain.remove()
        with ablation.applied(generations.source):
            hook = last.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            generations.source.hf(ids)
            hook.remove()
        others = [n for n in range(384) if n != 4]
        assert torch.equal(seen[0][..., others], seen[1][..., others])
        torch.testing.assert_close(seen[1][..., 4], torch.full((1, 4), expected))


def test_a_mean_shift_of_all_neurons_is_that_of_the_mlp(generations: Pair, questions: Task) -> None:
    neurons = mt.mean_shift(generations, questions, generations.layout.neurons_of(2))
    mlp = mt.mean_shift(generations, questions, ["L2.mlp"])
    torch.testing.assert_close(sum(neurons.vectors.values()), mlp.vectors["L2.mlp"], atol=1e-4, rtol=1e-4)
    said = []
    for shift in (neurons, mlp):
        with shift.applied(generations.target):
            said.append(gold_outcomes(generations.target, questions).log_probability)
    np.testing.assert_allclose(*said, atol=1e-3)


def test_random_sets_of_neurons_are_matched(generations: Pair) -> None:
    chosen = [f"L0N{n}" for n in range(20)] + ["L3N5", "L0H1"]
    drawn = mt.random_matched(generations, chosen, 30, seed=0)
    sizes = {mt.Graft(one).parameter_count(generations) for one in drawn.sets}
    assert sizes == {mt.Graft(chosen).parameter_count(generations)}
    for one in drawn.sets:
        assert sum("N" in m for m in one) == 21 and len(set(one)) == 22
    assert all(set(a) != set(b) for a, b in pairwise(drawn.sets))


def test_neurons_are_ranked_beside_heads_where_scores_compare(generations: Pair, questions: Task) -> None:
    with pytest.raises(UnknownNameError, match="neuron"):
        mt.rank_modules(generations, questions, "own", "neurons")  # type: ignore[arg-type]
    for rule in ("own", "distance"):
        with pytest.raises(UsageError, match="divides a neuron's shift by what its whole MLP writes"):
            mt.rank_modules(generations, questions, rule, ("head", "neuron"))
    ratio = mt.rank_modules(generations, questions, "own_over_inherited", ("head", "neuron"))
    assert len(ratio) == 32 + 4 * 384 and set(ratio.head(100).kind) == {"head", "neuron"}
    alone = mt.rank_modules(generations, questions, "own", "neuron")
    assert 0 < alone.score.iloc[0] < 1, "a silent neuron would divide by next to nothing"


def test_neurons_of_an_mlp_do_not_count_twice(generations: Pair, questions: Task) -> None:
    shifts = mt.measure_shifts(generations, questions, ("mlp", "neuron"), "lae")
    with pytest.raises(UsageError, match="overlap, so a shift would count twice"):
        mt.concentration(shifts)


def test_models_in_memory_one_at_a_time(generations: Pair, questions: Task) -> None:
    turns = mt.load_pair("family/generations", one_at_a_time=True)
    both = [mt.rank_modules(pair, questions, "own", "neuron") for pair in (generations, turns)]
    assert list(both[0].module) == list(both[1].module)
    np.testing.assert_allclose(both[0].score, both[1].score, rtol=1e-6)
    names = [str(m) for m in both[0].module[:40]]
    found = []
    for pair in (generations, turns):
        with mt.Graft(names).applied(pair):
            found.append(gold_outcomes(pair.target, questions).log_probability)
    np.testing.assert_array_equal(*found)


def test_thousands_of_names_are_said_shortly(generations: Pair, tmp_path: Path) -> None:
    names = [f"L1N{n}" for n in (*range(300), 310)]
    graft = mt.Graft(names, [1 + n / 1000 for n in range(301)])
    assert "and 45 more" in graft.describe(generations) and "and 45 more" in graft._repr_html_()
    mt.export_graft(generations, mt.Graft([*names, "L0H3"]), tmp_path / "made")
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert "neurons 0–299, 310" in card and "L1N7" not in card
    assert not mt.verify_export(tmp_path / "made", generations).problems


def test_dropping_is_by_value_within_the_room() -> None:
    """The fast way to tell what fits is the slow one: every choice keeps room for the smallest others."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 9))
        value, alive = rng.normal(size=n), rng.random(n) < 0.8
        sizes, count, limit = rng.integers(1, 5, n), int(rng.integers(1, 9)), float(rng.integers(1, 20))
        left = [int(i) for i in np.argsort(-value, kind="stable") if alive[i]]
        missing = min(count, len(left))
        room, stay = max(limit, float(np.sort(sizes[left])[:missing].sum())), np.zeros(n, dtype=bool)
        for at, i in enumerate(left):
            if missing and sizes[i] + np.sort(sizes[left[at + 1 :]])[: missing - 1].sum() <= room:
                stay[i], missing, room = True, missing - 1, room - float(sizes[i])
        assert (_fitting(value, alive, sizes, count, limit) == stay).all()


def test_effects_of_many_modules_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    task, control = rng.normal(0.3, 1, (20, 23)), rng.normal(0, 1, (18, 23))
    whole = effects.one_sample_effects(task), effects.two_sample_effects(task, control)
    monkeypatch.setattr(effects, "BLOCK", 5)
    parts = effects.one_sample_effects(task), effects.two_sample_effects(task, control)
    for one, other in zip(whole, parts, strict=True):
        for name in ("mean", "low", "high", "size", "size_low", "size_high"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9)
