"""The directions of shifts: one vector a prompt and module, kept in a temporary file, so that memory does not grow.

A shift vector is the mean over positions of a^S − a^T. Heads are kept in coordinates with the same inner products
(``heads``), so that a head takes 2 · d_head numbers instead of d_model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UnknownNameError
from mechtransplant.shifts.frames import shift_frame
from mechtransplant.weights.tensor_file import no_room, temporary_file

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.activations import Positions, Text
    from mechtransplant.pair import Pair
    from mechtransplant.tasks import Task

Floats = NDArray[np.float64]
FEWEST_PROJECTED = 7
WHAT = "shift vectors"


@dataclass
class ShiftVectors:
    """Shift vectors of every module on every prompt; ``widths`` maps module → numbers a vector.

    The file holds 4 · prompts · sum of widths bytes and goes away with the object.
    """

    widths: dict[str, int]
    prompts: int
    file: IO[bytes]

    @classmethod
    def empty(cls, widths: dict[str, int], prompts: int) -> ShiftVectors:
        """Room for the vectors, in the system's temporary folder."""
        size = 4 * prompts * sum(widths.values())
        file = temporary_file(WHAT, size)
        try:
            file.truncate(size)
        except OSError as error:
            raise no_room(WHAT, size, error) from error
        return cls(widths, prompts, file)

    def __del__(self) -> None:
        self.file.close()

    @property
    def modules(self) -> list[str]:
        """The addresses."""
        return list(self.widths)

    def write(self, first: str, prompts: list[int], vectors: NDArray[np.float32]) -> None:
        """Store the vectors, of shape (prompts, numbers), of modules that follow each other from ``first`` on."""
        offset, total = self._offset(first), sum(self.widths.values())
        try:
            for prompt, row in zip(prompts, np.ascontiguousarray(vectors, dtype=np.float32), strict=True):
                os.pwrite(self.file.fileno(), row.tobytes(), 4 * (prompt * total + offset))
        except OSError as error:
            raise no_room(WHAT, 4 * self.prompts * total, error) from error

    def _offset(self, module: str) -> int:
        if module not in self.widths:
            raise UnknownNameError("module", module, self.widths, "These vectors hold the kinds that were asked for.")
        return self._offsets[module]

    @cached_property
    def _offsets(self) -> dict[str, int]:
        ends = accumulate(self.widths.values(), initial=0)
        return dict(zip(self.widths, ends, strict=False))

    def of(self, module: str) -> Floats:
        """One module's vectors, shape (prompts, numbers); heads in coordinates that keep inner products."""
        start, total = self._offset(module), sum(self.widths.values())
        whole = np.memmap(self.file, np.float32, "r", shape=(self.prompts, total))  # type: ignore[call-overload]
        return np.array(whole[:, start : start + self.widths[module]], dtype=np.float64)

    def gram(self, module: str) -> Floats:
        """Inner products of all pairs of prompts' vectors, shape (prompts, prompts)."""
        vectors = self.of(module)
        return np.asarray(vectors @ vectors.T)

    def alignment(self, module: str) -> Floats:
        """Cosine of each prompt's vector with the mean of the others'; NaN where either is 0. Shape (prompts,)."""
        vectors = self.of(module)
        total = vectors.sum(0)
        with_all, squares = vectors @ total, np.square(vectors).sum(1)
        others = np.maximum(total @ total - 2 * with_all + squares, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = (with_all - squares) / np.sqrt(squares * others)
        # where the others cancel, what is left is rounding
        lost = (squares == 0) | (others <= 1e-12 * squares.sum())
        return np.where(lost, np.nan, np.clip(cosine, -1, 1))

    def halves(self, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(prompts that fix the direction, prompts that are projected on it)."""
        return halves(self.prompts, seed)

    def projection(self, module: str, seed: int = 0) -> Floats:
        """Projection of the second half's vectors on the direction of the first half's mean; NaN in the first half.

        Only one half is projected: directions fitted on either half depend on the same inner product of the two
        means, and pooling both would count one piece of evidence twice.
        """
        return projected(self.of(module), *self.halves(seed))

    def frame(self, measure: str, seed: int = 0) -> pd.DataFrame:
        """A tidy frame of "alignment" or "projection": module, kind, layer, head, prompt, measure, value."""
        if measure == "alignment":
            return shift_frame(self.modules, measure, np.stack([self.alignment(m) for m in self.modules]))
        # the half that fixed the direction has no projection
        _, project = self.halves(seed)
        values = np.stack([self.projection(m, seed)[project] for m in self.modules])
        return shift_frame(self.modules, measure, values, project)


def halves(prompts: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random division of the prompts: (those that fix a direction, those that are projected on it).

    Halves, but at least seven are projected where there are eight: with fewer no sign-flip p-value is far below 0.05.
    """
    order = np.random.default_rng(seed).permutation(prompts)
    fit = min(prompts // 2, max(1, prompts - FEWEST_PROJECTED))
    return np.sort(order[:fit]), np.sort(order[fit:])


def projected(vectors: Floats, fit: NDArray[np.int64], project: NDArray[np.int64]) -> Floats:
    """Some prompts' vectors projected on the direction of the others' mean, shape (prompts,); NaN for the others."""
    direction = vectors[fit].mean(0)
    length = np.linalg.norm(direction)
    values = np.full(len(vectors), np.nan)
    values[project] = vectors[project] @ direction / length if length > 0 else 0.0
    return values


def shift_vectors(
    pair: Pair,
    task: Task,
    kinds: str | Iterable[str] = ("head", "mlp"),
    positions: Positions = "all",
    *,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> ShiftVectors:
    """The shift vectors of every module on every prompt: what :func:`localization.consistency` reads.

    Arguments are those of :func:`measure_shifts`.
    """
    from mechtransplant.shifts.collector import Collector, PromptValues
    from mechtransplant.shifts.measure import check_pair, collect

    check_pair(pair, task)
    collector = Collector(pair, len(task), kinds, (), PromptValues(len(task)), with_vectors=True)
    collect(pair, task, collector, positions, text, max_new_tokens, batch_size, "left", progress)
    assert collector.vectors is not None
    return collector.vectors
