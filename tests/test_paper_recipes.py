"""The recipes for the paper's own pairs are checked as a dry run would, on small models of the same shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, build

from mechtransplant.experiment import Run, read_config
from mechtransplant.experiment import estimate as estimates
from mechtransplant.weights import models_folder

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
#: layers as the real models have
LAYERS = {"phi": ("phi3", 32, 128), "gemma": ("gemma2", 26, 182)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Two models of each family, with the real number of layers and the small family's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models_folder() / "family" / "first")
    found = {}
    for family, (architecture, layers, _) in LAYERS.items():
        pair = []
        for seed in (0, 1):
            config = ARCHITECTURES[architecture][0]()
            config.num_hidden_layers, config.vocab_size, config.max_position_embeddings = layers, len(tokenizer), 8192
            if getattr(config, "layer_types", None):
                config.layer_types = (["sliding_attention", "full_attention"] * layers)[:layers]
            folder = tmp_path_factory.mktemp("models") / f"{family}-{seed}"
            build(config, seed).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            pair.append(folder)
        found[family] = (pair[0], pair[1])
    return found


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_a_recipe_is_complete(
    path: Path,
    folders: dict[str, tuple[Path, Path]],
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = read_config(path)
    assert recipe.dtype == "bfloat16" and recipe.device == "cuda" and not isinstance(recipe.pair, str)
    family = path.stem.partition("-")[0]
    # the training set is not here: the same form, and a question of the test set that must be left out
    math500 = [json.loads(line) for line in (shared_data / "math500.jsonl").read_text().splitlines()]
    rows = [{**math500[0], "problem": f"{i}: {row['problem']}"} for i, row in enumerate(math500[:200])] + math500[:5]
    (tmp_path / "math-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "math500.jsonl").write_bytes((shared_data / "math500.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    source, target = folders[family]
    pair: Any = {"source": str(source), "target": str(target)}
    here = recipe.model_copy(
        update={"pair": type(recipe.pair).model_validate(pair), "device": "cpu", "dtype": "float32", "budgets": (2, 4)}
    )
    monkeypatch.setattr(estimates, "TIMED", 2)
    run = Run(here, tmp_path / "run", progress=False)
    # the paper counts Phi's fused layers as one each: its K = 128 is all of them
    assert len(run.candidates) == LAYERS[family][2] and run.counts == [8, 16, 32, 64, 128]
    assert [len(split) for split in run.splits] == [50, 100, 500]
    assert set(recipe.budgets or ()) == {32, 64, 128, 256, 512} and len(recipe.controls) == 5
    assert recipe.random_sets == 100 and "cells" in str(run.estimate())
