"""Planted pairs are what they say: the planted set, and nothing else, carries the skill; `own` sees just that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechtransplant.evaluation import compare, evaluate
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair, load_pair
from mechtransplant.shifts import measure_shifts
from mechtransplant.tasks import load_task
from mechtransplant.weights import list_pairs

PLANTED = [name for name in list_pairs() if name.startswith("family/") and "planted" in name]
CLEAN = [name for name in PLANTED if not name.endswith("drifted")]
DRIFTED = [name for name in PLANTED if name.endswith("drifted")]
FAMILY = Path(__file__).resolve().parent.parent / "models" / "family"


def loaded(name: str, cache: dict[str, Pair] = {}) -> Pair:  # noqa: B006 (kept on purpose)
    return cache.setdefault(name, load_pair(name))


def numbers_of(pair: Pair, module: str, parameters: dict[str, Any]) -> torch.Tensor:
    """Every number of a module, flat."""
    regions = pair.layout.regions(module, parameters)
    return torch.cat([r.of(parameters[r.parameter]).flatten() for r in regions])


def test_there_are_three_of_each() -> None:
    assert len(CLEAN) == 3 and len(DRIFTED) == 3
    kinds = [{"head" if "H" in m else "mlp" for m in loaded(name).planted} for name in CLEAN]
    assert {"head"} in kinds and {"mlp"} in kinds and {"head", "mlp"} in kinds


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_set_recovers_most_of_the_gap_and_the_rest_does_not(name: str) -> None:
    pair = loaded(name)
    task = load_task(str(pair.default_task), 256, seed=7)
    target, source = evaluate(pair.target, task), evaluate(pair.source, task)
    with Graft(pair.planted).applied(pair):
        planted = compare(target, source, evaluate(pair.target, task))
    rest = [m for m in pair.modules("head") + pair.modules("mlp") if m not in pair.planted]
    with Graft(rest).applied(pair):
        others = compare(target, source, evaluate(pair.target, task))
    assert source.accuracy - target.accuracy > 0.8
    assert planted.recovery is not None and planted.recovery >= 80
    assert others.recovery is not None and others.recovery < 10


@pytest.mark.parametrize("name", CLEAN)
def test_in_a_clean_pair_nothing_else_differs(name: str) -> None:
    pair = loaded(name)
    with Graft(pair.planted).applied(pair):
        assert pair.target.fingerprint == pair.source.fingerprint
    for module in pair.planted:
        assert not torch.equal(*[numbers_of(pair, module, p) for p in (pair.source_parameters, pair.target_parameters)])


@pytest.mark.parametrize("name", CLEAN)
def test_in_a_clean_pair_own_is_exactly_0_where_nothing_was_trained(name: str) -> None:
    pair = loaded(name)
    task = load_task(str(pair.default_task), 24, seed=7)
    for options in ({}, {"batch_size": 7, "padding_side": "right"}):
        shifts = measure_shifts(pair, task, ("head", "mlp", "attn", "linear"), ("own", "distance"), "all", **options)  # type: ignore[arg-type]
        largest = shifts[shifts.measure == "own"].groupby("module", sort=False).value.max()
        trained = {
            m
            for m in largest.index
            if not torch.equal(*[numbers_of(pair, m, p) for p in (pair.source_parameters, pair.target_parameters)])
        }
        assert set(pair.planted) <= trained
        assert (largest[[m not in trained for m in largest.index]] == 0).all()
        assert (largest[[m in trained for m in largest.index]] > 0.01).all()
    # what is untrained and downstream does shift: it inherits
    downstream = shifts[(shifts.measure == "distance") & (shifts.module == "L3.mlp")]
    assert (downstream.value > 0.01).all()


@pytest.mark.parametrize("name", DRIFTED)
def test_in_a_drifted_pair_every_module_differs_by_about_as_much(name: str) -> None:
    pair = loaded(name)
    change = {}
    for module in pair.modules("head") + pair.modules("mlp"):
        source, target = (numbers_of(pair, module, p) for p in (pair.source_parameters, pair.target_parameters))
        change[module] = float((source - target).norm() / target.norm())
    inside = np.median([v for m, v in change.items() if m in pair.planted])
    outside = np.median([v for m, v in change.items() if m not in pair.planted])
    assert min(change.values()) > 0.2
    assert 0.6 < inside / outside < 1.7


@pytest.mark.parametrize("name", CLEAN)
def test_the_model_card_names_the_planted_modules(name: str) -> None:
    card = (FAMILY / name.split("/")[1] / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bL\d(?:H\d|\.mlp)\b", card)) == set(loaded(name).planted)


def test_they_are_small() -> None:
    folders = [f for f in FAMILY.iterdir() if f.name.startswith(("planted", "drifted"))]
    assert sum(p.stat().st_size for f in folders for p in f.rglob("*")) <= 15_000_000
