"""A pair of which one model at a time is in memory gives the same numbers, to the bit, and loses nothing."""

from __future__ import annotations

import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import random_pair_of

import mechtransplant as mt
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.experiment import run_experiment
from mechtransplant.experiment.config import parse_config
from mechtransplant.grafting import ConditionalGraft, Graft
from mechtransplant.pair import LanguageModel, Pair, load_pair
from mechtransplant.patching import Patch, patch_effects
from mechtransplant.ranking import rank_modules
from mechtransplant.shifts import decoding_shifts, measure_shifts, shift_vectors, summarize_shifts
from mechtransplant.tasks import Task, load_task
from mechtransplant.weights import Residence, TensorFile, admit, awaken, is_here, runs_on, takes_turns

MODULES = ["L1.mlp", "L2H1", "L0.q_proj"]


@pytest.fixture(scope="module")
def loaded() -> Pair:
    return load_pair("family/generations", one_at_a_time=True)


@pytest.fixture
def turns(loaded: Pair) -> Iterator[Pair]:
    """The pair; fails the test that leaves a byte of either model different."""
    before = [m.fingerprint for m in (loaded.source, loaded.target)]
    late: list[str] = []

    def begins(hf: Any, *_: Any) -> None:
        # on a GPU what is prepared before the pass would have been for the wrong device
        if not is_here(hf):
            late.append("".join(traceback.format_stack()[-12:]))

    # before everything else, the call of the pass's own hook included
    handles = [m.hf.register_forward_pre_hook(begins, prepend=True) for m in (loaded.source, loaded.target)]
    yield loaded
    for handle in handles:
        handle.remove()
    assert not late, late[0]
    assert [m.fingerprint for m in (loaded.source, loaded.target)] == before


@pytest.fixture(scope="module")
def questions(addition: Task) -> Task:
    return addition.split(20, 8, 8).discover


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.astype({"module": str}), other.astype({"module": str}), rtol=0, atol=0)


def test_the_models_are_the_same(turns: Pair, generations: Pair) -> None:
    assert takes_turns(turns.source.hf) and not takes_turns(generations.source.hf)
    for role in ("source", "target"):
        ours, theirs = (getattr(pair, role) for pair in (turns, generations))
        assert ours.fingerprint == theirs.fingerprint
        assert runs_on(ours.hf) == theirs.hf.device
    assert turns.compatibility.shapes.equals(generations.compatibility.shapes)


@pytest.mark.parametrize("positions", ["all", "answer", "decoding"])
def test_shifts(positions: Any, turns: Pair, generations: Pair, questions: Task) -> None:
    kinds = ("head", "mlp", "attn", "linear")
    measures = ("magnitude", "distance", "own", "inherited", "alignment", "lae")
    ours, theirs = (
        measure_shifts(pair, questions, kinds, measures, positions, batch_size=8) for pair in (turns, generations)
    )
    same(ours, theirs)
    assert ours.value.abs().sum() > 0


def test_summaries_vectors_and_decoding_shifts(turns: Pair, generations: Pair, questions: Task) -> None:
    same(*(summarize_shifts(pair, questions, batch_size=8) for pair in (turns, generations)))
    ours, theirs = (shift_vectors(pair, questions, batch_size=8) for pair in (turns, generations))
    assert all(np.array_equal(ours.of(m), theirs.of(m)) for m in theirs.modules)
    same(*(decoding_shifts(pair, questions, batch_size=8) for pair in (turns, generations)))


def test_lae_by_decoding_and_as_a_rule(turns: Pair, generations: Pair, questions: Task) -> None:
    same(*(rank_modules(pair, questions, "lae", "linear", batch_size=8) for pair in (turns, generations)))


@pytest.mark.parametrize(
    "rule",
    ["screened_swap", "own", "weight_delta", "gradient", "integrated_gradient", "activation_gradient", "single_swap"],
)
def test_rankings(rule: str, turns: Pair, generations: Pair, questions: Task) -> None:
    options = {} if rule == "weight_delta" else {"batch_size": 8}
    same(*(rank_modules(pair, questions, rule, ("head", "mlp"), **options) for pair in (turns, generations)))


def test_grafts_and_evaluations_in_any_order(turns: Pair, generations: Pair, questions: Task) -> None:
    found = []
    for pair in (turns, generations):
        plain = [evaluate(model, questions) for model in (pair.source, pair.target, pair.source)]
        with Graft(MODULES).applied(pair):
            grafted = evaluate(pair.target, questions)
        with Graft(MODULES, 0.5).applied(pair.reversed()):
            into_source = evaluate(pair.source, questions)
        with ConditionalGraft(Graft(MODULES), "decoding").applied(pair):
            conditional = evaluate(pair.target, questions, method="generate")
        found.append([*plain, grafted, into_source, conditional])
    for ours, theirs in zip(*found, strict=True):
        assert np.array_equal(ours.correct, theirs.correct)
        assert ours.log_probability is not None and theirs.log_probability is not None
        assert np.array_equal(ours.log_probability, theirs.log_probability)


def test_activation_caches(turns: Pair, generations: Pair, questions: Task) -> None:
    for role in ("source", "target", "source"):
        ours, theirs = (mt.cache_activations(getattr(pair, role), questions) for pair in (turns, generations))
        assert all(torch.equal(ours.prompt(3, name), theirs.prompt(3, name)) for name in theirs)


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_patch_effects(positions: Any, turns: Pair, generations: Pair, questions: Task) -> None:
    for ours, theirs in zip(
        *(patch_effects(pair, questions, ["L1.mlp", "L2H1"], positions, batch_size=8) for pair in (turns, generations)),
        strict=True,
    ):
        assert np.array_equal(ours.log_probability, theirs.log_probability)


def test_a_patch_that_needs_both_is_refused(turns: Pair, questions: Task) -> None:
    with pytest.raises(UsageError, match="one at a time: load it without"), Patch(["L1.mlp"]).applied(turns):
        pass
    with pytest.raises(UsageError, match="one at a time"):
        patch_effects(turns, questions, ["L1.mlp"], "prompt")


def test_a_graft_keeps_its_model_in_memory(turns: Pair, questions: Task) -> None:
    with Graft(MODULES).applied(turns):
        with pytest.raises(UsageError, match=r"a graft is in place.*leave the graft's block"):
            evaluate(turns.source, questions)
        evaluate(turns.target, questions)
    evaluate(turns.source, questions)
    outer, inner = Graft(["L1.mlp"]).applied(turns), Graft(["L1.mlp"], 0.5).applied(turns)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(UsageError, match="nest `with` blocks"):
        outer.__exit__(None, None, None)
    # the one that was left too early is still waiting to be restored
    with pytest.raises(UsageError, match="a graft is in place"):
        evaluate(turns.source, questions)
    inner.__exit__(None, None, None)
    evaluate(turns.source, questions)
    with Graft([]).applied(turns):
        evaluate(turns.source, questions)


def test_what_is_written_into_a_model_stays(questions: Task) -> None:
    pair = load_pair("family/generations", one_at_a_time=True)
    before = evaluate(pair.target, questions)
    weight = pair.target.hf.get_parameter("model.layers.1.mlp.down_proj.weight")
    with torch.no_grad():
        weight[3, :5] += 1
    changed = pair.target.fingerprint
    after = evaluate(pair.target, questions)
    evaluate(pair.source, questions)
    assert pair.target.fingerprint == changed
    evaluate(pair.target, questions)
    # a write that leaves no mark
    weight.data[5, :5] += 1
    changed = pair.target.fingerprint
    evaluate(pair.source, questions)
    assert pair.target.fingerprint == changed
    with torch.no_grad():
        # written while it is away
        weight[4, :5] += 1
    assert pair.target.fingerprint != changed
    changed = pair.target.fingerprint
    evaluate(pair.target, questions)
    evaluate(pair.source, questions)
    assert pair.target.fingerprint == changed
    assert before.log_probability is not None and after.log_probability is not None
    assert not np.array_equal(before.log_probability, after.log_probability)
    weight.data = weight.data.double()
    with pytest.raises(UsageError, match="another dtype or shape"):
        evaluate(pair.target, questions)


def test_parameters_that_share_their_numbers_go_on_doing_so(random_model: Callable[..., LanguageModel]) -> None:
    model, other = random_model(0), random_model(1)
    words = model.hf.get_input_embeddings().weight
    model.hf.lm_head.weight = torch.nn.Parameter(words.data, requires_grad=False)
    residence = Residence()
    for each in (model, other):
        admit(each.hf, residence)
    for _ in range(2):
        for each in (model, other):
            awaken(each.hf)
            with torch.no_grad():
                words[0, 0] += 1
            assert model.hf.lm_head.weight[0, 0] == words[0, 0]


def test_memory_holds_one_of_them(turns: Pair, questions: Task) -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("only Linux says which pages of a file are in memory")

    def held() -> int:
        """Bytes of the pair's files that are in memory."""
        sizes, inside = 0, False
        for line in smaps.read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                # a file without a name is called by its number
                inside = tempfile.gettempdir() in line and "(deleted)" in line
            elif inside and line.startswith("Rss:"):
                sizes += int(line.split()[1]) * 1024
        return sizes

    size = sum(p.numel() * p.element_size() for p in turns.target.hf.parameters())
    evaluate(turns.source, questions)
    for model in (turns.target, turns.source, turns.target):
        # reads both
        assert turns.source.fingerprint != turns.target.fingerprint
        evaluate(model, questions)
        measured = held()
        # the embedding's rows that no token asks for are not read
        assert 0.5 * size < measured < 1.1 * size


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UsageError, match=r"no room for [\d,]+ bytes of weights in .*set TMPDIR"):
        load_pair("family/generations", one_at_a_time=True)


def test_a_tensor_file_gives_back_what_it_got() -> None:
    file = TensorFile("tensors")
    given = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.arange(6).reshape(2, 3), torch.tensor(2.0)]
    places = [file.add(tensor) for tensor in given]
    mapped = file.mapped()
    for tensor, place in zip(given, places, strict=True):
        for found in (file.read(place), mapped[place]):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    # a map is its holder's own
    mapped[places[0]].zero_()
    assert torch.equal(file.mapped()[places[0]], given[0])


def test_a_run(tmp_path: Path) -> None:
    config = {
        "pair": "family/generations", "task": "addition", "split": {"discover": 8, "choose": 8, "test": 16},
        "rule": "own", "kind": "mlp", "k": [1, 2], "random_sets": 2, "curve_sets": 1,
        "side_effects": {"questions": 4, "texts": 4, "tokens": 4, "random": 0},
    }  # fmt: skip
    found = [
        run_experiment(parse_config({**config, "one_at_a_time": flag}), tmp_path / str(flag)).results
        for flag in (True, False)
    ]
    pd.testing.assert_frame_equal(*found, rtol=0, atol=0)


def test_exports_and_copies_are_of_the_target_where_it_runs(turns: Pair, generations: Pair, tmp_path: Path) -> None:
    graft = Graft(["L1.mlp", "L2H1"], 0.7)
    prints, found = [], []
    for at, pair in enumerate((turns, generations)):
        evaluate(pair.source, load_task("addition").subset(range(4)))
        mt.export_graft(pair, graft, tmp_path / str(at))
        prints.append(graft.copied(pair).fingerprint)
        found.append(mt.verify_export(tmp_path / str(at), pair).problems)
    assert prints[0] == prints[1] and found == [[], []]
    weights = [(tmp_path / str(at) / "model.safetensors").read_bytes() for at in (0, 1)]
    assert weights[0] == weights[1]


def test_a_pass_by_hand_calls_its_model(loaded: Pair, generations: Pair) -> None:
    ids = torch.arange(5, 12)[None]
    for role in ("source", "target", "source"):
        ours, theirs = (getattr(pair, role) for pair in (loaded, generations))
        assert torch.equal(ours.hf(ids).logits, theirs.hf(input_ids=ids).logits)
        assert is_here(ours.hf)
        assert torch.equal(ours.bridge(ids), theirs.bridge(ids))


def test_a_bridge_that_splits_weights_follows_its_model(generations: Pair, addition: Task) -> None:
    """GPT-2's Q, K and V are one tensor, of which a bridge holds views."""
    pair, task = random_pair_of("gpt2", generations.target.tokenizer), addition.subset(range(4))
    residence = Residence()
    for model in (pair.source, pair.target):
        admit(model.hf, residence)
    before = mt.cache_activations(pair.target, task, ["attn.hook_z"])
    mt.cache_activations(pair.source, task, ["attn.hook_z"])
    with torch.no_grad():
        pair.target.hf.get_parameter("transformer.h.0.attn.c_attn.weight").mul_(1.5)
    after = mt.cache_activations(pair.target, task, ["attn.hook_z"])
    mt.cache_activations(pair.source, task, ["attn.hook_z"])
    again = mt.cache_activations(pair.target, task, ["attn.hook_z"])
    name = "blocks.0.attn.hook_z"
    assert not torch.equal(before.prompt(0, name), after.prompt(0, name))
    assert torch.equal(after.prompt(0, name), again.prompt(0, name))


def test_an_interrupt_while_a_model_is_called_leaves_no_pin(
    turns: Pair, questions: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechtransplant.weights import residence

    evaluate(turns.source, questions)
    put = residence._put

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for applied in (Graft(MODULES).applied(turns), ConditionalGraft(Graft(MODULES), "decoding").applied(turns)):
        evaluate(turns.source, questions)
        monkeypatch.setattr(residence, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt), applied:
            pass
        monkeypatch.setattr(residence, "_put", put)
        evaluate(turns.target, questions)
        evaluate(turns.source, questions)
