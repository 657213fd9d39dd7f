"""``manifest.json``: what an exported folder is made of, down to the hash of every tensor and file.

``tensors`` has an entry for every tensor as it is saved: type, shape, file, the hash of its bytes, the hash of the
target's, whether the two differ, and, where the graft may write, the regions with their strengths. ``parameter`` is
the tensor's name in the loaded model where transformers saves it under another one.
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.export.staging import readable
from mechtransplant.export.tensors import Stored, dtype_name, file_sha256, stored_tensors, tensor_sha256
from mechtransplant.grafting import OPERATORS, Graft
from mechtransplant.grafting.operators import options_of
from mechtransplant.modules import Region

if TYPE_CHECKING:
    from mechtransplant.evaluation import Outcome
    from mechtransplant.pair import LanguageModel, Pair

MANIFEST = "manifest.json"
FORMAT = 1
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
_KEYS = ("format", "pair", "graft", "dtype", "tensors", "differs", "files")


def describe(pair: Pair, graft: Graft, outcome: Outcome | None) -> dict[str, Any]:
    """The part of a manifest that does not depend on the files: versions, models, the graft, its statistics."""
    models = {"source": pair.source, "target": pair.target, "base": pair.base}
    count = graft.parameter_count(pair)
    name = pair.name
    for model in models.values():
        name = name.replace(model.name, readable(model.name)) if model else name
    return {
        "format": FORMAT,
        "made_by": {
            "mechtransplant": version("mechtransplant"),
            "packages": {package: version(package) for package in PACKAGES},
            "python": platform.python_version(),
        },
        "pair": {
            "name": readable(name),
            **{
                role: None if model is None else {"spec": readable(model.name), "fingerprint": model.fingerprint}
                for role, model in models.items()
            },
            "stays": pair.compatibility.stays,
        },
        "graft": {
            "modules": list(graft.modules),
            "strengths": list(graft.strengths),
            "kv": graft.kv,
            "strict": graft.strict,
            "operator": {"name": graft.operator.name, "options": options_of(graft.operator)},
            "equation": graft.operator.equation,
            "mode": graft.mode,
            "parameters": count,
            "parameter_share": count / sum(p.numel() for p in pair.target_parameters.values()),
            "consequences": graft.consequences(pair),
        },
        "outcome": None if outcome is None else strict_json(asdict(outcome)),
    }


def tensor_entries(
    folder: Path, model: LanguageModel, target: LanguageModel, regions: dict[Region, float]
) -> dict[str, dict[str, Any]]:
    """An entry for every tensor of the folder's shards, from the bytes that were written.

    Raises UsageError where a tensor on disk is not the model's, or cannot be told to be one of them.
    """
    ours, theirs = model.hf.state_dict(keep_vars=True), target.hf.state_dict(keep_vars=True)
    names = saved_names(folder, ours)
    written: dict[int, list[dict[str, Any]]] = {}
    parameters = dict(target.hf.named_parameters())
    for region, strength in regions.items():
        if strength != 0:
            span = {"axis": region.axis, "start": region.start, "stop": region.stop, "strength": strength}
            written.setdefault(id(parameters[region.parameter]), []).append(span)
    entries = {}
    for saved, (stored, name) in names.items():
        sha256, before = stored.sha256, tensor_sha256(theirs[name])
        # a tensor that the graft leaves alone is the target's own
        if sha256 != (before if ours[name] is theirs[name] else tensor_sha256(ours[name])):
            raise UsageError(f"{stored.path.name}: {saved} is not what was written: the disk is full or broken")
        entry: dict[str, Any] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "file": stored.path.name,
            "sha256": sha256,
            "target_sha256": before,
            "differs": sha256 != before,
        }
        if name != saved:
            entry["parameter"] = name
        if id(theirs[name]) in written:
            entry["regions"] = written[id(theirs[name])]
        entries[saved] = entry
    return entries


def saved_names(folder: Path, state: dict[str, Any]) -> dict[str, tuple[Stored, str]]:
    """Saved name → (where it lies, its name in the model); transformers renames some tensors when it saves.

    A tensor under another name is recognised by its bytes, and among equal ones (norms that are all ones) by how its
    name ends. Raises UsageError where that does not decide, or where a tensor was not saved.
    """
    stored = {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in stored_tensors(path).items()}
    found = {name: (tensor, name) for name, tensor in stored.items() if name in state}
    held = {id(state[name]) for name in found}
    left = {n: t for n, t in state.items() if id(t) not in held}
    for name, tensor in stored.items():
        if name in found:
            continue
        alike = [n for n, t in left.items() if tuple(t.shape) == tensor.shape and dtype_name(t) == tensor.dtype]
        sha256 = tensor.sha256
        same = {n: _alike_at_the_end(n, name) for n in alike if tensor_sha256(left[n]) == sha256}
        nearest = [n for n, length in same.items() if length == max(same.values())]
        # a tied tensor has several names
        if len({id(left[n]) for n in nearest}) != 1:
            raise UsageError(
                f"transformers saves a tensor as {name}, and {len(same)} tensors of the model have its bytes: the "
                "export could not be checked, and nothing was written"
            )
        found[name] = (tensor, nearest[0])
    lost = {id(t) for t in left.values()} - {id(state[name]) for _, name in found.values()}
    if lost:
        first = next(n for n, t in left.items() if id(t) in lost)
        raise UsageError(f"transformers did not save {first}: the export would not be whole, and nothing was written")
    return found


def _alike_at_the_end(one: str, other: str) -> int:
    """How many dotted parts, counted from the end, two names share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def tied_names(model: LanguageModel, entries: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Names that are saved under another one, whose tensor they share: ``{"lm_head.weight": "model.embed…"}``."""
    state = model.hf.state_dict(keep_vars=True)
    owner = {id(state[entry.get("parameter", saved)]): saved for saved, entry in entries.items()}
    held = {entry.get("parameter", saved) for saved, entry in entries.items()}
    return {name: owner[id(tensor)] for name, tensor in state.items() if name not in held and id(tensor) in owner}


def file_hashes(folder: Path) -> dict[str, str]:
    """The hash of every file but the manifest; hidden files (``.git``, ``.gitattributes``) do not count."""
    return {name: file_sha256(folder / name) for name in file_names(folder)}


def file_names(folder: Path) -> list[str]:
    """Every file of a folder but the manifest and hidden ones, by its path inside the folder."""
    paths = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(
        p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts) and str(p) != MANIFEST
    )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json``."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an exported folder; raises UsageError where there is none, or it is none."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UsageError(f"no folder at {folder}: give a folder that `mechtransplant export` wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no {MANIFEST}: give a folder that `mechtransplant export` wrote") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}): export again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{path} is no manifest of format {FORMAT}: export again with this version of mechtransplant")
    absent = [key for key in _KEYS if key not in manifest]
    if absent:
        raise UsageError(f"{path} lacks {', '.join(absent)}: export again")
    try:
        files, tensors = manifest["files"], manifest["tensors"]
        good = all(isinstance(h, str) for h in files.values())
        good = good and all(
            isinstance(e[k], str) for e in tensors.values() for k in ("dtype", "sha256", "target_sha256")
        )
        good = good and all(isinstance(e["shape"], list) for e in tensors.values())
        good = good and isinstance(manifest["differs"], list)
    except (AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise UsageError(f"{path}: its files or tensors are not of the form that an export writes: export again")
    return manifest


def graft_of(manifest: dict[str, Any]) -> Graft:
    """The graft that a manifest describes; raises UsageError where this version has no such graft."""
    try:
        said = manifest["graft"]
        operator = OPERATORS[said["operator"]["name"]](**said["operator"]["options"])
        return Graft(said["modules"], said["strengths"], kv=said["kv"], operator=operator, strict=said["strict"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"the manifest's graft cannot be made again ({error!r}): its operator is not known here"
        ) from error


def strict_json(value: Any) -> Any:
    """The same value for strict JSON, which has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {str(key): strict_json(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [strict_json(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
