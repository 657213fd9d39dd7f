"""Ranks among controls, curves among curves, and how well scores find a known set: against independent computations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtransplant.controls import graft_with_controls, random_matched, random_orders
from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair
from mechtransplant.ranking import rank_modules
from mechtransplant.ranking.matched import classes
from mechtransplant.significance import auroc, average_precision, curve_area, curve_rank, precision_at, rank_among
from mechtransplant.tasks import Task, load_task


def test_rank_among_controls_by_hand() -> None:
    found = rank_among(0.5, [0.1, 0.5, 0.9, 0.2])
    assert (found.n, found.beaten, found.tied, found.p_value) == (4, 2, 1, 3 / 5)
    assert (found.median, found.low, found.high) == (0.35, 0.1, 0.9)
    assert "beats 2 of 4 (ties 1), p = 0.6" in str(found)
    for value, controls in ((0.5, []), (float("nan"), [1.0]), (0.5, [float("inf")])):
        with pytest.raises(ValueError, match="at least one control and finite"):
            rank_among(value, controls)


def test_values_that_rounding_tells_apart_are_ties() -> None:
    found = rank_among(-14.3, [-14.3 - 1e-7, -14.3 + 1e-7, -15.0], tolerance=1e-5)
    assert (found.beaten, found.tied, found.p_value) == (1, 2, 3 / 4)


def test_area_is_the_mean_height() -> None:
    assert curve_area([0, 1], [0.2, 0.6]) == pytest.approx(0.4)
    assert curve_area([0, 0.25, 1], [0, 1, 1]) == pytest.approx(0.875)
    assert curve_area([0, 1], np.array([[0, 1], [1, 1]])).tolist() == [0.5, 1]
    with pytest.raises(ValueError, match="ascending"):
        curve_area([0, 0], [1, 1])


def test_a_curve_that_is_best_everywhere_and_one_that_is_worst() -> None:
    rng = np.random.default_rng(0)
    controls = rng.normal(0.5, 0.05, (19, 3))
    best = curve_rank([1, 2, 4], [0.9] * 3, controls, 8, (0.1, 1.0))
    assert best.p_value == 1 / 20 and best.area_rank.beaten == 19
    worst = curve_rank([1, 2, 4], [0.1] * 3, controls, 8, (0.1, 1.0))
    assert worst.p_value == 1 and worst.area_rank.beaten == 0
    spike = curve_rank([1, 2, 4], [0.5, 0.9, 0.5], controls, 8, (0.1, 1.0))
    assert spike.at_k == 2 and spike.p_value == 1 / 20
    with pytest.raises(ValueError, match=r"shape \(n, 3\)"):
        curve_rank([1, 2, 4], [0.5] * 3, controls[:, :2], 8, (0, 1))


def test_areas_that_rounding_tells_apart_are_ties() -> None:
    # the same heights in another order, at equal distances, have one area
    heights = np.array([7, 13, 22, 29]) / 48
    orders = [list(order) for order in permutations(heights)]
    for own in orders:
        found = curve_rank([1, 2, 3, 4], own, orders, 5, (0.1, 0.9))
        assert found.area_rank.beaten == 0 and found.area_rank.tied == len(orders) and found.area_rank.p_value == 1


def test_p_of_a_curve_is_uniform_where_nothing_differs() -> None:
    """Exchangeable curves with correlated heights: the share of p ≤ α is α, for every α on the grid."""
    rng = np.random.default_rng(1)
    n, curves, ks = 4000, 20, 5
    raw = rng.normal(size=(n, curves, ks)) + 2 * rng.normal(size=(n, curves, 1))
    heights = np.round(0.5 + 0.05 * raw, 3)
    found = np.array([curve_rank(range(1, 6), h[0], h[1:], 10, (0, 1)).p_value for h in heights])
    for alpha in (0.05, 0.1, 0.25, 0.5):
        sd = (alpha * (1 - alpha) / n) ** 0.5
        assert (found <= alpha + 1e-9).mean() < alpha + 3.3 * sd
        assert (found <= alpha + 1e-9).mean() > alpha - 6 * sd, "conservative only by ties"


scored = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=9).filter(
    lambda rows: any(y for _, y in rows) and not all(y for _, y in rows)
)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_detection_against_brute_force(rows: list[tuple[int, bool]]) -> None:
    scores, planted = np.array([s for s, _ in rows], float), np.array([y for _, y in rows])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[planted] for b in scores[~planted]]
    assert auroc(scores, planted) == pytest.approx(np.mean(pairs))
    # precision at K: the mean over all ways to break ties
    k, n = int(planted.sum()), len(scores)
    hits = []
    for order in permutations(range(n)) if n <= 6 else []:
        ranked = sorted(order, key=lambda i: -scores[i])
        hits.append(np.mean([planted[i] for i in ranked[:k]]))
    if hits:
        assert precision_at(scores, planted) == pytest.approx(np.mean(hits))
    total, recall = 0.0, 0.0
    for cut in sorted(set(scores), reverse=True):
        above = scores >= cut
        now = planted[above].sum() / planted.sum()
        total += (now - recall) * planted[above].mean()
        recall = now
    assert average_precision(scores, planted) == pytest.approx(total)


def test_detection_refuses_what_has_no_answer() -> None:
    for scores, planted in (
        ([1, 2], [True, True]),
        ([1, 2], [False, False]),
        ([1, np.nan], [True, False]),
        ([1], [True]),
    ):
        for measure in (auroc, average_precision, precision_at):
            with pytest.raises(ValueError):
                measure(scores, planted)


# --- random orders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", ("head", "mlp")])
def test_random_orders_are_matched_at_every_k(generations: Pair, kind: str) -> None:
    order = list(rank_modules(generations, None, "weight_delta", kind).module)  # type: ignore[arg-type]
    found = random_orders(generations, order, 5, len(order) // 2, seed=4)
    assert found.orders == random_orders(generations, order, 5, len(order) // 2, seed=4).orders
    assert len(set(found.orders)) == 5 and all(sorted(o) == sorted(order) for o in found.orders)
    parts = {"thirds": 3, "halves": 2, "not matched": 1}[found.depth]
    group = classes(generations, order, parts)
    for drawn in found.orders:
        for k in range(len(order) + 1):
            assert Counter(group[m] for m in drawn[:k]) == Counter(group[m] for m in order[:k])


def test_random_sets_of_mixed_kinds_keep_both(generations: Pair) -> None:
    chosen = ["L0H1", "L1H2", "L2H3", "L3H7", "L1.mlp"]
    controls = random_matched(generations, chosen, 30, seed=1)
    assert len(controls.sets) == 30
    assert all(sum("H" in m for m in drawn) == 4 and len(drawn) == 5 for drawn in controls.sets)


@pytest.mark.parametrize("kv", ["group", "whole-group"])
def test_random_sets_of_heads_move_as_many_keys_and_values(generations: Pair, kv: Any) -> None:
    def size(modules: Sequence[str]) -> int:
        return Graft(modules, kv=kv).parameter_count(generations)

    # of four groups of two heads in four layers each: one whole group, and halves of two more
    chosen = ["L1H0", "L1H1", "L2H2", "L2H5", "L3.mlp"]
    found = random_matched(generations, chosen, 60, seed=1, kv=kv)
    assert len(set(map(frozenset, found.sets))) == 60 and {size(drawn) for drawn in found.sets} == {size(chosen)}
    assert len({size(drawn) for drawn in random_matched(generations, chosen, 60, seed=1).sets}) > 1
    heads = list(rank_modules(generations, None, "random", ("head", "mlp"), seed=5).module)
    for order in random_orders(generations, heads, 4, 10, seed=2, kv=kv).orders:
        assert sorted(order) == sorted(heads)
        assert [size(order[:k]) for k in range(1, 36)] == [size(heads[:k]) for k in range(1, 36)]
    matched = list(rank_modules(generations, None, "random_matched", ("head", "mlp"), of="weight_delta", kv=kv).module)
    theirs = list(rank_modules(generations, None, "weight_delta", ("head", "mlp"), kv=kv).module)
    assert matched != theirs and [size(matched[:k]) for k in (3, 9, 20)] == [size(theirs[:k]) for k in (3, 9, 20)]


def test_sets_that_move_keys_and_values_are_counted(generations: Pair) -> None:
    from mechtransplant.controls import possible_sets
    from mechtransplant.ranking.matched import classes

    group = classes(generations, generations.modules("head"), 1)
    # a whole group and one head: 16 groups, then 15 with two heads each
    assert possible_sets(group, ["L0H0", "L0H1", "L3H5"], generations) == 16 * 15 * 2
    # two heads of two groups: 120 pairs of groups, two heads in each
    assert possible_sets(group, ["L0H0", "L3H5"], generations) == 120 * 4
    few = random_matched(generations, ["L0H0", "L0H1"], 100, kv="group")
    assert len(few.sets) == 15 and few.depth == "not matched"


def test_random_orders_need_a_whole_order(generations: Pair) -> None:
    with pytest.raises(UsageError, match="all 4 candidates"):
        random_orders(generations, ["L0.mlp", "L1.mlp"], 3, 1)
    with pytest.raises(UsageError, match="no modules were named"):
        random_matched(generations, [], 3)


def test_a_graft_among_its_controls_in_one_call(unchanged: Pair, addition: Task) -> None:
    splits = addition.split(16, 16, 48)
    rank = rank_modules(unchanged, splits.discover, "gradient")
    other = rank_modules(unchanged, load_task("sort").split(16, 1, 1).discover, "gradient")
    found = graft_with_controls(unchanged, rank, 6, splits.test, unrelated=other, random_sets=8, seed=2)
    rows = found.table.set_index("role")
    assert set(rows.index) == {"target", "source", "graft", "bottom", "all", "reverse", "self", "unrelated", "random"}
    assert found.identical and rows.accuracy["self"] == rows.accuracy["target"]
    assert len(rows.loc["random"]) == 8 and found.outcome.controls is not None
    assert found.outcome.controls.beaten == (rows.loc["random"].accuracy < rows.accuracy["graft"]).sum()
    with Graft(rank.module[:6]).applied(unchanged):
        assert evaluate(unchanged.target, splits.test).accuracy == rows.accuracy["graft"]
    with Graft(rank.module[:6]).applied(unchanged.reversed()):
        assert evaluate(unchanged.source, splits.test).accuracy == rows.accuracy["reverse"]
    assert found.outcome.parameter_share == pytest.approx(
        Graft(rank.module[:6]).parameter_count(unchanged)
        / Graft(unchanged.modules("linear")).parameter_count(unchanged)
    )
    assert "self-graft identical" in str(found)
    for k, task, message in (
        (29, splits.test, "k must be a whole number of at least 1 and at most 28"),
        (6, splits.choose, "served to select"),
    ):
        with pytest.raises(UsageError, match=message):
            graft_with_controls(unchanged, rank, k, task, random_sets=1)
