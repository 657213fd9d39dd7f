"""A graft as a Hugging Face folder that any tool can load, with its manifest, its model card and its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.export.card import model_card, side_effect_table
from mechtransplant.export.given import check_given
from mechtransplant.export.grafted import with_tensors, written_tensors
from mechtransplant.export.manifest import MANIFEST, describe, file_hashes, strict_json, tensor_entries, tied_names
from mechtransplant.export.manifest import write_manifest as _write_manifest
from mechtransplant.export.recipe import RECIPE, recipe
from mechtransplant.export.staging import check_free, clean_settings, new_folder
from mechtransplant.weights import check_not_quantised, quiet

if TYPE_CHECKING:
    from mechtransplant.evaluation import Outcome
    from mechtransplant.grafting import Graft
    from mechtransplant.pair import LanguageModel, Pair
    from mechtransplant.tasks import Task


@dataclass(frozen=True)
class Export:
    """What was written: the folder, its manifest, and the mergekit recipe or None (the manifest says why)."""

    folder: Path
    manifest: dict[str, Any]
    recipe: Path | None

    @property
    def differs(self) -> list[str]:
        """The tensors that differ from the target's."""
        return list(self.manifest["differs"])

    def __repr__(self) -> str:
        return f"Export({self})"

    def __str__(self) -> str:
        said = self.manifest["recipe"]
        return (
            f"{self.folder}: {len(self.manifest['tensors'])} tensors, {len(self.differs)} of them different from the "
            f"target's, {len(self.manifest['files'])} files and {MANIFEST}; "
            + (f"recipe {said['file']}" if said["file"] else f"no mergekit recipe: {said['reason']}")
        )


def export_graft(
    pair: Pair,
    graft: Graft,
    folder: str | Path,
    *,
    outcome: Outcome | None = None,
    task: Task | str | None = None,
    side_effects: Any = None,
    name: str | None = None,
    licence: str | None = None,
    shard_size: str = "2GB",
) -> Export:
    """Write the target with the graft in it as a Hugging Face folder; the pair is not touched.

    Args:
        folder: where; it must not exist yet, or be empty. It appears whole or not at all.
        outcome: what the graft did, for the model card and the manifest.
        task: what the outcome was measured on.
        side_effects: what the graft costs elsewhere: a pandas frame, or a mapping from name to :class:`Outcome` (on
            another task), to value, or to mapping.
        name: the model card's title.
        licence: an identifier of the hub, such as "apache-2.0".
        shard_size: the size above which the weights are split: "2GB", "500MB".

    Raises:
        UsageError: a folder that is not empty or cannot be written, a graft in place, or an address that is unknown.
    """
    check_given(pair, graft, folder, outcome, task)
    check_free(Path(folder).expanduser())
    table = None if side_effects is None else side_effect_table(side_effects)
    check_not_quantised(pair.target.hf, pair.target.name)
    size = sum(p.numel() * p.element_size() for p in pair.target_parameters.values())
    title = name or f"{Path(folder).expanduser().resolve().name}"
    regions, changed = written_tensors(pair, graft)
    model = with_tensors(pair.target, changed, title)
    with new_folder(folder, size) as made:
        _save(model, made, shard_size)
        manifest = describe(pair, graft, outcome)
        tensors = tensor_entries(made, model, pair.target, regions)
        text, reason = recipe(pair, graft, regions, tensors)
        what = task if isinstance(task, str) or task is None else task.name
        manifest |= {
            "task": what if isinstance(task, str) or task is None else {"name": what, "fingerprint": task.fingerprint},
            "side_effects": None
            if table is None
            else strict_json([dict(zip(table[0], r, strict=True)) for r in table[1]]),
            "fingerprint": model.fingerprint,
            "dtype": str(model.hf.dtype).removeprefix("torch."),
            "recipe": {"file": RECIPE if text else None, "reason": reason or None},
            "tied": tied_names(model, tensors),
            "differs": [n for n, entry in tensors.items() if entry["differs"]],
            "tensors": tensors,
        }
        if text:
            (made / RECIPE).write_text(text, encoding="utf-8")
        card = model_card(
            pair,
            graft,
            manifest,
            name=title,
            outcome=outcome,
            task=what or "",
            side_effects=side_effects,
            licence=licence,
        )
        (made / "README.md").write_text(card, encoding="utf-8")
        manifest["files"] = file_hashes(made)
        _write_manifest(made, manifest)
    return Export(Path(folder), manifest, Path(folder) / RECIPE if text else None)


def _save(model: LanguageModel, folder: Path, shard_size: str) -> None:
    """Weights, settings and tokenizer as transformers writes them, without this machine's paths."""
    try:
        with quiet():
            model.hf.save_pretrained(folder, max_shard_size=shard_size)
        model.tokenizer.save_pretrained(folder)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"transformers cannot save this model ({said}): nothing was written") from error
    clean_settings(folder)
