"""An exported graft in other hands: mergekit, PEFT, transformers and TransformerLens on SmolLM2, lm-eval."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import yaml
from architectures import ARCHITECTURES, build
from exports import MIXED, MLP, grafted_logits, loaded, logits

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.export import export_adapter, export_graft, verify_export
from mechtransplant.export.adapter import PROBE
from mechtransplant.grafting import Graft
from mechtransplant.grafting.operators import Slerp
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.tasks import Task
from mechtransplant.weights import load_model, models_folder

# --- mergekit ------------------------------------------------------------


def test_recipes_are_written_where_mergekit_can_say_the_graft(generations: Pair, tmp_path: Path) -> None:
    made = export_graft(generations, Graft(["L0.mlp", "L3.q_proj"], [1.0, 0.5]), tmp_path / "whole")
    assert made.recipe is not None
    content = yaml.safe_load(made.recipe.read_text())
    assert content["merge_method"] == "linear" and content["base_model"] == "TARGET"
    weights = {m["model"]: m["parameters"]["weight"] for m in content["models"]}
    assert {"filter": "layers.3.self_attn.q_proj.", "value": 0.5} in weights["SOURCE"]
    assert weights["SOURCE"][-1] == {"value": 0.0} and weights["TARGET"][-1] == {"value": 1.0}
    # all heads with K and V are whole tensors again
    every = Graft([f"L1H{h}" for h in range(8)], kv="whole-group")
    assert export_graft(generations, every, tmp_path / "heads").recipe is not None
    for name, graft, reason in (
        ("head", Graft(["L1H1"]), "part of a tensor"),
        ("dare", Graft(["L0.mlp"], operator="dare"), "'dare' is computed or drawn differently"),
        ("slerp", Graft(["L0.mlp"], operator=Slerp(threshold=0.9)), "threshold"),
    ):
        made = export_graft(generations, graft, tmp_path / name)
        assert made.recipe is None and reason in made.manifest["recipe"]["reason"]
        assert not (made.folder / "mergekit.yaml").exists()


@pytest.mark.parametrize(
    ("graft", "tolerance"),
    [
        (Graft(["L0.mlp", "L3.attn", "L1.input_layernorm"]), 0),
        (Graft(["L0.mlp", "L3.attn"], [0.5, 1.5]), 1e-6),
        (Graft(["L0.mlp", "L3.attn"], 0.4, operator="slerp"), 1e-6),
        (Graft(["L0.mlp", "L3.attn"], 0.7, operator="ties"), 1e-6),
    ],
    ids=["replace", "strengths", "slerp", "ties"],
)
def test_mergekit_makes_the_same_model(generations: Pair, tmp_path: Path, graft: Graft, tolerance: float) -> None:
    program = os.environ.get("MERGEKIT_YAML") or shutil.which("mergekit-yaml")
    if not program:
        pytest.skip("mergekit is not installed: put mergekit-yaml on the PATH, or its path into MERGEKIT_YAML")
    made = export_graft(generations, graft, tmp_path / "export")
    assert made.recipe is not None
    text = made.recipe.read_text()
    for placeholder, name in (("SOURCE", "first"), ("TARGET", "second")):
        text = text.replace(f": {placeholder}\n", f": {models_folder() / 'family' / name}\n")
    (tmp_path / "recipe.yaml").write_text(text)
    subprocess.run([program, tmp_path / "recipe.yaml", tmp_path / "merged"], check=True, capture_output=True)
    ours = safetensors.torch.load_file(made.folder / "model.safetensors")
    theirs: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        theirs |= safetensors.torch.load_file(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        within = tolerance if name in made.differs else 0
        assert float((tensor - theirs[name]).abs().max()) <= within, name


# --- adapters ------------------------------------------------------------


def low_rank_pair(architecture: str, tokenizer: Any, rank: int = 3) -> Pair:
    """Two models whose linear layers differ by random matrices of a rank."""
    config, _ = ARCHITECTURES[architecture]
    target = LanguageModel("target", build(config(), 0), tokenizer)
    source = LanguageModel("source", build(config(), 0), tokenizer)
    generator = torch.Generator().manual_seed(1)
    for name in source.layout.linears.values():
        weight = source.hf.get_submodule(name).weight
        first, second = (torch.randn(n, rank, generator=generator) for n in weight.shape)
        weight.data += 0.2 * first @ second.T
    return make_pair(source, target)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "neox"])
def test_an_adapter_is_the_graft(generations: Pair, tmp_path: Path, architecture: str) -> None:
    import peft

    pair = low_rank_pair(architecture, generations.target.tokenizer)
    graft = Graft(["L0.mlp", "L1.attn"])
    made = export_adapter(pair, graft, tmp_path / "adapter")
    assert set(made.ranks.values()) == {3} and max(made.errors.values()) < 1e-5
    ids = torch.tensor([generations.target.tokenizer(PROBE)["input_ids"]])
    want, before = grafted_logits(pair, graft, ids), logits(pair.target.hf, ids)
    pair.target.hf.save_pretrained(tmp_path / "target")
    wrapped = peft.PeftModel.from_pretrained(loaded(tmp_path / "target"), tmp_path / "adapter")
    scale = float(want.abs().max())
    assert float((logits(wrapped, ids) - want).abs().max()) < 1e-5 * scale
    merged = logits(wrapped.merge_and_unload(), ids)
    assert float((merged - want).abs().max()) < 1e-5 * scale < float((before - want).abs().max())
    assert made.logit_difference < 1e-5 * scale
    # and by this package's own loader
    generations.target.tokenizer.save_pretrained(tmp_path / "target")
    model, _ = load_model(f"{tmp_path / 'target'} + {tmp_path / 'adapter'}")
    assert torch.equal(logits(model, ids), merged)
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert all(f"| {address} | 3 |" in card for address in made.ranks) and f"{made.logit_difference:.3g}" in card


def test_the_rank_is_the_smallest_within_the_tolerance(generations: Pair, tmp_path: Path) -> None:
    graft = Graft(["L0.up_proj"])
    difference = generations.source_parameters[MLP].double() - generations.target_parameters[MLP].double()
    values = torch.linalg.svdvals(difference)
    made = export_adapter(generations, graft, tmp_path / "adapter", max_rank=128, tolerance=0.3)
    rank = made.ranks["L0.up_proj"]

    def error(kept: int) -> float:
        return float(values[kept:].norm() / values.norm())

    assert error(rank) <= 0.3 < error(rank - 1) and made.errors["L0.up_proj"] == pytest.approx(error(rank), rel=1e-4)
    assert made.logit_difference > 0.01


def test_what_no_adapter_can_say_is_refused(generations: Pair, tmp_path: Path) -> None:
    fused = low_rank_pair("gpt2", generations.target.tokenizer)
    fused.source.hf.transformer.h[0].attn.c_attn.bias.data += 1
    for pair, graft, options, said in (
        (generations, Graft(["L0.mlp", "L1.mlp"]), {"max_rank": 8}, r"L0\.gate_proj .* needs rank \d+ .* max_rank"),
        (generations, Graft(["L0.input_layernorm"]), {}, "input_layernorm.weight differs, and a LoRA holds only"),
        (generations, Graft(["embed_tokens"]), {}, "embed_tokens.weight differs"),
        (fused, Graft(["L0.attn"]), {}, r"c_attn\.bias differs"),
        (generations, Graft(["L0.mlp"], 0.0), {}, "moves nothing"),
        (generations, Graft(["L0.mlp"]), {"tolerance": 0}, "tolerance is a relative error"),
        (generations, Graft(["L0.mlp"]), {"max_rank": 0}, "max_rank must be a whole number"),
    ):
        with pytest.raises(UsageError, match=said):
            export_adapter(pair, graft, tmp_path / "adapter", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# --- a real model, and other tools ------------------------------------------------------------


@pytest.mark.needs_smollm2
def test_smollm2_in_transformers_and_in_a_fresh_bridge(smollm2: Pair, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    graft = Graft(["L3.mlp", "L12.attn", "L20H4"])
    made = export_graft(smollm2, graft, tmp_path / "model")
    ids = torch.tensor([smollm2.target.tokenizer(PROBE)["input_ids"]])
    with graft.applied(smollm2), torch.no_grad():
        want, in_bridge = smollm2.target.hf(ids).logits, smollm2.target.bridge(ids)
    model, tokenizer = loaded(made.folder), transformers.AutoTokenizer.from_pretrained(made.folder)
    assert tokenizer(PROBE)["input_ids"] == ids[0].tolist()
    assert float((logits(model, ids) - want).abs().max()) <= 1e-5
    bridge = TransformerBridge.boot_transformers(str(made.folder), hf_model=model, tokenizer=tokenizer)
    with torch.no_grad():
        fresh = bridge(ids)
    assert float((fresh - in_bridge).abs().max()) <= 1e-5
    # a bridge computes attention by another order of sums than transformers' default
    assert float((fresh - want).abs().max()) <= 1e-5 * float(want.abs().max())
    found = verify_export(made.folder, smollm2)
    assert found.ok and found.checked["numbers compared with the models"] == 134_515_008, str(found)
    assert made.manifest["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.needs_smollm2
def test_smollm2_as_an_adapter(smollm2: Pair, tmp_path: Path) -> None:
    import peft

    graft = Graft(["L12.attn"])
    made = export_adapter(smollm2, graft, tmp_path / "adapter")
    # the two generations differ by one LoRA of rank 16
    assert set(made.ranks.values()) == {16} and max(made.errors.values()) < 1e-4
    wrapped = peft.PeftModel.from_pretrained(Graft([]).copied(smollm2).hf, made.folder)
    ids = torch.tensor([smollm2.target.tokenizer(PROBE)["input_ids"]])
    assert float((logits(wrapped.merge_and_unload(), ids) - grafted_logits(smollm2, graft, ids)).abs().max()) < 1e-3
    assert made.logit_difference < 1e-3


def test_lm_eval_runs_on_an_export(
    exported: Path, generations: Pair, addition: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's verdicts and log-probabilities of 50 sums, question by question, are ours."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    test = addition.subset(range(50))
    rows = [{"question": e.question, "answer": e.answer} for e in test.examples]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}<eos>",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    }
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "dtype": "float32", "add_bos_token": True},
        tasks=[task],
        device="cpu",
        batch_size=10,
        log_samples=True,
    )
    with Graft(MIXED).applied(generations):
        ours = evaluate(generations.target, test, "teacher-forced")
    samples = sorted(found["samples"]["sums"], key=lambda s: s["doc_id"])
    theirs = torch.tensor([float(s["filtered_resps"][0][0]) for s in samples])
    assert ours.log_probability is not None
    torch.testing.assert_close(theirs, torch.tensor(ours.log_probability).float(), atol=1e-4, rtol=0)
    assert [bool(s["acc"]) for s in samples] == ours.correct.tolist() and 0 < ours.accuracy < 1
    assert found["results"]["sums"]["acc,none"] == pytest.approx(ours.accuracy)
