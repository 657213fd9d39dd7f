"""Verification sees every byte of an exported folder that moved since."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exports import MLP, edited_config

from mechtransplant.errors import UsageError, WeightsError
from mechtransplant.export import verify_export
from mechtransplant.export.tensors import file_sha256, stored_tensors
from mechtransplant.pair import Pair
from mechtransplant.weights import check_safetensors

# --- verification finds what moved ------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], name: str) -> str:
    """Change the tensors of the shard that holds ``name``; returns the shard's file name."""
    path = next(p for p in folder.glob("*.safetensors") if name in stored_tensors(p))
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path.name


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


NORM = "model.norm.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"


def flipped_byte(folder: Path) -> None:
    flip(next(p for p in folder.glob("*.safetensors") if MLP in stored_tensors(p)), -1)


def swapped(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [n for n in tensors if n.endswith("norm.weight")][:2]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    rewrite(folder, change, "model.layers.1.input_layernorm.weight")


def missing(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.__delitem__(OTHER), OTHER)


def extra(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(3)), NORM)


def other_type(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16()}), NORM)


def removed_file(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def added_file(folder: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "model.safetensors")


def edited_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop(NORM)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flipped_byte, "is not the tensor that was exported"),
        (swapped, "is not in the graft, and is not the target's"),
        (missing, f"{OTHER} is missing"),
        (extra, "extra was not exported"),
        (other_type, "is bfloat16"),
        (edited_config, "config.json is not the file that was exported"),
        (removed_file, "generation_config.json is missing"),
        (added_file, "model.safetensors was not exported, and may be loaded"),
        (edited_index, "does not say where the tensors are"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_verification_finds(broken: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(broken)
    found = verify_export(broken)
    assert not found.ok and any(said in problem for problem in found.problems), str(found)


def consistent(folder: Path, tensor: str, change: Callable[[torch.Tensor], None]) -> dict[str, Any]:
    """Change a tensor, and every hash and list of the manifest with it; returns the manifest for more of the same."""
    name = rewrite(folder, lambda tensors: change(tensors[tensor]), tensor)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = file_sha256(folder / name)
    manifest["tensors"][tensor]["sha256"] = stored_tensors(folder / name)[tensor].sha256
    return manifest


def test_a_tensor_that_moved_with_its_manifest_is_found_with_the_models(broken: Path, unchanged: Pair) -> None:
    manifest = consistent(broken, OTHER, lambda t: t[0].add_(1))
    manifest["tensors"][OTHER]["target_sha256"] = manifest["tensors"][OTHER]["sha256"]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert verify_export(broken).ok
    for found in (verify_export(broken, unchanged), verify_export(broken, target=unchanged.target)):
        assert any("the manifest's hash of the target" in p for p in found.problems), str(found)
        assert any(f"{OTHER}: numbers outside the graft" in p for p in found.problems), str(found)


def test_numbers_beside_a_head_that_moved_with_the_manifest(broken: Path, unchanged: Pair) -> None:
    q = "model.layers.3.self_attn.q_proj.weight"
    manifest = consistent(broken, q, lambda t: t[0].add_(1))
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert verify_export(broken).ok
    found = verify_export(broken, unchanged)
    assert found.problems == [f"{q}: numbers outside the graft are not the target's"]
    # a wider region in the manifest does not hide it
    manifest["tensors"][q]["regions"][0]["start"] = 0
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert any("the manifest's regions" in p for p in verify_export(broken, unchanged).problems)


def test_numbers_inside_the_graft_that_are_not_the_sources(broken: Path, unchanged: Pair) -> None:
    manifest = consistent(broken, MLP, lambda t: t[0].add_(1))
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert verify_export(broken).ok and verify_export(broken, target=unchanged.target).ok
    assert verify_export(broken, unchanged).problems == [f"{MLP}: not what the graft writes at strength 1"]


def test_verification_with_other_models(exported: Path, instruct: Pair, generations: Pair) -> None:
    found = verify_export(exported, instruct)
    # one line, and not a problem for every tensor that then differs too
    roles = [p.split(" (")[0] for p in found.problems]
    assert roles == ["the source given", "the target given"] and "repo:family/instruct" in found.problems[0]
    # exchanged roles are put right, as a run's `direction: better` exchanges them, and said
    exchanged = verify_export(exported, generations.reversed())
    assert exchanged.ok and "source is the target of the export" in str(exchanged)
    assert "note" not in str(verify_export(exported, generations))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: shutil.rmtree(f), "no folder at"),
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "no manifest of format"),
        (lambda f: (f / "manifest.json").write_text('{"format": 99}'), "no manifest of format"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "lacks pair"),
        (lambda f: os.truncate(next(iter(sorted(f.glob("*.safetensors")))), 5000), "truncated"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "is broken"),
    ],
    ids=["folder", "manifest", "json", "list", "format", "keys", "truncated", "index"],
)
def test_bad_input_is_one_line_and_exit_code_2(
    command: Callable[..., tuple[int, str, str]], broken: Path, harm: Callable[[Path], Any], said: str
) -> None:
    harm(broken)
    code, _, error = command("verify", str(broken))
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1, error


def test_a_manifest_of_wrong_forms_and_a_header_that_lies(broken: Path) -> None:
    manifest = json.loads((broken / "manifest.json").read_text())
    for key, value in (("tensors", []), ("tensors", {"a": {}}), ("files", {"a": 1}), ("differs", 3)):
        (broken / "manifest.json").write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(UsageError, match="not of the form"):
            verify_export(broken)
    path = broken / "lies.safetensors"
    for offsets in ([[0, 8], [4, 12]], [[0, 8], [9, 12]], [[0, 4], [4, 12]]):
        entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": o} for n, o in zip("ab", offsets, strict=True)}
        header = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
        with pytest.raises(WeightsError, match="no safetensors header"):
            stored_tensors(path)
    assert check_safetensors(path)[1] == 8 + len(header)
