"""What tests of the export share: small comparisons of models in memory and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair

ROOT = Path(__file__).resolve().parents[1]
MIXED = ("L0.mlp", "L3H2", "L1.q_proj")
MLP = "model.layers.0.mlp.up_proj.weight"


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def grafted_logits(pair: Pair, graft: Graft, ids: torch.Tensor) -> torch.Tensor:
    with graft.applied(pair):
        return logits(pair.target.hf, ids)


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def edited_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
