"""The same numbers on a GPU as on the CPU, up to rounding; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.evaluation.generation import generate
from mechtransplant.evaluation.gold import gold_outcomes
from mechtransplant.evaluation.sweeps import Change, sweep
from mechtransplant.experiment import run_experiment
from mechtransplant.experiment.config import parse_config
from mechtransplant.export.grafted import written_tensors
from mechtransplant.grafting import Graft, list_operators
from mechtransplant.modules import parse_address
from mechtransplant.pair import Pair, load_pair
from mechtransplant.pair.shipping import ship, unship
from mechtransplant.patching import Patch, patch_effects
from mechtransplant.ranking import rank_modules
from mechtransplant.shifts import measure_shifts
from mechtransplant.side_effects import measure_side_effects
from mechtransplant.tasks import Splits, load_task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(scope="module")
def pairs() -> tuple[Pair, Pair]:
    """The same pair on the CPU and on the GPU."""
    return load_pair("family/generations"), load_pair("family/generations", device="cuda")


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_task("addition").split(32, 32, 128)


def test_models_are_where_they_were_asked_to_be(pairs: tuple[Pair, Pair]) -> None:
    cpu, gpu = pairs
    assert {p.device.type for p in gpu.target.hf.parameters()} == {"cuda"}
    assert gpu.target.fingerprint == cpu.target.fingerprint
    there = unship(ship(gpu.target), "cuda")
    assert there.fingerprint == cpu.target.fingerprint and there.hf.device.type == "cuda"


def test_verdicts_and_log_probabilities(pairs: tuple[Pair, Pair], splits: Splits) -> None:
    for role in ("source", "target"):
        ours, theirs = (gold_outcomes(getattr(pair, role), splits.test) for pair in pairs)
        assert (ours.correct == theirs.correct).all()
        np.testing.assert_allclose(ours.log_probability, theirs.log_probability, atol=2e-3)
    ours, theirs = (generate(pair.source, splits.test) for pair in pairs)
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 0.98 * len(ours)


@pytest.mark.parametrize("operator", list_operators())
def test_grafts_write_the_same_weights(operator: str, pairs: tuple[Pair, Pair]) -> None:
    written = []
    for pair in pairs:
        graft = Graft(["L1.mlp", "L3H2"], 0.5, operator=operator)
        try:
            with graft.applied(pair):
                written.append({n: p.detach().cpu().clone() for n, p in pair.target.hf.named_parameters()})
        except Exception as refused:
            written.append(type(refused).__name__)
    if isinstance(written[0], str):
        assert written[0] == written[1]
        return
    # random choices (DARE) are drawn by the device's own generator: as many weights change, not the same ones
    for name, ours in written[0].items():
        theirs = written[1][name]
        if operator == "dare":
            before = pairs[0].target.hf.get_parameter(name)
            changed = [float((w != before).float().mean()) for w in (ours, theirs)]
            assert abs(changed[0] - changed[1]) < 0.05
        else:
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)


def test_shifts_patches_and_sweeps(pairs: tuple[Pair, Pair], splits: Splits) -> None:
    frames = [measure_shifts(pair, splits.discover).set_index(["measure", "module", "prompt"]).value for pair in pairs]
    np.testing.assert_allclose(frames[1].reindex(frames[0].index), frames[0], atol=2e-4)
    modules = ["L0H1", "L2.mlp", "L3H0", "L3H1", "L3.mlp"]
    for positions in ("all", "answer"):
        found = [patch_effects(pair, splits.discover, modules, positions)[1].log_probability for pair in pairs]
        np.testing.assert_allclose(found[1], found[0], atol=5e-3)
    swept = []
    for pair in pairs:
        changes = [Change(parse_address(m).layer, Graft([m]).applied(pair)) for m in modules]
        base, after = sweep(pair.target, splits.discover, changes)
        swept.append(after.log_probability)
        # what a whole pass says on the same device
        for row, module in enumerate(modules):
            with Graft([module]).applied(pair):
                whole = gold_outcomes(pair.target, splits.discover).log_probability
            np.testing.assert_allclose(after.log_probability[row], whole, atol=1e-3)
        assert len(base.correct) == len(splits.discover)
    np.testing.assert_allclose(swept[1], swept[0], atol=5e-3)
    with Patch(["L3.mlp"]).applied(pairs[1]):
        patched = evaluate(pairs[1].target, splits.test)
    with Patch(["L3.mlp"]).applied(pairs[0]):
        assert (evaluate(pairs[0].target, splits.test).correct == patched.correct).mean() >= 0.98


@pytest.mark.parametrize(
    "rule", ["lae", "own", "weight_delta", "gradient", "integrated_gradient", "activation_gradient"]
)
def test_rankings(rule: str, pairs: tuple[Pair, Pair], splits: Splits) -> None:
    kinds = "linear" if rule == "lae" else ("head", "mlp")
    ours, theirs = (rank_modules(pair, splits.discover, rule, kinds).set_index("module").score for pair in pairs)
    theirs.index, ours.index = theirs.index.astype(str), ours.index.astype(str)
    assert stats.spearmanr(ours, theirs.reindex(ours.index)).statistic > 0.999


def test_side_effects(pairs: tuple[Pair, Pair]) -> None:
    other = load_task("copy").split(1, 1, 64).test
    found = [measure_side_effects(pair, Graft(["L1.mlp"]), tasks=[other], text=False).frame for pair in pairs]
    assert list(found[0].columns) == list(found[1].columns) and len(found[0]) == len(found[1])


def test_a_whole_run(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "name": "small", "pair": "family/generations", "task": "addition", "rule": "weight_delta", "k": [2, 8],
        "random_sets": 6, "curve_sets": 3, "split": {"discover": 16, "choose": 24, "test": 64},
        "side_effects": {"questions": 16, "texts": 4, "tokens": 8, "random": 1},
    }  # fmt: skip
    done = [
        run_experiment(parse_config({**small, "device": device}), tmp_path / device / "small", progress=False)
        for device in ("cpu", "cuda")
    ]
    wanted = ["split", "role", "rule", "set", "k", "strength", "accuracy"]
    one, other = (d.results[wanted].reset_index(drop=True) for d in done)
    assert (one.accuracy - other.accuracy).abs().max() <= 0.05
    assert (one.drop(columns="accuracy").fillna("") == other.drop(columns="accuracy").fillna("")).all().all()


def test_one_model_at_a_time(pairs: tuple[Pair, Pair], splits: Splits) -> None:
    """The numbers of both at once, to the bit, from a GPU that holds one."""
    gpu, turns = pairs[1], load_pair("family/generations", device="cuda", one_at_a_time=True)
    ours, theirs = (measure_shifts(pair, splits.discover, batch_size=16) for pair in (turns, gpu))
    assert (ours.value == theirs.value).all()
    for rule in ("gradient", "activation_gradient", "weight_delta", "single_swap"):
        ours, theirs = (rank_modules(pair, splits.discover, rule, ("head", "mlp")).score for pair in (turns, gpu))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    for positions in ("all", "answer"):
        ours, theirs = (
            patch_effects(pair, splits.discover, ["L0H1", "L2.mlp"], positions)[1].log_probability
            for pair in (turns, gpu)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for one in (turns.source, turns.target, turns.source):
        there = {m.name: {p.device.type for p in m.hf.parameters()} for m in (turns.source, turns.target)}
        evaluate(one, splits.choose)
        there = {m.name: {p.device.type for p in m.hf.parameters()} for m in (turns.source, turns.target)}
        assert there.pop(one.name) == {"cuda"} and list(there.values()) == [{"cpu"}]
    with Graft(["L1.mlp", "L3H2"]).applied(turns):
        inside = evaluate(turns.target, splits.choose).log_probability
    with Graft(["L1.mlp", "L3H2"]).applied(gpu):
        np.testing.assert_allclose(inside, evaluate(gpu.target, splits.choose).log_probability, atol=1e-6)
    found = [rank_modules(pair, splits.discover, "lae", "linear").score for pair in (turns, gpu)]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
    written, copies = [], []
    for pair in (turns, gpu):
        # the target is away
        evaluate(pair.source, splits.choose)
        graft = Graft(["L1.mlp", "L3H2"], operator="dare")
        written.append(written_tensors(pair, graft)[1])
        evaluate(pair.source, splits.choose)
        copies.append(graft.copied(pair))
        assert {p.device.type for p in copies[-1].hf.parameters()} == {"cuda"}
        other = load_task("copy").split(1, 1, 32).test
        evaluate(pair.source, splits.choose)
        assert len(measure_side_effects(pair, Graft(["L1.mlp"]), tasks=[other], text=None).frame)
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())
    assert copies[0].fingerprint == copies[1].fingerprint
    ids = torch.arange(5, 12, device="cuda")[None]
    for role in ("source", "target", "source"):
        ours, theirs = (getattr(pair, role).hf(input_ids=ids).logits for pair in (turns, gpu))
        torch.testing.assert_close(ours, theirs)
    assert turns.target.fingerprint == gpu.target.fingerprint and turns.source.fingerprint == gpu.source.fingerprint


def test_memory_of_one_model_at_a_time(splits: Splits) -> None:
    """Two models of 400 MB: shifts of one at a time need the memory of one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mechtransplant.pair import LanguageModel, make_pair
    from mechtransplant.weights import Residence, admit

    tokenizer = load_pair("family/generations").target.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=6,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    peaks, values, size = {}, {}, 0
    for turns in (False, True):
        residence, models = Residence(), []
        for seed in (0, 1):
            torch.manual_seed(seed)
            hf = LlamaForCausalLM(config).eval().requires_grad_(False).to("cuda")
            size = sum(p.numel() * p.element_size() for p in hf.parameters())
            models.append(LanguageModel(f"random {seed}", hf, tokenizer))
            if turns:
                admit(hf, residence)
        pair = make_pair(*models)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        values[turns] = measure_shifts(pair, splits.discover, batch_size=8).value
        peaks[turns] = torch.cuda.max_memory_allocated()
        del pair, models, hf
        torch.cuda.empty_cache()
    print({turns: f"{peak / size:.2f} models" for turns, peak in peaks.items()})
    assert (values[True] == values[False]).all()
    assert peaks[False] > 2 * size and peaks[True] < 1.6 * size


@pytest.fixture(scope="module")
def halves() -> Pair:
    """The pair with its lower layers on the CPU and its upper ones on the GPU: two devices that compute."""
    there: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": 0, "lm_head": 0}
    there |= {f"model.layers.{n}": "cpu" if n < 2 else 0 for n in range(4)}
    return load_pair("family/generations", device_map=there)


def test_a_model_on_two_devices(halves: Pair, pairs: tuple[Pair, Pair], splits: Splits) -> None:
    cpu = pairs[0]
    for role in ("source", "target"):
        here = getattr(halves, role)
        assert {p.device.type for p in here.hf.parameters()} == {"cpu", "cuda"}
        assert here.fingerprint == getattr(cpu, role).fingerprint
        ours, theirs = (gold_outcomes(getattr(pair, role), splits.test) for pair in (cpu, halves))
        assert (ours.correct == theirs.correct).all()
        np.testing.assert_allclose(ours.log_probability, theirs.log_probability, atol=2e-3)
    measures = ("magnitude", "distance", "own", "inherited", "alignment")
    ours, theirs = (
        measure_shifts(pair, splits.discover, ("head", "mlp", "attn", "linear"), measures)
        .set_index(["measure", "module", "prompt"])
        .value
        for pair in (cpu, halves)
    )
    np.testing.assert_allclose(theirs.reindex(ours.index), ours, atol=5e-4)
    for rule in ("lae", "own", "weight_delta", "gradient", "integrated_gradient", "activation_gradient", "single_swap"):
        kinds = "linear" if rule == "lae" else ("head", "mlp")
        found = [rank_modules(pair, splits.discover, rule, kinds).set_index("module").score for pair in (cpu, halves)]
        for one in found:
            one.index = one.index.astype(str)
        assert stats.spearmanr(found[0], found[1].reindex(found[0].index)).statistic > 0.999
    modules = ["L0H1", "L1.mlp", "L2.mlp", "L3H0"]
    for positions in ("all", "answer"):
        found = [patch_effects(pair, splits.discover, modules, positions)[1].log_probability for pair in (cpu, halves)]
        np.testing.assert_allclose(found[1], found[0], atol=5e-3)
    texts = []
    for pair in (cpu, halves):
        with Graft(modules, 0.7, operator="slerp").applied(pair):
            texts.append(generate(pair.target, splits.choose))
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= 0.95 * len(splits.choose)
    patched = []
    for pair in (cpu, halves):
        with Patch(["L1.mlp", "L3.mlp"]).applied(pair):
            patched.append(evaluate(pair.target, splits.test).correct)
    assert (patched[0] == patched[1]).mean() >= 0.98
    with pytest.raises(UsageError, match="on several devices, where it has no bridge"):
        _ = halves.target.bridge
    assert halves.target.fingerprint == cpu.target.fingerprint


def test_runs_on_two_devices_and_with_one_model_at_a_time(tmp_path: Path) -> None:
    there: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": 0, "lm_head": 0}
    there |= {f"model.layers.{n}": "cpu" if n in (0, 2) else 0 for n in range(4)}
    small: dict[str, Any] = {
        "pair": "family/generations", "task": "addition", "rule": ["own", "gradient"], "kind": "mlp", "k": [1, 2],
        "random_sets": 2, "curve_sets": 1, "split": {"discover": 16, "choose": 24, "test": 64},
        "side_effects": {"questions": 16, "texts": 4, "tokens": 8, "random": 1},
    }  # fmt: skip
    places = {"cpu": {}, "map": {"device_map": there}, "turns": {"device": "cuda", "one_at_a_time": True}}
    found = {name: run_experiment(parse_config({**small, **more}), tmp_path / name) for name, more in places.items()}
    for name in ("map", "turns"):
        one, other = (found[key].results.reset_index(drop=True) for key in ("cpu", name))
        assert len(one) == len(other) and (one.accuracy - other.accuracy).abs().max() <= 0.05


def test_an_even_spread_over_what_is_there() -> None:
    pair = load_pair("family/generations", device_map="auto", dtype="bfloat16")
    assert {p.device.type for m in (pair.source, pair.target) for p in m.hf.parameters()} == {"cuda"}


@pytest.mark.parametrize("device", ["cuda"])
def test_bfloat16_is_summed_in_float32(device: str, splits: Splits) -> None:
    half = load_pair("family/generations", dtype="bfloat16", device=device)
    measured = measure_shifts(half, splits.discover, measures=["magnitude", "distance"])
    for model in (half.source, half.target):
        # the same rounded weights, computed in float32
        model.hf.float()
    exact = measure_shifts(half, splits.discover, measures=["magnitude", "distance"])
    gap = (measured.value - exact.value).abs().groupby(measured.measure).mean()
    size = exact.value.abs().groupby(exact.measure).mean()
    # activations have 8 bits; means over prompts and positions must not lose more
    assert (gap / size < 0.05).all()
