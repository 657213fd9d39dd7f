"""Cells are of prompts and of models' settings as well, not of weights and questions alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import small

from mechtransplant.errors import UsageError
from mechtransplant.experiment import Run, run_experiment
from mechtransplant.experiment.config import parse_config

FAMILY = Path(__file__).resolve().parent.parent / "models" / "family"
LEAN: dict[str, Any] = {
    "rule": "weight_delta", "k": [2], "random_sets": 0, "curve_sets": 0, "controls": ["all"], "side_effects": None,
    "task": {"name": "addition", "format": {"chat": None}}, "split": {"discover": 4, "choose": 8, "test": 16},
}  # fmt: skip


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A user's folders: the hashes of those in the repo are checked."""
    made = {}
    for role, name in (("source", "first"), ("target", "second")):
        made[role] = str(shutil.copytree(FAMILY / name, tmp_path / name, ignore=shutil.ignore_patterns("hashes.json")))
    return made


TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("tokenizer_config.json", {"chat_template": TEMPLATE}, "its discover questions became other tokens"),
        ("generation_config.json", {"eos_token_id": [1, 5]}, "its models have other settings or end tokens"),
        ("config.json", {"rms_norm_eps": 1e-3}, "its models have other settings or end tokens"),
    ],
)
def test_an_edited_model_folder_is_another_model(
    folders: dict[str, str], tmp_path: Path, file: str, change: dict[str, Any], said: str
) -> None:
    config = parse_config(small(**LEAN, pair=folders))
    first = run_experiment(config, tmp_path / "run", progress=False)
    before = (first.folder / "cells.jsonl").read_bytes()
    path = Path(folders["target"]) / file
    edited(path, **change)
    with pytest.raises(UsageError, match="begun with different prompts, end tokens or model settings"):
        run_experiment(config, first.folder, progress=False)
    with pytest.raises(UsageError, match=said):
        Run(config, tmp_path / "again", progress=False, reuse=first.folder)
    assert (first.folder / "cells.jsonl").read_bytes() == before and not (tmp_path / "again").exists()


def test_a_note_from_before_a_setting_was_noted_is_of_the_same_models(folders: dict[str, str], tmp_path: Path) -> None:
    path = Path(folders["target"]) / "config.json"
    edited(path, attention_multiplier=0.25)
    config = parse_config(small(**LEAN, pair=folders))
    folder = run_experiment(config, tmp_path / "run", progress=False).folder
    environment = folder / "environment.json"
    noted = json.loads(environment.read_text())
    settings = noted["asked"]["settings"]
    assert settings["target"]["head_dim"] == 16 and settings["target"]["attention_multiplier"] == 0.25
    # what a config lacks adds nothing
    assert "attention_multiplier" not in settings["source"]
    later = ("head_dim", "attention_multiplier")
    older = {role: {k: v for k, v in said.items() if k not in later} for role, said in settings.items()}
    other = {**settings, "target": {**settings["target"], "attention_multiplier": 0.5}}

    def note(said: dict[str, Any]) -> None:
        environment.write_text(json.dumps({**noted, "asked": {**noted["asked"], "settings": said}}))

    note(older)
    Run(config, folder, progress=False).execute()
    Run(config, tmp_path / "again", progress=False, reuse=folder)
    note(other)
    with pytest.raises(UsageError, match="begun with different prompts, end tokens or model settings"):
        Run(config, folder, progress=False).execute()
    with pytest.raises(UsageError, match="its models have other settings or end tokens"):
        Run(config, tmp_path / "again", progress=False, reuse=folder)


def test_a_folder_from_before_it_was_noted_goes_on(folders: dict[str, str], tmp_path: Path) -> None:
    config = parse_config(small(**LEAN, pair=folders))
    folder = run_experiment(config, tmp_path / "run", progress=False).folder
    environment = folder / "environment.json"
    noted = json.loads(environment.read_text())
    environment.write_text(json.dumps({key: value for key, value in noted.items() if key != "asked"}))
    Run(config, tmp_path / "again", progress=False, reuse=folder)
    run_experiment(config, folder, progress=False)
    assert json.loads(environment.read_text())["asked"] == noted["asked"]
    # turned round, the two models are still the same ones
    turned = parse_config(small(**LEAN, pair={"source": folders["target"], "target": folders["source"]}))
    Run(turned, tmp_path / "turned", progress=False, reuse=folder)
