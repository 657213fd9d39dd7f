"""Ablations and mean shifts against their definitions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, random_pair_of

from mechtransplant.activations import cache_activations
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import generate, gold_scores
from mechtransplant.grafting import Graft
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.patching import (
    Ablation,
    MeanShift,
    ablate_heads_and_mlps,
    mean_shift,
    reference_activations,
)
from mechtransplant.tasks import PromptFormat, Task

IDS = torch.tensor([[1, 20, 21, 22, 9]])


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, generations: Pair) -> Pair:
    return random_pair_of(request.param, generations.target.tokenizer)


@pytest.fixture(scope="module")
def task(addition: Task) -> Task:
    prompt = PromptFormat(system="compute this sum now please", shot_separator=" ")
    return replace(addition.split(8, 8, 16).discover, format=prompt, max_new_tokens=5)


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(IDS).logits


def test_zero_is_a_model_whose_output_weights_are_zero(pair: Pair) -> None:
    target, layout = pair.target, pair.layout
    hand = copy.deepcopy(target.hf)
    attention, mlp = layout.attention_output(0), layout.mlp_output(1)
    for address, part in ((attention, slice(8, 24)), (mlp, slice(None))):
        linear = hand.get_submodule(layout.linears[address])
        inward = linear.weight.data if address in layout.transposed else linear.weight.data.T
        inward[part] = 0
        if address == mlp and linear.bias is not None:
            linear.bias.zero_()
    with torch.no_grad():
        expected = hand(IDS).logits
    plain = logits(target)
    with Ablation(["L0H1", "L0H2", "L1.mlp"]).applied(pair):
        torch.testing.assert_close(logits(target), expected, atol=1e-4, rtol=1e-4)
        assert (logits(target) - plain).abs().max() > 1e-3
    assert torch.equal(logits(target), plain)


@pytest.mark.parametrize("method", ["mean", "resample"])
def test_mean_and_resample_put_in_what_the_reference_has(pair: Pair, task: Task, method: Any) -> None:
    target = pair.target
    # TransformerLens has no hook of its own for OPT's loose MLP layers
    modules = ["L0H1"] if pair.name == "opt" else ["L0H1", "L1H3", "L1.mlp", "L0.attn"]
    reference = reference_activations(target, task, modules)
    seen: dict[str, torch.Tensor] = {}
    z = target.hf.get_submodule(pair.layout.linears[pair.layout.attention_output(0)])
    with Ablation(["L0H1"], method, reference).applied(target):
        handle = z.register_forward_pre_hook(lambda m, i: seen.update(z=i[0].clone()))
        logits(target)
        handle.remove()
    plain: dict[str, torch.Tensor] = {}
    handle = z.register_forward_pre_hook(lambda m, i: plain.update(z=i[0].clone()))
    logits(target)
    handle.remove()
    bank = torch.cat([reference.prompt(i, "blocks.0.attn.hook_z") for i in range(len(task))])
    new, old = (t["z"].reshape(1, 5, 4, 8) for t in (seen, plain))
    others = [0, 2, 3]
    assert torch.equal(new[:, :, others], old[:, :, others])
    for position in range(5):
        if method == "mean":
            means = [reference.prompt(i, "blocks.0.attn.hook_z").mean(0) for i in range(len(task))]
            torch.testing.assert_close(new[0, position, 1], torch.stack(means).mean(0)[1], atol=1e-5, rtol=1e-5)
        else:
            assert (bank[:, 1] == new[0, position, 1]).all(-1).any()
    if method == "resample":
        assert len({tuple(row.tolist()) for row in new[0, :, 1]}) > 1
        drawn = []
        for seed in range(2):
            with Ablation(modules, method, reference, seed=seed).applied(target):
                drawn.append(logits(target))
        assert not torch.equal(*drawn)


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_neither_batches_nor_the_cache_change_an_ablation(random_pair: Pair, task: Task, method: Any) -> None:
    modules = ["L0H1", "L1H3", "L1.mlp"]
    target = random_pair.target
    reference = None if method == "zero" else reference_activations(target, task, modules)
    with Ablation(modules, method, reference).applied(target):
        scores = [gold_scores(target, task, size)[1] for size in (1, 3, 8)]
        texts = [generate(target, task, 4, size) for size in (1, 3, 8)]
        for other in scores[1:]:
            np.testing.assert_allclose(scores[0], other, atol=1e-4)
        assert texts[0] == texts[1] == texts[2]
    for positions in ("prompt", "decoding", "last"):
        with Ablation(modules, method, reference, positions).applied(target):  # type: ignore[arg-type]
            np.testing.assert_allclose(*[gold_scores(target, task, size)[1] for size in (1, 8)], atol=1e-4)


def test_mean_shift_is_the_mean_difference_of_writes(pair: Pair, task: Task) -> None:
    modules = ["L0H1", "L1H3", "L1.mlp", "L0.resid_post"]
    shift = mean_shift(pair, task, modules, batch_size=3)
    assert shift.modules == tuple(modules)
    models = (pair.source, pair.target)
    caches = [cache_activations(m, task, ("attn.hook_z",)) for m in models]
    for head, layer in ((1, 0), (3, 1)):
        writes = [
            torch.stack([c.prompt(i, f"blocks.{layer}.attn.hook_z")[:, head].mean(0) for i in range(len(task))]).mean(0)
            @ m.output_weights(layer)[head]
            for c, m in zip(caches, models, strict=True)
        ]
        torch.testing.assert_close(shift.vectors[f"L{layer}H{head}"], writes[0] - writes[1], atol=1e-4, rtol=1e-4)
    out = pair.target.hf.get_submodule(pair.layout.linears[pair.layout.attention_output(0)])
    expected: list[torch.Tensor] = []
    handle = out.register_forward_hook(lambda m, i, o: o + 0.5 * shift.vectors["L0H1"].reshape(-1))
    expected.append(logits(pair.target))
    handle.remove()
    # the target alone: no source is needed
    with shift.only("L0H1", strength=0.5).applied(pair.target):
        torch.testing.assert_close(logits(pair.target), expected[0], atol=1e-5, rtol=1e-5)


def test_mean_shift_of_a_pair_of_equals_is_nothing_and_files_come_back(
    random_pair: Pair, task: Task, tmp_path: Path
) -> None:
    twin = LanguageModel("twin", copy.deepcopy(random_pair.target.hf), random_pair.target.tokenizer)
    own = mean_shift(make_pair(twin, random_pair.target, "self"), task, ["L0H1", "L1.mlp", "L1"])
    assert all((v == 0).all() for v in own.vectors.values())
    shift = mean_shift(random_pair, task, ["L0H1", "L1.mlp"], "answer").only(["L1.mlp"], positions=[0, -1], strength=2)
    shift.save(tmp_path / "shift.safetensors")
    back = MeanShift.load(tmp_path / "shift.safetensors")
    assert back.modules == ("L1.mlp",) and back.positions == (0, -1) and back.strength == 2
    assert torch.equal(back.vectors["L1.mlp"], shift.vectors["L1.mlp"])
    with pytest.raises(UsageError, match="no mean shift of L0H0"):
        shift.only("L0H0")
    (tmp_path / "bad").write_text("x")
    for path in (tmp_path / "bad", tmp_path / "none"):
        with pytest.raises(UsageError, match="holds no mean shift"):
            MeanShift.load(path)


def test_a_mean_shift_of_views_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    both, path = torch.arange(8.0).reshape(2, 4), tmp_path / "shift.safetensors"
    shift = MeanShift({"L0.mlp": both[0], "L1.mlp": both[0], "L2.mlp": both[1]})
    shift.save(path)
    kept = path.read_bytes()
    for name, vector in MeanShift.load(path).vectors.items():
        assert torch.equal(vector, shift.vectors[name])
    # what cannot be written leaves what was there
    (tmp_path / ".shift.safetensors.tmp").mkdir()
    with pytest.raises(UsageError, match="choose another path"):
        MeanShift({"L0.mlp": both[1]}).save(path)
    (tmp_path / ".shift.safetensors.tmp").rmdir()
    assert path.read_bytes() == kept and [p.name for p in tmp_path.iterdir()] == [path.name]
    for bad in (tmp_path, path / "inside", tmp_path / "no" / "folder", ""):
        with pytest.raises(UsageError, match="choose another path"):
            shift.save(bad)
    assert path.read_bytes() == kept and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_heads_against_mlps_are_matched(
    unchanged: Pair, addition: Task, random_model: Callable[..., LanguageModel]
) -> None:
    some = addition.split(16, 8, 8).discover
    everything = [*unchanged.modules("head"), *unchanged.modules("mlp")]
    reference = reference_activations(unchanged.source, some, everything)
    table = ablate_heads_and_mlps(unchanged.source, some, (1, 2), ("zero", "mean"), reference, sets=3)
    # an MLP of the family has more parameters than all 32 heads, of which there is one set
    assert len(table) == 2 * 2 * (3 + 3 + 1) and not table.duplicated(["method", "matched", "count", "names"]).any()
    assert (table[table.matched == "parameters"].modules == 32).all()
    small = random_model(0, intermediate_size=16)
    matched = ablate_heads_and_mlps(small, some, (1, 2), sets=3)
    for count, rows in matched.groupby("count"):
        by = rows.groupby("matched").first()
        assert by.modules["both"] == by.modules["modules"] == count and by.modules["parameters"] == 3 * count
        assert by.parameters["parameters"] == by.parameters["both"] == 3 * 32 * 16 * count
    # d_model 128, d_head 16, d_mlp from the model: counted by hand
    hf = unchanged.source.hf
    width = hf.config.intermediate_size
    assert table[(table.kind == "mlp") & (table["count"] == 1)].parameters.iloc[0] == 3 * 128 * width
    first = table[(table.kind == "mlp") & (table.method == "zero")].iloc[0]
    with Ablation(first.names.split()).applied(unchanged.source):
        correct, log_probability = gold_scores(unchanged.source, some)
    assert correct.mean() == first.accuracy and log_probability.mean() == pytest.approx(first.log_probability, abs=1e-5)
    base = gold_scores(unchanged.source, some)
    assert first.log_probability_change == pytest.approx(log_probability.mean() - base[1].mean(), abs=1e-5)
    assert (table.accuracy_change <= 0).mean() > 0.9


def test_refusals(random_pair: Pair, task: Task) -> None:
    target = random_pair.target
    reference = reference_activations(target, task, ["L0H0"])
    with pytest.raises(UsageError, match="did you mean mean"):
        Ablation(["L0H0"], "meen")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="mean ablation needs a reference"):
        Ablation(["L0H0"], "mean")
    with pytest.raises(UsageError, match="zero ablation takes no reference"):
        Ablation(["L0H0"], "zero", reference)
    with pytest.raises(UsageError, match=r"no blocks\.1\.mlp\.hook_out"):
        Ablation(["L1.mlp"], "mean", reference).applied(target)
    with Graft(["L0"]).applied(random_pair), pytest.raises(UsageError, match="other weights"):
        Ablation(["L0H0"], "mean", reference).applied(target)
    for count in (0, 3):
        with pytest.raises(UsageError, match="count must be a whole number"):
            ablate_heads_and_mlps(target, task, (count,))


def outputs(model: LanguageModel, layer: int) -> dict[str, torch.Tensor]:
    """z, the attention block's and the MLP's output of a layer on IDS, as the model has them under what acts on it."""
    found: dict[str, torch.Tensor] = {}
    layout = model.layout
    attention = model.hf.get_submodule(layout.linears[layout.attention_output(layer)])
    mlp = model.hf.get_submodule(layout.linears[layout.mlp_output(layer)])
    handles = [
        attention.register_forward_pre_hook(lambda m, i: found.update(z=i[0].unflatten(-1, (4, 8))[0].clone())),
        attention.register_forward_hook(lambda m, i, o: found.update(attn=o.reshape(5, -1).clone())),
        mlp.register_forward_hook(lambda m, i, o: found.update(mlp=o.reshape(5, -1).clone())),
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return found


WHERE: list[tuple[Any, list[int]]] = [
    ("all", [0, 1, 2, 3, 4]),
    ("prompt", [0, 1, 2, 3, 4]),
    ("last", [4]),
    ([0, -2], [0, 3]),
]


@pytest.mark.parametrize(("positions", "at"), WHERE)
@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_every_kind_of_module_at_every_choice_of_positions(
    random_pair: Pair, task: Task, method: Any, positions: Any, at: list[int]
) -> None:
    modules = ["L0H1", "L0H2", "L0.mlp", "L0.attn"]
    target = random_pair.target
    names = {"z": "attn.hook_z", "mlp": "mlp.hook_out", "attn": "attn.hook_out"}
    reference = reference_activations(target, task, modules)
    bank = {k: torch.cat([reference.prompt(i, f"blocks.0.{n}") for i in range(len(task))]) for k, n in names.items()}
    means = {
        k: torch.stack([reference.prompt(i, f"blocks.0.{n}").mean(0) for i in range(len(task))]).mean(0)
        for k, n in names.items()
    }
    for chosen in (["L0H1", "L0H2"], ["L0.mlp"], ["L0.attn"]):
        plain = outputs(target, 0)
        with Ablation(chosen, method, None if method == "zero" else reference, positions).applied(target):
            found = outputs(target, 0)
        key = {"L0.mlp": "mlp", "L0.attn": "attn"}.get(chosen[0], "z")
        part: Any = slice(1, 3) if key == "z" else slice(None)
        untouched = [p for p in range(5) if p not in at]
        # an MLP reads what the heads before it said
        if key != "attn":
            assert torch.equal(found[key][untouched], plain[key][untouched])
        rows = []
        for position in at:
            new = found[key][position][part]
            if method == "zero":
                assert (new == 0).all()
            elif method == "mean":
                torch.testing.assert_close(new, means[key][part], atol=1e-5, rtol=1e-5)
            else:
                # both heads at once, so one draw for all modules of a position
                same = (bank[key][:, part] == new).flatten(1).all(1).nonzero().flatten().tolist()
                assert same
                rows.append(same[0])
        if method == "resample" and len(at) > 2:
            assert len(set(rows)) > 1 and rows != list(range(rows[0], rows[0] + len(rows)))


def test_a_draw_depends_on_the_token_and_its_place(random_pair: Pair, task: Task) -> None:
    target = random_pair.target
    reference = reference_activations(target, task, ["L0.mlp"])
    with Ablation(["L0.mlp"], "resample", reference).applied(target):
        first = outputs(target, 0)["mlp"]
        other = IDS.clone()
        other[0, 2] = 33
        found: list[torch.Tensor] = []
        mlp = target.hf.model.layers[0].mlp.down_proj
        handle = mlp.register_forward_hook(lambda m, i, o: found.append(o[0].clone()))
        with torch.no_grad():
            target.hf(other)
        handle.remove()
    same = (found[0] == first).all(-1).tolist()
    assert same == [True, True, False, True, True]


@pytest.mark.parametrize(("positions", "at"), WHERE)
def test_a_mean_shift_is_added_where_it_should_be(random_pair: Pair, task: Task, positions: Any, at: list[int]) -> None:
    shift = mean_shift(random_pair, task, ["L0H1", "L0.mlp", "L0.attn", "L1"])
    target = random_pair.target
    assert shift.modules == ("L0H1", "L0.mlp", "L0.attn", "L1.resid_post")
    for name, key in (("L0H1", "attn"), ("L0.attn", "attn"), ("L0.mlp", "mlp")):
        plain = outputs(target, 0)
        with shift.only(name, positions=positions, strength=2).applied(target):
            found = outputs(target, 0)
        expected = plain[key].clone()
        expected[at] += 2 * shift.vectors[name]
        torch.testing.assert_close(found[key], expected, atol=1e-5, rtol=1e-5)
        assert shift.vectors[name].abs().max() > 1e-4
    stream: list[torch.Tensor] = []
    norm = target.hf.model.norm
    for block in (shift.only("L0H1", strength=0), shift.only("L1", positions=positions)):
        with block.applied(target):
            handle = norm.register_forward_pre_hook(lambda m, i: stream.append(i[0][0].clone()))
            logits(target)
            handle.remove()
    stream[0][at] += shift.vectors["L1.resid_post"]
    torch.testing.assert_close(stream[1], stream[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="other model"):
        MeanShift({"L0.mlp": torch.zeros(3)}).applied(target)
