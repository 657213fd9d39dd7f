"""A search that is ended in the middle goes on where it was, and finds what it would have found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechtransplant.experiment import rankings as of_runs
from mechtransplant.experiment.config import parse_config
from mechtransplant.experiment.rankings import STEPS, Rankings
from mechtransplant.pair import Pair
from mechtransplant.ranking.steps import keeping, kept
from mechtransplant.tasks import Splits, load_task

WEIGHTS = {"source": "first", "target": "second"}
OPTIONS = {
    "greedy": {"stop": 5, "pool": 6},
    "mask": {"steps": 12, "swaps": 4},
    "single_swap": {},
    "screened_swap": {"confirm": 9},
    "single_patch": {},
    "screened_patch": {"confirm": 9},
}


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_task("addition").split(16, 16, 16)


def ranked(rule: str, pair: Pair, splits: Splits, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {"rule": rule, "rule_options": OPTIONS[rule], "kind": ["head", "mlp"], "k": [4]}
    return Rankings(
        parse_config({"pair": "family/generations", **given}), pair, splits, 8, folder, False, WEIGHTS
    ).frame(rule, 4)


@pytest.mark.parametrize("rule", OPTIONS)
def test_a_search_goes_on_where_it_was(
    rule: str, generations: Pair, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # small steps: layer by layer
    monkeypatch.setattr("mechtransplant.ranking.steps.STEP", 1)
    computed: list[Any] = []
    limit = [10**9]

    def counted(what: dict[str, Any], compute: Any) -> Any:
        def now() -> Any:
            if len(computed) >= limit[0]:
                raise KeyboardInterrupt
            computed.append(what)
            return compute()

        return kept(what, now)

    for module in ("steps", "swaps", "patches", "mask"):
        monkeypatch.setattr(f"mechtransplant.ranking.{module}.kept", counted)
    whole = ranked(rule, generations, splits, tmp_path / "whole")
    steps = len(computed)
    assert steps >= 3 and not (tmp_path / "whole" / STEPS).exists()
    computed.clear()
    limit[0] = steps // 2
    with pytest.raises(KeyboardInterrupt):
        ranked(rule, generations, splits, tmp_path / "ended")
    assert (tmp_path / "ended" / STEPS).read_text().endswith("\n") and len(computed) == steps // 2
    limit[0] = 10**9
    again = ranked(rule, generations, splits, tmp_path / "ended")
    assert len(computed) == steps, "what was done is not done again"
    assert list(again.module) == list(whole.module) and np.array_equal(again.score, whole.score)
    names = [p.relative_to(tmp_path / "ended") for p in (tmp_path / "ended").rglob("*") if p.is_file()]
    assert all((tmp_path / f / name).read_bytes() for f in ("ended", "whole") for name in names)


def test_steps_of_another_search_are_not_taken(
    generations: Pair, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[str] = []
    put = of_runs.CellStore.put

    def noted(self: Any, key: str, values: Any) -> None:
        stored.append(key)
        put(self, key, values)

    monkeypatch.setattr(of_runs.CellStore, "put", noted)
    for seed in (0, 1, 1):
        given = {"pair": "family/generations", "rule": "single_swap", "kind": "head", "k": [2], "seed": seed}
        Rankings(parse_config(given), generations, splits, 8, tmp_path, False, WEIGHTS)._rank("single_swap", splits)
    # the third finds all of the second's
    assert len(stored) == len(set(stored)) == 2


def test_without_a_place_steps_are_computed() -> None:
    assert kept({"a": 1}, lambda: np.array([0.1])) == 0.1
    seen: dict[str, Any] = {}

    def keep(what: dict[str, Any], compute: Any) -> Any:
        return seen.setdefault(str(what), compute())

    with keeping(keep):
        assert list(kept({"a": 1}, lambda: np.array([0.1, 1 / 3]))) == [0.1, 1 / 3]
    assert seen == {"{'a': 1}": {"values": [0.1, 1 / 3]}}
    assert kept({"a": 1}, lambda: np.array([2.0])) == 2.0
