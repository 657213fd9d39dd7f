"""Activation caches by TransformerLens names and shapes, in memory or streamed to a folder of safetensors.

``cache["blocks.5.attn.hook_z"]`` has shape (prompt, pos, head, d_head), where pos counts the chosen positions of a
prompt from the left. Prompts differ in length, and the rest of a row is NaN: a mean that forgets the mask is NaN, never
wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.activations.reading import Batch, Positions, plan_reading
from mechtransplant.errors import UnknownNameError, UsageError
from mechtransplant.evaluation.batches import make_ready
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import torch

    from mechtransplant.pair import LanguageModel

#: one head's write to the residual stream, z @ W_O: computed from z when it is asked for
RESULT = "attn.hook_result"
DEFAULT_HOOKS = ("attn.hook_z", "hook_mlp_out")
INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class ActivationCache:
    """Activations of one model on one task; only the chosen positions, no padding.

    ``names`` are TransformerLens hook names; ``lengths`` (prompts,) how many positions each prompt has; ``tokens`` the
    token ids at those positions; ``model``, ``weights`` and ``task`` say what was cached (name and fingerprints).
    Each part of ``parts`` is one batch: tensors by name, or the file that holds them; ``places`` (prompts, 2) is each
    prompt's part and its first row there.
    """

    names: tuple[str, ...]
    positions: str
    model: str
    weights: str
    task: str
    tokens: tuple[tuple[int, ...], ...]
    places: NDArray[np.int64]
    parts: list[dict[str, torch.Tensor] | Path] = field(repr=False)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many positions each prompt has, shape (prompts,)."""
        return np.array([len(t) for t in self.tokens])

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which positions are there, shape (prompts, longest)."""
        return np.arange(self.lengths.max())[None, :] < self.lengths[:, None]

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def keys(self) -> tuple[str, ...]:
        """The hook names."""
        return self.names

    def __getitem__(self, name: str) -> torch.Tensor:
        """One hook's activations of shape (prompt, pos, …), NaN where a prompt is shorter than the longest."""
        import torch

        rows = [self.prompt(i, name) for i in range(len(self))]
        # token ids are whole numbers, which have no NaN
        kind = rows[0].dtype if rows[0].is_floating_point() else torch.float32
        dense = torch.full((len(rows), int(self.lengths.max()), *rows[0].shape[1:]), torch.nan, dtype=kind)
        for at, row in enumerate(rows):
            dense[at, : len(row)] = row
        return dense

    def prompt(self, number: int, name: str) -> torch.Tensor:
        """One hook's activations of one prompt, shape (pos, …), read from the disk if the cache is there."""
        self._check(name)
        if not 0 <= number < len(self):
            raise UsageError(f"there is no prompt {number}: this cache has prompts 0 to {len(self) - 1}")
        part, start = (int(v) for v in self.places[number])
        return self._rows(part, name, start, start + len(self.tokens[number]))

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise UnknownNameError("hook", name, self.names, "The cache holds what hooks= asked for.")

    def _rows(self, part: int, name: str, start: int, stop: int) -> torch.Tensor:
        held = self.parts[part]
        if isinstance(held, dict):
            return held[name][start:stop]
        import safetensors

        try:
            with safetensors.safe_open(held, "pt") as file:
                return file.get_slice(name)[start:stop]
        except (OSError, safetensors.SafetensorError) as error:
            raise UsageError(f"{held} cannot be read ({error}): cache the activations again") from error

    def __repr__(self) -> str:
        where = "in memory" if isinstance(self.parts[0], dict) else f"in {Path(self.parts[0]).parent}"
        counted = int(self.lengths.sum())
        return (
            f"ActivationCache({self.model!r}, {len(self.names)} hooks, {len(self)} prompts, {counted} positions "
            f"({self.positions}), {where})"
        )


def cache_activations(
    model: LanguageModel,
    task: Task,
    hooks: Iterable[str] = DEFAULT_HOOKS,
    positions: Positions = "all",
    *,
    to: str | Path | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> ActivationCache:
    """Cache a model's activations on a task's prompts.

    Args:
        hooks: TransformerLens names: whole ones ("blocks.5.attn.hook_z"), or without the block ("attn.hook_z") for
            every layer. "attn.hook_result" is each head's write to the residual stream, z @ W_O, of shape
            (prompt, pos, head, d_model).
        positions: "all" (of the prompt), "last" (of the prompt), "answer" or "decoding" (see ``POSITIONS``).
        to: a new folder to stream to; memory then holds one batch. Without it everything is kept in memory.
        max_new_tokens: for "decoding"; the task's own by default.

    Raises:
        UnknownNameError: a hook that the model does not have. UsageError: a folder that is not empty.
    """
    import torch

    if not hasattr(model, "hf") or not isinstance(task, Task):
        raise UsageError(
            f"expected a model and a task, got {type(model).__name__} and {type(task).__name__}: pass pair.target or "
            "pair.source, and load_task(…)"
        )
    folder = None if to is None else Path(to)
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder: choose another to=, or remove it")
    make_ready(model)
    wanted = _expand(model, hooks)
    reading = plan_reading(model, task, positions, max_new_tokens, batch_size, progress=progress)
    parts: list[dict[str, torch.Tensor] | Path] = []
    places = np.zeros((len(task), 2), dtype=np.int64)
    with torch.no_grad():
        for batch in reading.batches(model.hf, batch_size, "right", progress, "cache activations"):
            starts = np.cumsum([0, *batch.lengths[:-1]])
            places[batch.prompts] = np.stack([np.full(len(starts), len(parts)), starts], axis=1)
            tensors = _recorded(model, batch, wanted)
            parts.append(tensors if folder is None else _write_part(folder, len(parts), tensors))
    cache = ActivationCache(
        tuple(wanted),
        positions,
        model.name,
        model.fingerprint,
        task.fingerprint,
        tuple(tuple(row[start:stop]) for row, (start, stop) in zip(reading.rows, reading.spans, strict=True)),
        places,
        parts,
    )
    if folder is not None:
        _write_index(folder, cache)
    return cache


def _expand(model: LanguageModel, hooks: Iterable[str]) -> list[str]:
    """Whole hook names, by layer for names without a block; raises UnknownNameError."""
    known = model.bridge.hook_dict
    layers = range(model.layout.layers)
    names = []
    if not isinstance(hooks, str) and not (isinstance(hooks, Iterable) and all(isinstance(h, str) for h in hooks)):
        raise UsageError(f"hooks must be names of TransformerLens hooks, got {hooks!r}")
    for hook in [hooks] if isinstance(hooks, str) else hooks:
        found = [hook] if hook.startswith("blocks.") or hook in known else [f"blocks.{n}.{hook}" for n in layers]
        for name in found:
            # computed from z, so it is there wherever z is
            if name.removesuffix(RESULT) + ("attn.hook_z" if name.endswith("." + RESULT) else "") not in known:
                near = [k for k in known if k.split(".")[-1] == name.split(".")[-1]] or list(known)
                raise UnknownNameError("hook", name, near)
        names += found
    if not names:
        raise UsageError("no hooks were named: for example hooks=('attn.hook_z', 'hook_mlp_out')")
    return list(dict.fromkeys(names))


def _recorded(model: LanguageModel, batch: Batch, names: list[str]) -> dict[str, torch.Tensor]:
    """Every named activation at the batch's counted positions: (counted, …), in contiguous CPU memory."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(tensor: torch.Tensor, hook: Any) -> None:
            paired = name.endswith(("hook_pattern", "hook_attn_scores"))
            if paired or tuple(tensor.shape[:2]) != tuple(batch.inputs["input_ids"].shape):
                raise UsageError(
                    f"{name} has the shape {tuple(tensor.shape)}, not (batch, pos, …): attention patterns and scores "
                    "have two positions; read them with bridge.run_with_cache"
                )
            # not Batch.gather: the axes after the position are kept apart
            seen[name] = tensor.detach()[batch.row, batch.column].cpu()

        return hook

    read = dict.fromkeys(n.removesuffix(RESULT) + "attn.hook_z" if n.endswith("." + RESULT) else n for n in names)
    try:
        model.bridge.run_with_hooks(
            batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            fwd_hooks=[(name, keep(name)) for name in read],
        )
    except ValueError as error:
        # hooks that TransformerLens has switched off say so
        raise UsageError(f"TransformerLens refuses one of {', '.join(read)}: {error}") from error
    silent = [name for name in read if name not in seen]
    if silent:
        raise UsageError(f"the model never passes {silent[0]}: it has no such activation; name another hook")
    found = {}
    for name in names:
        if name.endswith("." + RESULT):
            z = seen[name.removesuffix(RESULT) + "attn.hook_z"]
            found[name] = _head_writes(model, int(name.split(".")[1]), z).contiguous()
        else:
            found[name] = seen[name].contiguous()
    return found


def _head_writes(model: LanguageModel, layer: int, z: torch.Tensor) -> torch.Tensor:
    """z of shape (…, head, d_head) → each head's write to the residual stream (…, head, d_model); no bias."""
    import torch

    return torch.einsum("...hd,hdm->...hm", z, model.output_weights(layer).to(z.device, z.dtype))


def _write_part(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = folder / f"part-{number:05d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    return path


def _cannot_write(path: Path, error: Exception) -> UsageError:
    said = getattr(error, "strerror", None) or error
    return UsageError(f"cannot write {path}: {said}; free some space, or choose another to=")


def _write_index(folder: Path, cache: ActivationCache) -> None:
    """The index is written last: a folder without one was cut off."""
    content = {
        "format": FORMAT,
        "names": cache.names,
        "positions": cache.positions,
        "model": cache.model,
        "weights": cache.weights,
        "task": cache.task,
        "tokens": cache.tokens,
        "places": cache.places.tolist(),
        "parts": [Path(p).name for p in cache.parts if not isinstance(p, dict)],
    }
    temporary = folder / f".{INDEX}.tmp"
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(folder / INDEX)
    except OSError as error:
        raise _cannot_write(folder / INDEX, error) from error


def load_activations(folder: str | Path) -> ActivationCache:
    """A cache that :func:`cache_activations` streamed to a folder; tensors are read when they are asked for.

    Raises UsageError for a folder without an index (the caching was cut off) or with parts missing.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UsageError(f"{folder} has format {content['format']}, and this version reads {FORMAT}: cache again")
        places = np.array(content["places"], dtype=np.int64).reshape(len(content["tokens"]), 2)
        parts: list[dict[str, torch.Tensor] | Path] = [folder / name for name in _names(content["parts"])]
        missing = [p for p in parts if isinstance(p, Path) and not p.is_file()]
        if missing:
            raise UsageError(f"{missing[0]} is missing: cache the activations again")
        return ActivationCache(
            tuple(content["names"]),
            content["positions"],
            content["model"],
            content["weights"],
            content["task"],
            tuple(tuple(t) for t in content["tokens"]),
            places,
            parts,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} holds no whole activation cache ({INDEX}: {error}): cache the activations again"
        ) from error


def _names(parts: list[str]) -> Iterator[str]:
    for name in parts:
        if Path(name).name != name:
            raise UsageError(f"the index names {name!r}, which is outside its folder: cache the activations again")
        yield name
