"""Grafts along the largest directions of every module's change, beside as many directions drawn at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import small

import mechtransplant as mt
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.experiment import ScreenConfig, report_screen, run_experiment, runs_table
from mechtransplant.experiment.config import RunConfig, parse_config
from mechtransplant.experiment.run import Run
from mechtransplant.figures import run_rows
from mechtransplant.grafting import Graft, low_rank
from mechtransplant.grafting.low_rank import LowRank

RANK = {"name": "low_rank", "rank": 3}


def matrices(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A target, and a source that differs from it by a matrix of some rank."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, columns, generator=g)
    change = torch.randn(rows, rank, generator=g) @ torch.randn(rank, columns, generator=g)
    return target, target + change


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (9, 9)])
def test_it_keeps_the_best_approximation_of_that_rank(shape: tuple[int, int]) -> None:
    target, source = matrices(*shape, rank=min(shape))
    for rank in (1, 3, 8):
        moved = LowRank(rank)(target, source, None, 1.5, "part") - target
        u, s, v = np.linalg.svd((source - target).double().numpy())
        expected = 1.5 * (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose(moved.numpy(), expected, atol=1e-4)
        assert np.linalg.matrix_rank(moved.numpy(), tol=1e-3) == rank
    ancestor = torch.zeros(shape)
    from_ancestor = LowRank(2)(target, source, ancestor, 1.0, "part") - target
    torch.testing.assert_close(from_ancestor, LowRank(2)(ancestor, source, None, 1.0, "part"), atol=1e-4, rtol=1e-4)


def test_what_has_no_more_directions_moves_whole() -> None:
    target, source = matrices(20, 12, rank=12)
    torch.testing.assert_close(LowRank(12)(target, source, None, 1.0, "part"), source)
    torch.testing.assert_close(LowRank(4)(target[0], source[0], None, 1.0, "bias"), source[0])
    assert torch.equal(LowRank(4)(target, target, None, 1.0, "part"), target), "a self-graft changes no bit"


def test_draws_take_other_directions_of_four_times_as_many() -> None:
    target, source = matrices(40, 30, rank=24)
    u, _, v = np.linalg.svd((source - target).double().numpy(), full_matrices=False)
    chosen = set()
    for seed in range(40):
        moved = LowRank(2, draw=seed)(target, source, None, 1.0, "part") - target
        weights = np.einsum("mk,mn,kn->k", u, moved.numpy(), v)
        kept = tuple(int(i) for i in np.flatnonzero(np.abs(weights) > 1e-2))
        assert len(kept) == 2
        chosen.add(kept)
        assert torch.equal(moved, LowRank(2, draw=seed)(target, source, None, 1.0, "part") - target)
    assert set().union(*chosen) == set(range(8))
    # of eight directions, where there are no more, three are drawn, not of twelve
    target, source = matrices(40, 30, rank=8, seed=1)
    for seed in range(20):
        moved = LowRank(3, draw=seed)(target, source, None, 1.0, "other") - target
        assert np.linalg.matrix_rank(moved.numpy(), tol=1e-2) == 3
    assert LowRank(3).pool_of(source - target) == 8 and LowRank(8).pool_of(source - target) == 8
    assert LowRank(30).pool_of(source - target) == LowRank(1).pool_of(target[0]) == 0


def test_directions_are_remembered_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    target, source = matrices(30, 20, rank=20, seed=5)
    first = LowRank(2)(target, source, None, 1.0, "part")
    asked: list[Any] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: asked.append(a) or svd(*a, **k))
    assert torch.equal(LowRank(2)(target.clone(), source.clone(), None, 1.0, "elsewhere"), first) and not asked
    source[0, 0] += 1
    assert not torch.equal(LowRank(2)(target, source, None, 1.0, "part"), first) and len(asked) == 1
    monkeypatch.setattr(low_rank, "REMEMBERED", 0)
    LowRank(2)(source, target, None, 1.0, "part")
    assert len(low_rank._DIRECTIONS) == 1, "what is used last stays"


def test_a_graft_counts_what_its_directions_take(generations: Any) -> None:
    modules = generations.modules("linear")
    graft, whole = Graft(modules, operator=RANK), Graft(modules)
    shapes = [generations.target_parameters[r.parameter].shape for r in graft.regions(generations)]
    assert graft.carried_count(generations) == sum(3 * (m + n) for m, n in shapes)
    assert graft.changed_count(generations) == whole.parameter_count(generations) == whole.carried_count(generations)
    ties = Graft(modules, operator={"name": "ties", "density": 0.1})
    assert ties.carried_count(generations) == ties.changed_count(generations)
    # written down as itself where that is shorter
    assert Graft(["L1N3"], operator=RANK).carried_count(generations) == 3 * 128
    assert Graft(modules, operator={"name": "low_rank", "rank": 500}).carried_count(
        generations
    ) == whole.parameter_count(generations)


def config(**changes: Any) -> RunConfig:
    lean: dict[str, Any] = {
        "rule": "weight_delta", "k": [28], "strengths": [1.0, 1.5], "random_sets": 0, "curve_sets": 0,
        "controls": ["all", "self"], "operator": RANK, "random_weights": 3, "parameters": 0.05,
        "side_effects": None,
    }  # fmt: skip
    return parse_config(small(**{**lean, **changes}))


def test_a_run_compares_with_as_many_directions_at_random(tmp_path: Path) -> None:
    run = run_experiment(config(), tmp_path / "run", progress=False)
    rows = run.results[run.results.role == "random_weights"]
    choose, test = rows[rows.split == "choose"], rows[rows.split == "test"]
    assert sorted(set(choose.strength)) == [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert list(test["set"]) == ["weights-1", "weights-2", "weights-3"] and test.log_probability.nunique() == 3
    assert "bit-identical" in run.summary and "NOT bit-identical" not in run.summary
    assert "grafts of the same modules that keep as many directions of their changes, drawn at random" in run.summary
    assert "it keeps 3 directions, the largest" in run.summary
    table = runs_table([run.folder])
    assert table.operator.iloc[0] == "low_rank of rank 3"
    _, (left, _) = run_rows(table)
    assert any("or directions, at random" in str(h.get_label()) for h in left.get_legend_handles_labels()[0])
    row = run.rules.iloc[0]
    pair = mt.load_pair("family/generations")
    modules = pair.modules("linear")
    carried = Graft(modules, operator=RANK).carried_count(pair) / Graft(modules).parameter_count(pair)
    assert row.changed_share == pytest.approx(carried) and carried < 0.05
    # the three largest of twelve directions are longer than three drawn ones, at the same strength
    way = Graft(modules).distance(pair)
    assert row.distance_share == pytest.approx(Graft(modules, row.strength, operator=RANK).distance(pair) / way)
    drawn_ways = [
        Graft(modules, test.strength.iloc[0], operator={"name": "low_rank", "rank": 3, "draw": 42 + n}).distance(pair)
        for n in (1, 2, 3)
    ]
    assert row.weights_distance_share == pytest.approx(np.median(drawn_ways) / way)
    assert row.weights_distance_share / test.strength.iloc[0] < row.distance_share / row.strength < 1
    assert (
        f"its change of the weights is {100 * row.distance_share:.1f} % as long as the whole difference between target "
        "and source (random draws" in run.summary
    )
    cells = [json.loads(line) for line in (run.folder / "cells.jsonl").read_text().splitlines()]
    drawn = [cell["operator"] for cell in cells if cell.get("operator")][-1]
    assert drawn == {"name": "low_rank", "rank": 3, "draw": 42 + 3}
    splits = mt.load_task("addition").split(discover=16, choose=24, test=48, seed=0)
    with Graft(modules, test.strength.iloc[-1], operator=drawn).applied(pair):
        found = evaluate(pair.target, splits.test, batch_size=64)
    assert test.correct.iloc[-1] == "".join("1" if c else "0" for c in found.correct)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"operator": "replace"}, "does not keep the largest changes of a module, or directions"),
        ({"operator": {**RANK, "draw": 1}}, "keeps random directions itself"),
        ({"operator": {**RANK, "rank": 0}}, "rank"),
        ({"operator": {**RANK, "rang": 2}}, "did you mean rank"),
        # of the family's narrowest layers nothing is left to draw
        ({"operator": {**RANK, "rank": 500}, "parameters": None}, "none can be drawn"),
        ({"parameters": 0.01}, "more than 1.0% of the parameters"),
    ):
        with pytest.raises(UsageError, match=said):
            Run(config(**changes), tmp_path / said.split()[-1], progress=False).execute()


def test_an_export_is_verified_on_another_number_of_threads(generations: Any, tmp_path: Path) -> None:
    graft = Graft(generations.modules("linear"), 1.25, operator=RANK)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        low_rank._DIRECTIONS.clear()
        mt.export_graft(generations, graft, tmp_path / "made")
        torch.set_num_threads(2)
        low_rank._DIRECTIONS.clear()
        found = mt.verify_export(tmp_path / "made", generations)
    finally:
        torch.set_num_threads(threads)
    assert not found.problems
    # and what another graft would have written is none of its
    from safetensors.torch import load_file, save_file

    path = next((tmp_path / "made").glob("*.safetensors"))
    tensors = load_file(path)
    name = next(n for n in tensors if "q_proj" in n)
    tensors[name] += 1e-2 * (tensors[name].abs().max())
    save_file(tensors, path, {"format": "pt"})
    assert any("not what the graft writes" in p for p in mt.verify_export(tmp_path / "made", generations).problems)


def test_conditional_grafts_and_processes_write_the_same(tmp_path: Path) -> None:
    more = {"k": [4, 9], "parameters": None, "random_sets": 3, "gate": {"texts": 16, "tokens": 12}}
    plain = run_experiment(config(**more), tmp_path / "plain", progress=False)
    shared = run_experiment(config(**more), tmp_path / "shared", progress=False, engine="processes", workers=2)
    pd.testing.assert_frame_equal(plain.results, shared.results)
    assert (plain.results.role == "random_weights").sum() == 6 + 3


def test_a_screen_fits_more_modules_at_fewer_directions(tmp_path: Path) -> None:
    screen = ScreenConfig(
        name="directions", pair="family/generations", task="addition", split={"discover": 16, "choose": 24, "test": 48},
        rules=("weight_delta",), operators=({"name": "low_rank", "rank": 1}, {"name": "low_rank", "rank": 8}),
        shares=(0.05,), counted="changes", texts=0,
    )  # fmt: skip
    report_screen(screen, tmp_path / "screen", progress=False)
    found = pd.read_csv(tmp_path / "screen" / "screen.csv")
    few, many = found.k
    assert few == 28 and 0 < many < 28 and (found.parameters <= 0.05).all()
