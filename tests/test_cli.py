"""The command line: wrong input of every kind prints one line, exits with code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mechtransplant import cli
from mechtransplant.pair import LanguageModel
from mechtransplant.weights import models_folder, write_hashes

Run = Callable[..., tuple[int, str, str]]


def refused(command: Run, folder: Path, config: str, message: str) -> None:
    """The config is refused with one line that holds ``message``, and no run folder is made."""
    (folder / "c.yaml").write_text(config)
    code, _, error = command("run", str(folder / "c.yaml"), "--out", str(folder / "out"))
    assert code == 2, error
    assert message in error and len(error.strip().splitlines()) == 1, error
    assert str(folder / "c.yaml") in error and not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "See mechtransplant run --help."),
        (["run", "c.yaml", "--outt", "x"], "No such option: --outt"),
        (["rum"], "No such command 'rum'"),
        (["effects", "family/generations", "--prompts", "x"], "Invalid value for '--prompts'"),
        (["run", "nowhere.yaml"], "no config at nowhere.yaml"),
        (
            ["export", "out/x", "--modules", "L0.mlp", "--max-rank", "8"],
            "--max-rank is of adapters: give --adapter too",
        ),
        (["export", "out/x", "--tolerance", "0.1"], "--tolerance is of adapters"),
        (["export", "out/x", "--adapter", "--shard-size", "1GB"], "--shard-size is of whole models: leave it out"),
        (
            ["verify", "out/x", "--target", "repo:family/second", "--base", "repo:family/first"],
            "--base is compared with",
        ),
        (
            ["bench", "planted", "--out", "out/x", "--rules", "lae", "--options", '{"greedy": {"pool": 4}}'],
            "--options names greedy, which is none of --rules",
        ),
        (
            ["bench", "planted", "--out", "out/x", "--rules", "lae", "--single", "greedy"],
            "--single names greedy, which is none of --rules",
        ),
        (
            ["heads-vs-mlps", "family/planted-mixed-drifted", "--rule", "pruned", "--out", "out/x"],
            "rule 'pruned' gives every module a strength of its own, and this study grafts all at one",
        ),
    ],
)
def test_usage_mistakes_get_one_line(command: Run, arguments: list[str], message: str) -> None:
    code, out, error = command(*arguments)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1 and not out


def test_an_interrupt_says_what_is_left(command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.analyses, "_run", interrupted)
    (tmp_path / "c.yaml").write_text("pair: family/generations\n")
    code, _, error = command("run", str(tmp_path / "c.yaml"))
    assert code == 130 and "interrupted; nothing half-written is left" in error and "goes on" in error


def test_the_demo_runs(command: Run, tmp_path: Path) -> None:
    code, out, error = command("demo", "--out", str(tmp_path / "demo"))
    assert code == 0, error
    assert "**Verdict.**" in out and "Next: mechtransplant report" in out
    assert (tmp_path / "demo" / "figures" / "k_curve.png").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("pair: family/generation\n", "unknown pair"),
        ("pair: family/generations\ntask: adition\n", "unknown task"),
        ("pair: family/generations\nrule: leo\n", "unknown rule"),
        ("pair: family/generations\nkk: 3\n", "unknown key 'kk'"),
        (
            "pair: family/generations\nside_effects: {questions: 0, tasks: [sort]}\n",
            "named and questions is 0",
        ),
        ("pair: family/generations\nk: 999\n", "above the 28 candidates"),
        ("pair: family/generations\nsplit: {test: 99999}\n", "ask for fewer"),
        ("pair: family/generations\nrule_options: {alignment: sideways}\n", "unknown alignment"),
        ("pair: family/generations\ntask: {name: addition, format: {chat: true}}\n", "the tokenizer has none"),
        ("pair: family/generations\ntask: {name: addition, format: {question: 'Q:'}}\n", "has no {question}"),
        ("pair: family/generations\ntask: {name: addition, format: {shot: []}}\n", "did you mean shots"),
        ("pair: family/generations\nrule_options: {seed: 1}\n", "seed is no option of a rule"),
        ("pair: family/generations\nrule_options: {max_new_tokens: 0}\n", "at least 1, got 0"),
        ("pair: family/generations\nrule_options: {batch_size: 2.5}\n", "at least 1, got 2.5"),
        ("pair: family/generations\ndevice: meta\n", "device"),
        ("pair: family/generations\nseed: -1\n", "seed"),
        ("pair: family/generations\nkv: always\n", "kv"),
        ("pair: family/generations\noperator: slrep\n", "did you mean slerp"),
        ("pair: family/generations\noperator: {name: ties, densty: 0.1}\n", "did you mean density"),
        ("pair: family/generations\noperator: {name: ties, density: 2}\n", "density"),
        ("pair: family/generations\noperator: {density: 0.1}\n", "unknown operator"),
        ("pair: family/generations\nside_effects: {question: 3}\n", "did you mean questions?"),
        ("pair: family/generations\nsplit: {task: 3}\n", "unknown key 'split.task': known: discover, choose"),
        ("pair: family/generations\nchoose: 4\n", "unknown key 'choose'"),
        ("pair: family/generations\nrandoms: 3\n", "did you mean random_sets?"),
        ("pair: family/generations\nk: [1.5]\n", "k = 1.5: give whole numbers"),
        ("pair: family/generations\nk: [true]\n", "k: expected numbers"),
        ("pair: family/generations\nkind: neurons\n", "kind: Input should be 'linear'"),
        ("pair: family/generations\nname: ../elsewhere\n", "it has no slash"),
        ("pair: family/generations\nk: 3\npair: family/instruct\n", "line 3: not valid YAML (the key 'pair' is given"),
        ("pair: [\n", "not valid YAML"),
        ("- 1\n", "expected keys"),
        ("task: addition\n", "pair"),
        ("pair: family/generations\ntask: {name: DIR/empty.jsonl}\n", "is empty"),
        ("pair: family/generations\ntask: {name: DIR/broken.jsonl}\n", "line 2: broken JSON"),
        ("pair: family/generations\ntask: {name: DIR/missing.jsonl}\n", "line 2: field 'answer' is missing"),
        ("pair: family/generations\ntask: {name: DIR/nowhere.jsonl}\n", "no task file"),
        ("pair: {source: 'repo:family/first', target: DIR/nowhere}\n", "nowhere"),
        ("pair: {source: 'repo:family/first', target: 'repo:family/third'}\n", "known: "),
        ("pair: {source: 'repo:family/first', target: 'package:other'}\n", "unknown package"),
        ("pair: {source: 'repo:family/first', target: some-org/some-model}\n", "no network or no such model"),
        ("pair: {source: 'repo:family/first', target: DIR/truncated}\ntask: addition\n", "truncated"),
        ("pair: {source: 'repo:family/first', target: DIR/changed}\ntask: addition\n", "sha256"),
        ("pair: {source: 'repo:family/first', target: DIR/small}\ntask: addition\n", "hidden_size"),
        ("pair: {source: 'repo:family/first', target: DIR/words}\ntask: addition\n", "tokenizer vocabulary"),
        ("pair: {source: 'repo:family/first', target: DIR/packed}\ntask: addition\n", "still quantised"),
    ],
)
def test_wrong_configs(
    command: Run, tmp_path: Path, random_model: Callable[..., LanguageModel], config: str, message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question": \n')
    (tmp_path / "missing.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question": "1"}\n')
    bad_models(tmp_path, random_model, config)
    refused(command, tmp_path, config.replace("DIR", str(tmp_path)), message)


def bad_models(folder: Path, random_model: Callable[..., LanguageModel], config: str) -> None:
    """The model folder that the config names, broken in the way that its name says."""
    second = models_folder() / "family" / "second"
    if "DIR/truncated" in config:
        copy = Path(shutil.copytree(second, folder / "truncated"))
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        write_hashes(copy)
    if "DIR/changed" in config:
        copy = Path(shutil.copytree(second, folder / "changed"))
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (copy / "model.safetensors").write_bytes(content)
    if "DIR/small" in config:
        model = random_model(0)
        model.hf.save_pretrained(folder / "small")
        model.tokenizer.save_pretrained(folder / "small")
    if "DIR/words" in config:
        copy = Path(shutil.copytree(second, folder / "words"))
        tokenizer = json.loads((copy / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
        (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
        write_hashes(copy)
    if "DIR/packed" in config:
        copy = Path(shutil.copytree(second, folder / "packed"))
        settings = json.loads((copy / "config.json").read_text())
        settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (copy / "config.json").write_text(json.dumps(settings))
        write_hashes(copy)


def test_no_config_and_an_occupied_folder(command: Run, tmp_path: Path) -> None:
    code, _, error = command("run", str(tmp_path / "none.yaml"))
    assert code == 2 and "no config at" in error
    (tmp_path / "c.yaml").write_text("pair: family/generations\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    code, _, error = command("run", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"))
    assert code == 2 and "not empty" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_out_that_is_a_file_or_cannot_be_made(command: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("pair: family/generations\n")
    code, _, error = command("run", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "c.yaml"))
    assert code == 2 and "is a file" in error
    code, _, error = command("run", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "c.yaml" / "inside"))
    assert code == 2 and "cannot write to" in error and len(error.strip().splitlines()) == 1


def test_a_device_on_the_command_line(command: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("pair: family/generations\n")
    screen = tmp_path / "s.yaml"
    screen.write_text("pair: family/generations\nrules: [weight_delta]\nshares: [0.5]\ntexts: 0\n")
    for verb, config in (("run", tmp_path / "c.yaml"), ("screen", screen)):
        code, _, error = command(verb, str(config), "--out", str(tmp_path / "out"), "--device", "cudo")
        assert code == 2 and "cannot use device 'cudo'" in error and not (tmp_path / "out").exists()
    small = ("--out", str(tmp_path / "out"), "--device", "cpu:0")
    screen.write_text(screen.read_text() + "split: {discover: 4, choose: 4, test: 4}\n")
    assert command("screen", str(screen), *small)[0] == 0
    # where this start ran is no part of what it found
    assert "cpu:0" not in (tmp_path / "out" / "best.yaml").read_text()


def test_unknown_commands_and_pairs(command: Run) -> None:
    assert command("runn")[0] == 2
    code, _, error = command("pairs", "show", "family/generation")
    assert code == 2 and "did you mean family/generations" in error


def test_lists(command: Run) -> None:
    for arguments, expected in (
        (("pairs", "list"), "smollm2/generations"),
        (("tasks",), "arithmetic"),
        (("rules",), "lae"),
        (("--version",), "0."),
    ):
        code, out, _ = command(*arguments)
        assert code == 0 and expected in out


def test_show_prints_the_compatibility_report(command: Run) -> None:
    code, out, _ = command("pairs", "show", "family/generations")
    assert code == 0 and "28 linear layers of equal name and shape" in out and "stays the target's" in out


def test_fetch_prints_where_the_weights_are(command: Run) -> None:
    code, out, _ = command("pairs", "fetch", "family/instruct")
    assert code == 0 and "family/instruct" in out.splitlines()[0] and out.startswith("source: ")


def test_fetch_and_show_take_model_specs(command: Run) -> None:
    code, out, _ = command("pairs", "fetch", "repo:family/first")
    assert code == 0 and out.startswith("model: ")
    code, out, _ = command("pairs", "show", "--source", "repo:family/instruct", "--target", "repo:family/second")
    assert code == 0 and "28 linear layers" in out
    assert command("pairs", "show")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("family/planted-mixd",), "did you mean family/planted-mixed"),
        (("family/generations", "--kinds", "head,neuron"), "unknown kind of module 'neuron'"),
        (("family/generations", "--heads", "q"), "expected z or result"),
        (("family/generations", "--kv", "grouped"), "did you mean group"),
        (("family/generations", "--prompts", "0"), "prompts must be a whole number"),
        (("family/generations", "--task", "adition"), "did you mean addition"),
    ],
)
def test_wrong_effects(command: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, error = command("effects", *arguments, "--out", str(tmp_path / "out"))
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_effects_prints_its_page(command: Run, tmp_path: Path) -> None:
    arguments = ("family/generations", "--prompts", "4", "--kinds", "mlp", "--out", str(tmp_path / "out"))
    code, out, _ = command("effects", *arguments)
    assert code == 0 and "| mlp | 4 |" in out and (tmp_path / "out" / "effects.csv").is_file()
    assert command("effects", *arguments)[1] == out
