"""Tensors as bytes: where they lie in safetensors files, and their hashes; no tensor library is needed to read them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechtransplant.errors import WeightsError
from mechtransplant.weights import check_safetensors

#: safetensors' names of the types that weights and buffers have, with torch's name and the bytes of one number
TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file: its type and shape, and the bytes ``start`` to ``stop`` of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def sha256(self) -> str:
        """The hash of the tensor's bytes, read now."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file; raises WeightsError for a file that no reader could make sense of."""
    header, begin = check_safetensors(path)
    found = {}
    end = 0
    try:
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in sorted(entries, key=lambda e: e[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            dtype, width = TYPES[entry["dtype"]]
            shape = tuple(int(n) for n in entry["shape"])
            if start != end or stop - start != width * math.prod(shape):
                raise ValueError(f"{name} has other bytes than its shape needs")
            found[name] = Stored(path, dtype, shape, begin + start, begin + stop)
            end = stop
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} has a header that is no safetensors header ({error}): fetch it again") from error
    return found


def tensor_sha256(tensor: Any) -> str:
    """The hash of a tensor's bytes, as a safetensors file would hold them."""
    import torch

    whole = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(whole.view(torch.uint8).numpy().data).hexdigest()


def dtype_name(tensor: Any) -> str:
    """torch's name of a tensor's type: ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def file_sha256(path: Path) -> str:
    """The hash of a whole file."""
    return Stored(path, "uint8", (), 0, path.stat().st_size).sha256
