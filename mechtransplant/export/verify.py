"""An exported folder read again: every hash compared, and, with the models, proof that nothing else moved."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation.batches import make_ready
from mechtransplant.export.manifest import file_names, graft_of, read_manifest
from mechtransplant.export.staging import readable
from mechtransplant.export.tensors import Stored, dtype_name, file_sha256, stored_tensors, tensor_sha256
from mechtransplant.grafting.applied import written
from mechtransplant.grafting.graft import checked

if TYPE_CHECKING:
    from mechtransplant.grafting import Graft
    from mechtransplant.modules import Region
    from mechtransplant.pair import LanguageModel, Pair

#: how many problems are printed
SHOWN = 12


@dataclass(frozen=True)
class Verification:
    """What was found: ``problems`` (empty when all is well) and how much of what was ``checked``."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything is as the manifest says, and as the models say where they were given."""
        return not self.problems

    def __str__(self) -> str:
        counts = ", ".join(f"{n:,} {what}" for what, n in self.checked.items())
        lines = [f"{self.folder}: {'verified' if self.ok else f'NOT verified, {len(self.problems)} problems'}"]
        lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  and {len(self.problems) - SHOWN} more")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes), f"  checked: {counts}"])


def verify_export(folder: str | Path, pair: Pair | None = None, *, target: LanguageModel | None = None) -> Verification:
    """Read an exported folder again and compare it with its manifest, and with the models where they are given.

    Without models: every file and every tensor has the manifest's hash, nothing is missing or added, and what is not in
    the graft has the hash that the manifest gives for the target. A manifest that was changed together with the weights
    passes this. With the target, its hashes are computed again, and numbers outside the graft must equal its bytes;
    with the pair, those inside must be what the graft writes from the source, and the manifest's graft be the one.

    Raises:
        UsageError: no folder, no manifest, a broken manifest or shard, or models of another type or shape.
    """
    if not isinstance(folder, str | Path):
        raise UsageError(f"folder is a path, got {type(folder).__name__}")
    for name, value, needed in (("pair", pair, "target_parameters"), ("target", target, "hf")):
        if value is not None and not hasattr(value, needed):
            raise UsageError(f"{name} is a {'Pair' if name == 'pair' else 'LanguageModel'}, got {type(value).__name__}")
    folder = Path(folder)
    manifest = read_manifest(folder)
    found = Verification(folder)
    _files(folder, manifest, found)
    stored = _tensors(folder, manifest, found)
    if pair is not None:
        _models(manifest, stored, pair, found, inside=True)
    elif target is not None:
        from mechtransplant.pair import Pair, compare_models

        alone = Pair(target, target, compare_models(target, target))
        _models(manifest, stored, alone, found, inside=False)
    return found


def _files(folder: Path, manifest: dict[str, Any], found: Verification) -> None:
    present = file_names(folder)
    for name, sha256 in manifest["files"].items():
        if name not in present:
            found.problems.append(f"{name} is missing")
        elif file_sha256(folder / name) != sha256:
            found.problems.append(f"{name} is not the file that was exported (sha256)")
    found.problems.extend(
        f"{name} was not exported, and may be loaded" for name in present if name not in manifest["files"]
    )
    found.checked["files"] = len(present)


def _tensors(folder: Path, manifest: dict[str, Any], found: Verification) -> dict[str, tuple[Stored, str]]:
    """Compare every tensor with the manifest; returns where they lie and their hashes."""
    stored: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in stored_tensors(path).items():
            if name in stored:
                found.problems.append(f"{name} is in {stored[name].path.name} and in {path.name}")
            stored[name] = tensor
    _index(folder, stored, found)
    entries = manifest["tensors"]
    found.problems.extend(f"{name} is missing" for name in entries if name not in stored)
    found.problems.extend(f"{name} was not exported" for name in stored if name not in entries)
    changed = []
    hashes = {name: tensor.sha256 for name, tensor in stored.items()}
    for name in entries.keys() & stored.keys():
        entry, tensor = entries[name], stored[name]
        sha256 = hashes[name]
        if (tensor.dtype, list(tensor.shape)) != (entry["dtype"], entry["shape"]):
            found.problems.append(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, not {entry['dtype']} {entry['shape']}"
            )
        elif sha256 != entry["sha256"]:
            found.problems.append(f"{name} is not the tensor that was exported (sha256)")
        if sha256 != entry["target_sha256"]:
            changed.append(name)
            if not entry.get("regions"):
                found.problems.append(f"{name} is not in the graft, and is not the target's")
    if sorted(changed) != sorted(manifest["differs"]):
        found.problems.append("the tensors that differ from the target's are not those that the manifest lists")
    found.checked["tensors"] = len(stored)
    found.checked["of them not the target's"] = len(changed)
    return {name: (tensor, hashes[name]) for name, tensor in stored.items()}


def _index(folder: Path, stored: dict[str, Stored], found: Verification) -> None:
    """The index of the shards says where each tensor is; a loader follows it."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        places = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is broken ({error!r}): export again") from error
    if places != {name: tensor.path.name for name, tensor in stored.items()}:
        found.problems.append(f"{path.name} does not say where the tensors are")


def _models(
    manifest: dict[str, Any], stored: dict[str, tuple[Stored, str]], pair: Pair, found: Verification, inside: bool
) -> None:
    """Compare every tensor with the target's bytes outside the graft, and with what the graft writes inside."""
    if inside and _exchanged(manifest, pair):
        # a run with `direction: better` may have taken the named target for its source
        pair = pair.reversed()
        found.notes.append("the pair's source is the target of the export, and its target the source")
    if pair.applied:
        raise UsageError("a graft is in place on this pair's target: leave its `with` block first, then verify")
    dtype = dtype_name(next(iter(pair.target_parameters.values())))
    if dtype != manifest["dtype"]:
        raise UsageError(f"the target is loaded in {dtype} and the export is {manifest['dtype']}: load it in that type")
    graft = graft_of(manifest)
    if inside and (pair.base is None) != (manifest["pair"].get("base") is None):
        raise UsageError(
            "the export was made with a common ancestor and the pair has none, or the other way round: load the pair "
            "as it was then (base=, --base)"
        )
    make_ready(pair.target)
    regions = checked(graft, pair)
    for role in ("source", "target", "base") if inside else ("target",):
        model, said = getattr(pair, role), manifest["pair"].get(role)
        if model is not None and said is not None and model.fingerprint != said["fingerprint"]:
            found.problems.append(
                f"the {role} given ({readable(model.name)}) is not the one of the export ({said['spec']}; fingerprint)"
            )
    if any("is not the one of the export" in problem for problem in found.problems):
        # every number would differ, and hide this
        return
    state = pair.target.hf.state_dict(keep_vars=True)
    by_tensor: dict[int, dict[Region, float]] = {}
    for region, strength in regions.items():
        if strength != 0:
            by_tensor.setdefault(id(pair.target_parameters[region.parameter]), {})[region] = strength
    numbers = 0
    for name, entry in manifest["tensors"].items():
        parameter = entry.get("parameter", name)
        if parameter not in state:
            found.problems.append(f"{name} is no tensor of the target given")
            continue
        target = state[parameter]
        before = tensor_sha256(target)
        if before != entry["target_sha256"]:
            found.problems.append(f"{name}: the manifest's hash of the target is not that of the target given")
        mine = by_tensor.get(id(target), {})
        said = {(r["axis"], r["start"], r["stop"], r["strength"]) for r in entry.get("regions", [])}
        if said != {(r.axis, r.start, r.stop, s) for r, s in mine.items()}:
            found.problems.append(f"{name}: the manifest's regions are not those of its graft")
        if name in stored:
            numbers += target.numel()
            tensor, sha256 = stored[name]
            if mine:
                _bytes(name, tensor, target, graft, pair, mine, found, inside)
            elif sha256 != before:
                found.problems.append(f"{name}: numbers outside the graft are not the target's")
    found.checked["numbers compared with the models"] = numbers


def _exchanged(manifest: dict[str, Any], pair: Pair) -> bool:
    """Whether the pair's source is the target of the export, and its target the source."""
    said = [manifest["pair"][role]["fingerprint"] for role in ("target", "source")]
    return said[0] != said[1] and said == [pair.source.fingerprint, pair.target.fingerprint]


def _bytes(
    name: str,
    stored: Stored,
    target: Any,
    graft: Graft,
    pair: Pair,
    regions: dict[Region, float],
    found: Verification,
    inside: bool,
) -> None:
    import safetensors

    with safetensors.safe_open(stored.path, "pt") as file:
        tensor = file.get_tensor(name)
    if tensor.shape != target.shape or tensor.dtype != target.dtype:
        found.problems.append(f"{name} has another shape or type than the target's")
        return
    outside = target.detach().cpu().clone()
    for region in regions:
        region.of(outside).copy_(region.of(tensor))
    if tensor_sha256(outside) != tensor_sha256(tensor):
        found.problems.append(f"{name}: numbers outside the graft are not the target's")
    for region, strength in regions.items() if inside else ():
        expected = written(graft.operator, pair, region, strength).to(tensor.dtype)
        if tensor_sha256(expected) == tensor_sha256(region.of(tensor)):
            continue
        if getattr(graft.operator, "reproducible", True) or not _alike(
            expected, region.of(tensor), region.of(target.detach().cpu())
        ):
            found.problems.append(f"{region}: not what the graft writes at strength {strength:g}")
        elif ROUNDED not in found.notes:
            found.notes.append(ROUNDED)


#: said of an operator whose numbers depend on threads and device
ROUNDED = "inside the graft numbers are equal but for rounding, which this operator does otherwise on other machines"


def _alike(expected: Any, stored: Any, before: Any) -> bool:
    """Whether two results of one change differ by no more than rounding: of the stored type, and of the change."""
    import torch

    eps = torch.finfo(stored.dtype).eps
    expected, stored, before = (t.cpu().double() for t in (expected, stored, before))
    size = float((expected - before).abs().max()) if expected.numel() else 0.0
    return torch.allclose(stored, expected, rtol=2 * eps, atol=1e-4 * size)
