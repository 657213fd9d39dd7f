"""Checks of weight files: hashes, whole safetensors, and folders that hold no pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from mechtransplant.errors import WeightsError


def sha256_of(path: Path) -> str:
    """The file's sha256, 64 hexadecimal digits."""
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
    at.write_text(json.dumps({name: sha256_of(folder / name) for name in names}, indent=2) + "\n", encoding="utf-8")
    return at


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises WeightsError for anything else."""
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
    for name, wanted in read_json(folder / "hashes.json").items():
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name} is missing: restore it (git checkout), or run the script that made it")
        if sha256_of(folder / name) != wanted:
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


def check_folder(folder: Path, config: str) -> Path:
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
        shards = sorted({folder / str(name) for name in read_json(index).get("weight_map", {}).values()})
        files = sorted({*files, *shards})
    for file in files:
        check_safetensors(file)
    _check_hashes(folder)
    return folder
