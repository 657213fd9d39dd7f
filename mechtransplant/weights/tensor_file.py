"""Tensors in a file of the temporary folder, for what memory is too small for; it goes away with its process.

They are mapped into memory: pages are read when they are first used, and the system may drop them again.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError

if TYPE_CHECKING:
    import torch

#: no number of any dtype lies across two of these
ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file, and what it is."""

    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def temporary_file(what: str, bytes: int = 0) -> Any:
    """An open file without a name, for so many bytes; raises UsageError where the disk has less room."""
    # a file with holes would only fail when they are filled
    if bytes > shutil.disk_usage(tempfile.gettempdir()).free:
        raise no_room(what, bytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    return tempfile.TemporaryFile(prefix="mechtransplant-")


def no_room(what: str, bytes: int, error: OSError) -> UsageError:
    """The error of a temporary file that could not be written."""
    return UsageError(
        f"no room for {bytes:,} bytes of {what} in {tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a folder "
        "that has it"
    )


class TensorFile:
    """A file of tensors without a name, so that nothing is left of it, however the process ends.

    ``bytes``: how many are known to be needed; raises UsageError where the disk has less room, then and later.
    """

    def __init__(self, what: str, bytes: int = 0) -> None:
        self.what, self.size = what, 0
        self.file: Any = temporary_file(what, bytes)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def add(self, tensor: torch.Tensor) -> Place:
        """Put a tensor behind those that are there."""
        offset = -(-self.size // ALIGNMENT) * ALIGNMENT
        place = Place(offset, tensor.numel() * tensor.element_size(), tensor.dtype, tuple(tensor.shape))
        self.put(place, tensor)
        return place

    def put(self, place: Place, tensor: torch.Tensor) -> None:
        """Write a tensor to its place."""
        bits: Any = bits_of(tensor).numpy()
        left = memoryview(bits)
        try:
            while left:
                # the system takes at most 2 GiB at once
                left = left[os.pwrite(self.file.fileno(), left, place.offset + place.bytes - len(left)) :]
        except OSError as error:
            raise no_room(self.what, place.offset + place.bytes, error) from error
        self.size = max(self.size, place.offset + place.bytes)

    def read(self, place: Place) -> torch.Tensor:
        """A tensor in memory of its own."""
        import torch

        bits: Any = np.empty(place.bytes, np.uint8)
        left = memoryview(bits)
        while left:
            left = left[os.preadv(self.file.fileno(), [left], place.offset + place.bytes - len(left)) :]
        return torch.from_numpy(bits).view(place.dtype).reshape(place.shape)

    def mapped(self) -> TensorMap:
        """The file as it is now."""
        return TensorMap(self)


class TensorMap:
    """A file's tensors, mapped: what is written to them stays in memory and is not seen by other maps.

    The mapping ends when its last tensor is gone.
    """

    def __init__(self, file: TensorFile) -> None:
        self.bytes: Any = np.memmap(file.file, np.uint8, "c", shape=(file.size,))

    def __getitem__(self, place: Place) -> torch.Tensor:
        import torch

        flat = torch.from_numpy(self.bytes[place.offset : place.offset + place.bytes])
        return flat.view(place.dtype).reshape(place.shape)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, flat; of one on the CPU not copied."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
