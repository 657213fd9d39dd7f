"""A device map on one device is that device; wrong ones are refused. What needs two devices is in test_gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.experiment import run_experiment
from mechtransplant.experiment.config import on_device, parse_config
from mechtransplant.pair import LanguageModel, Pair, load_pair
from mechtransplant.tasks import Task
from mechtransplant.weights.spread import spread


def test_a_map_of_one_device(generations: Pair, addition: Task) -> None:
    pair = load_pair("family/generations", device_map={"": "cpu"})
    task = addition.subset(range(24))
    ours, theirs = (evaluate(p.target, task) for p in (pair, generations))
    assert ours.log_probability is not None and theirs.log_probability is not None
    np.testing.assert_allclose(ours.log_probability, theirs.log_probability, atol=1e-4)
    # a bridge is a matter of several devices alone
    assert pair.target.bridge is not None


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"model": "cpu"}, "this device_map cannot be used: .*lm_head"),
        ({"": "disk"}, "weights on the disk cannot be grafted"),
        ({"": "nowhere"}, "this device_map cannot be used"),
        (
            {"model.layers": "cpu", "model.embed_tokens": 0, "model.norm": 0, "lm_head": 0},
            "a device_map that names cpu has model.embed_tokens there",
        ),
        ({}, "device_map is 'auto' or maps parts"),
        ("balanced", "device_map is 'auto' or maps parts"),
    ],
)
def test_wrong_maps_are_refused(device_map: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_pair("family/generations", device_map=device_map)


def test_parts_that_share_a_tensor_have_one_device(random_model: Callable[..., LanguageModel]) -> None:
    hf = random_model(0, tie_word_embeddings=True).hf
    there: dict[str, Any] = {"model": "cpu", "lm_head": 0}
    with pytest.raises(UsageError, match="lm_head and model share a tensor: give them one device"):
        spread(hf, there)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave device_map out, or one_at_a_time"):
        load_pair("family/generations", device_map={"": "cpu"}, one_at_a_time=True)
    with pytest.raises(UsageError, match="give device='cuda' or a device_map, not both"):
        load_pair("family/generations", device_map={"": "cpu"}, device="cuda")
    config = parse_config({"pair": "family/generations", "device_map": {"": "cpu"}, "k": [1]})
    with pytest.raises(UsageError, match="the engine processes gives every worker models of its own"):
        run_experiment(config, tmp_path / "run", engine="processes")


def test_auto_leaves_a_map_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    content: dict[str, Any] = {"pair": "family/generations", "device": "auto"}
    assert parse_config(content).device == "cuda"
    mapped = parse_config({**content, "device_map": {"": "cpu"}})
    assert mapped.device == "cpu" and on_device(mapped, "auto") == mapped
    # a device by name contradicts the map: ``load_pair`` says so
    assert on_device(mapped, "cuda").device == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to spread over")
def test_nothing_to_spread_over_is_said() -> None:
    with pytest.raises(UsageError, match="spreads a model over CUDA devices, and there are none here"):
        load_pair("family/generations", device_map="auto")
