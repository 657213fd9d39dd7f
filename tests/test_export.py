"""An exported graft is the graft, appears whole or not at all, and its card says what is known."""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
import yaml
from architectures import ARCHITECTURES, LLAMA, random_pair_of
from exports import MIXED, ROOT, edited_config, grafted_logits, loaded, logits

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import Outcome, compare, evaluate
from mechtransplant.export import export_adapter, export_graft, finished_run, verify_export
from mechtransplant.export import folder as export_folder
from mechtransplant.export.adapter import PROBE
from mechtransplant.grafting import Graft
from mechtransplant.grafting.operators import Dare, Slerp
from mechtransplant.pair import LanguageModel, Pair, load_pair, make_pair
from mechtransplant.tasks import Task
from mechtransplant.weights import fingerprint, models_folder, takes_turns

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
        Graft(["L0", "L1.mlp"], [0.0, 2.0]),
        Graft(["L0H0", "L0H1", "L2.attn"], [0.25, 0.25, -1.0], kv="whole-group"),
        Graft(["L0.mlp"], 0.5, operator=Slerp()),
        Graft(["L0.mlp", "L1H3"], 0.8, operator=Dare(density=0.3, seed=5)),
        Graft(["L0.mlp"], 0.8, operator="ties"),
    ],
    ids=["strengths", "heads", "slerp", "dare", "ties"],
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
    with pytest.raises(UsageError, match="graft is a Graft, got list"):
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
    saved = json.loads((run / "outcome.json").read_text(encoding="utf-8"))["16"]
    ratio = f"TIR (this model / target): {saved['tir']:.3f}"
    what = "questions of boxed (the run's test split, which chose nothing; at most 16 new tokens)"
    assert ratio in card and f"{saved['n']} {what}" in card
    assert f"among {saved['controls']['n']} random sets matched" in card and "random orders: p = " in card
    # what the run measured elsewhere
    assert "| addition |" in card and "| perplexity |" in card.replace("perplexity of", "perplexity")
    assert command("verify", str(tmp_path / "out"), "--pair", "family/instruct")[0] == 0
    found = finished_run(run)
    export_adapter(found.pair, Graft(["L3H2"]), tmp_path / "adapter", outcome=found.outcome, name="Mine")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "# Mine" in card and ratio in card
    assert found.outcome.curve is not None and found.outcome.curve.area_rank.n == found.outcome.curve.n
    assert found.side_effects and set(found.side_effects) >= {"addition", "KL"}
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


def test_a_runs_graft_is_made_where_the_run_was(tmp_path: Path) -> None:
    run = Path(shutil.copytree(ROOT / "runs" / "family-instruct", tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())

    def ran_with(**changes: Any) -> Pair:
        (run / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
        return finished_run(run).pair

    sums = []
    for name, changes in (("here", {}), ("turns", {"one_at_a_time": True}), ("map", {"device_map": {"": "cpu"}})):
        found = ran_with(**changes)
        export_graft(found, finished_run(run).graft, tmp_path / name)
        sums.append(json.loads((tmp_path / name / "manifest.json").read_text())["tensors"])
    assert sums[0] == sums[1] == sums[2]
    assert takes_turns(ran_with(one_at_a_time=True).target.hf)
    assert ran_with(device_map={"": "cpu"}).target.hf.hf_device_map == {"": "cpu"}
    if torch.cuda.is_available():
        assert ran_with(device="cuda").target.hf.device.type == "cuda"
        return
    with warnings.catch_warnings():
        # most operators round alike everywhere
        warnings.simplefilter("error")
        elsewhere = [
            {"device": "auto"},
            {"device": "cuda"},
            {"device": "cuda:1"},
            {"device_map": "auto"},
            {"device_map": {"": 0}},
        ]
        for gone in [*elsewhere, *([] if torch.backends.mps.is_available() else [{"device": "mps"}])]:
            pair = ran_with(**gone)
            assert pair.target.hf.device.type == "cpu" and not hasattr(pair.target.hf, "hf_device_map")
    assert takes_turns(ran_with(device="cuda", one_at_a_time=True).target.hf)
    for broken in ({"device": "cuda:first"}, {"device": "none"}, {"device_map": "balanced"}):
        with pytest.raises(UsageError, match="no finished run that can be read"):
            ran_with(**broken)
    chosen = json.loads((run / "outcome.json").read_text())
    chosen["16"] |= {"operator": "low_rank"}
    (run / "outcome.json").write_text(json.dumps(chosen))
    with pytest.warns(UserWarning, match="the run was on cuda, .* low_rank rounds a little otherwise"):
        ran_with(device="cuda")


def test_a_run_with_an_ancestor_exports_its_graft(
    command: Callable[..., tuple[int, str, str]], instruct: Pair, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(ROOT / "runs" / "family-instruct", tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    names = {"source": instruct.source.name, "target": instruct.target.name, "base": "repo:family/second"}
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "pair": names}))
    environment = json.loads((run / "environment.json").read_text())
    ancestor = load_pair("family/generations").target.fingerprint
    measured = {**environment["weights"], "base": ancestor}

    def ran_with(weights: dict[str, str]) -> None:
        (run / "environment.json").write_text(json.dumps({**environment, "weights": weights}))

    ran_with(measured)
    code, _, error = command("export", str(tmp_path / "out"), "--run", str(run))
    assert code == 0, error
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["pair"]["base"]["fingerprint"] == ancestor
    # a run that took the better of the two for its source
    turned = {"source": measured["target"], "target": measured["source"]}
    ran_with({**turned, "base": ancestor})
    found = finished_run(run).pair
    assert found.target.name == names["source"] and found.base is not None
    # another ancestor, or none
    for weights in ({**measured, "base": "0" * 16}, {**turned, "base": "0" * 16}, turned, environment["weights"]):
        ran_with(weights)
        with pytest.raises(UsageError, match="are not those that its run measured"):
            finished_run(run)


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


def test_what_an_export_is_given_belongs_together(generations: Pair, addition: Task, tmp_path: Path) -> None:
    splits = addition.split(8, 8, 32)
    found = evaluate(generations.target, splits.test)
    outcome = compare(found, found, found)
    graft, out = Graft(["L0.mlp"]), tmp_path / "out"
    for given, options, message in (
        (generations.target, {}, "pair is a Pair, got LanguageModel"),
        (generations, {"outcome": found}, "outcome is a Outcome, got Evaluation"),
        (generations, {"task": splits}, "task is a Task, got Splits"),
        (generations, {"outcome": outcome, "task": splits.choose}, "outcome is of other questions"),
    ):
        with pytest.raises(UsageError, match=message):
            export_graft(given, graft, out, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is nothing to export"):
        export_graft(generations, Graft([]), out)
    assert not out.exists()
    effects = {"addition": outcome, "sort": "not measured"}
    made = export_graft(generations, graft, out, outcome=outcome, task=splits.test, side_effects=effects)
    card = (out / "README.md").read_text(encoding="utf-8")
    # whether they chose the graft, the outcome cannot know
    assert "On 32 questions of addition (split `test`):" in card and "did not serve" not in card
    low, high = (100 * end for end in outcome.interval)
    assert "| addition |" in card and f"+0.0 [{low:.3g}, {high:.3g}]" in card and "| not measured |" in card
    assert len(repr(made)) < 500
