"""Random sets are matched as they claim, and figures come from tidy frames without being shown."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechtransplant.controls import deal, random_matched, random_orders
from mechtransplant.errors import UsageError
from mechtransplant.experiment.make_up import others_make_up
from mechtransplant.figures import against_chance, cost_plot, k_curve, save_figure, score_heatmap
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair
from mechtransplant.ranking import rank_modules


@pytest.mark.parametrize("kind", ["linear", "head"])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_random_sets_are_matched_different_and_seeded(generations: Pair, kind: str, k: int) -> None:
    chosen = list(rank_modules(generations, None, "random", kind).module[:k])  # type: ignore[arg-type]
    controls = random_matched(generations, chosen, 20, seed=3)
    assert controls.sets == random_matched(generations, chosen, 20, seed=3).sets
    assert len({frozenset(s) for s in controls.sets}) == len(controls.sets) > 0
    assert frozenset(chosen) not in {frozenset(s) for s in controls.sets}
    for drawn in controls.sets:
        assert len(set(drawn)) == k
        assert Graft(drawn).parameter_count(generations) == Graft(chosen).parameter_count(generations)
        if kind == "linear":
            kinds = [Counter(map(generations.layout.is_feed_forward, s)) for s in (drawn, chosen)]
            assert kinds[0] == kinds[1]


def test_depth_is_matched_where_it_can_be(generations: Pair) -> None:
    chosen = list(rank_modules(generations, None, "random").module[:14])
    controls = random_matched(generations, chosen, 10)
    assert controls.depth == "thirds"

    def profile(modules: tuple[str, ...] | list[str]) -> Counter[int]:
        return Counter(int(m[1]) * 3 // 4 for m in modules)

    assert all(profile(s) == profile(chosen) for s in controls.sets)
    assert random_matched(generations, chosen[:1], 10).depth == "not matched"


def projections(modules: Any) -> Counter[str]:
    return Counter(m.split(".", 1)[1] for m in modules)


def test_random_sets_of_the_same_projections(generations: Pair) -> None:
    chosen = [m for m in generations.modules("linear") if m.endswith(("v_proj", "up_proj"))][1:7]
    by_size, matched = (random_matched(generations, chosen, 20, 3, match=m) for m in ("size", "projection"))
    assert len(matched.sets) == 4 * 4 - 1 and all(projections(s) == projections(chosen) for s in matched.sets)
    assert any(projections(s) != projections(chosen) for s in by_size.sets), "of one size they are exchanged"
    order = list(rank_modules(generations, None, "random", "linear").module)
    for drawn in random_orders(generations, order, 5, 6, match="projection").orders:
        assert [m.split(".", 1)[1] for m in drawn] == [m.split(".", 1)[1] for m in order] and drawn != tuple(order)
    # strengths stay with their projection
    hands = [1.0 if m.endswith("v_proj") else 2.0 for m in chosen]
    dealt_to = deal(generations, chosen, hands, matched.sets, "projection")
    for drawn, dealt in zip(matched.sets, dealt_to, strict=True):
        assert list(dealt) == [1.0 if m.endswith("v_proj") else 2.0 for m in drawn]
    with pytest.raises(UsageError, match="match: expected size or projection, got 'name'"):
        random_matched(generations, chosen, 2, match="name")  # type: ignore[arg-type]


def test_a_page_says_where_random_sets_are_of_other_projections(generations: Pair) -> None:
    chosen = [f"L{layer}.v_proj" for layer in range(4)]
    others = [["L0.k_proj", *chosen[1:]], ["L0.k_proj", "L1.k_proj", *chosen[2:]]]
    said = others_make_up(generations, chosen, others, "size")
    assert "it has 0 k_proj (they 1 to 2), 4 v_proj (they 2 to 3)" in said
    assert not others_make_up(generations, chosen, [*others, chosen], "size"), "nothing outside their range"
    assert not others_make_up(generations, chosen, others, "projection")
    assert not others_make_up(generations, ["L0H0"], [["L1H1"]], "size")


def test_bins_hold_as_many_possible_values() -> None:
    graft, sets = 0.6, [0.6 - 1 / 200] * 3 + [0.6] * 2 + [0.6 + 1 / 200, 0.9]
    rows = chance()
    rows = rows[~rows["set"].str.startswith(("set", "tuned", "order"))]
    drawn = [{**rows.iloc[2].to_dict(), "role": "random", "set": f"set-{i}", "accuracy": a} for i, a in enumerate(sets)]
    _, (left, _) = against_chance(pd.concat([rows, pd.DataFrame(drawn)]), "lae", 4)
    widths = {round(2 * patch.get_width(), 6) for patch in left.patches}
    assert len(widths) == 1 and widths.pop() % 1 == 0, "whole numbers of questions, half a point each"
    # what ties with the graft stands in its bin, not beside it
    inside = next(p for p in left.patches if p.get_x() <= 100 * graft < p.get_x() + p.get_width())
    assert inside.get_x() < 100 * graft < inside.get_x() + inside.get_width() and inside.get_height() >= 2


def test_a_set_of_everything_has_no_control(generations: Pair) -> None:
    assert random_matched(generations, generations.modules("linear"), 5).sets == []
    mlps = [m for m in generations.modules("linear") if generations.layout.is_feed_forward(m)]
    assert random_matched(generations, mlps, 5).sets == [], "every feed-forward layer: no other set is matched"


def sweep() -> pd.DataFrame:
    rows = []
    for role, k, accuracy in [
        ("target", 0, 0.2),
        ("source", 0, 0.9),
        ("graft", 2, 0.3),
        ("graft", 8, 0.6),
        ("random", 2, 0.2),
        ("random", 2, 0.4),
        ("random", 8, 0.5),
        ("random", 8, 0.7),
    ]:
        rows.append(
            {
                "split": "choose",
                "role": role,
                "k": k,
                "strength": 1.0,
                "budget": 8,
                "accuracy": accuracy,
                "low": accuracy - 0.1,
                "high": accuracy + 0.1,
                "n": 64,
            }
        )
    return pd.DataFrame(rows)


def test_k_curve_draws_what_the_frame_holds() -> None:
    _, axes = k_curve(sweep(), candidates=16)
    labels = axes.get_legend_handles_labels()[1]
    assert {"source, 90.0 %", "target, 20.0 %", "random, range of 2", "random, median", "graft"} == set(labels)
    median = next(line for line in axes.lines if line.get_label() == "random, median")
    assert median.get_ydata() == pytest.approx([30, 60])
    assert axes.get_xlabel() == "grafted modules K (of 16)"


def chance() -> pd.DataFrame:
    """A graft of 60 % among ten random sets of 41 to 77 %, two at another strength, and others that are no control."""
    same = {"split": "test", "budget": 8, "n": 200, "rule": "lae", "k": 4, "strength": 1.0, "set": ""}
    rows = [
        {**same, "role": "target", "rule": "", "k": 0, "accuracy": 0.05, "log_probability": -9.0},
        {**same, "role": "source", "rule": "", "k": 0, "accuracy": 0.8, "log_probability": -0.5},
        {**same, "role": "graft", "accuracy": 0.6, "log_probability": -1.0},
        {**same, "role": "graft", "strength": 2.0, "accuracy": 0.1, "log_probability": -5.0},
        {**same, "role": "random", "set": "order-0", "accuracy": 0.9, "log_probability": -0.1},
        {**same, "role": "random", "rule": "own", "set": "set-0", "accuracy": 0.9, "log_probability": -0.1},
        {**same, "role": "random", "set": "set-0", "strength": 2.0, "accuracy": 0.9, "log_probability": -0.1},
    ]
    for i in range(10):
        rows.append(
            {**same, "role": "random", "set": f"set-{i}", "accuracy": 0.41 + 0.04 * i, "log_probability": -2 + i / 8}
        )
    for i in range(2):
        rows.append(
            {**same, "role": "random", "set": f"tuned-{i}", "strength": 1.5, "accuracy": 0.7, "log_probability": -0.75}
        )
    return pd.DataFrame(rows)


def test_a_graft_among_its_random_sets() -> None:
    figure, (left, right) = against_chance(chance(), "lae", 4, title="pair")
    assert sum(patch.get_height() for patch in left.patches) == 12 == sum(patch.get_height() for patch in right.patches)
    # five of ten have less than 60 %, by log-probability eight have less and one as much
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "10 random sets: beats 5 (p = 0.55), by log-probability 8 (p = 0.27)",
        "2 random sets, strength 1.5: beats 0 (p = 1), by log-probability 0 (p = 1)",
        "graft by lae: 60.0 %, −1.00 nats",
        "source: 80.0 %, −0.50 nats",
        "target: 5.0 %, −9.00 nats, off the axis",
    ]
    assert figure._suptitle.get_text() == "pair\nK = 4 at strength 1, 200 test questions"
    assert left.get_xlim()[0] > 30
    # at the graft's own strength they are the random sets again
    same = chance().assign(strength=1.0).query("log_probability not in (-5.0, -0.1)")
    assert len(against_chance(same, "lae", 4)[0].legends[0].get_texts()) == 4
    # free-form answers have no log-probability
    _, alone = against_chance(chance().assign(log_probability=np.nan), "lae", 4)
    assert alone.get_xlabel() == "accuracy, %"
    # a graft of everything is a row of its own, beside draws of its changes
    whole = chance().replace({"role": {"graft": "all", "random": "random_weights"}, "rule": {"own": "lae"}})
    whole["set"] = whole["set"].str.replace("tuned", "weights")
    whole.loc[whole.role == "all", "rule"] = ""
    found = (
        against_chance(whole[~whole["set"].str.startswith("set")], "lae", 4, drawn="draws")[0].legends[0].get_texts()
    )
    assert found[0].get_text().startswith("2 draws, strength 1.5: beats 0")
    assert found[1].get_text().startswith("graft of everything: 60.0 %")


def test_chance_needs_a_graft_and_random_sets() -> None:
    for rows, k, said in (
        (chance(), 5, "no graft of lae with K = 5 at strength 1"),
        (chance().query("role != 'random'"), 4, "no random set of that size"),
        (chance().query("split != 'test'"), 4, "no source"),
        (chance().query("role != 'target'"), 4, "no target on test"),
        (chance().drop(columns=["set"]), 4, "the frame lacks set"),
    ):
        with pytest.raises(UsageError, match=said):
            against_chance(rows, "lae", k)


def test_chance_refuses_questions_that_served_to_select() -> None:
    # on choose random sets and draws were tried at several strengths, and the graft was the best of several
    rows = chance().assign(split="choose")
    rows.loc[rows["set"] == "tuned-1", "strength"] = 2.0
    with pytest.raises(UsageError, match="'choose' split served to select: draw the test split"):
        against_chance(rows, "lae", 4, split="choose")


def test_heatmap_marks_the_chosen(generations: Pair) -> None:
    ranking = rank_modules(generations, None, "weight_delta")
    _, axes = score_heatmap(ranking, chosen=5)
    assert len(axes.lines) == 5
    assert [t.get_text() for t in axes.get_xticklabels()] == ["q", "k", "v", "o", "gate", "up", "down"]


def test_saved_figures_are_byte_identical_and_text_stays_text(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_figure(k_curve(sweep())[0], tmp_path / name, "curve", sweep())
    for suffix in ("png", "pdf", "svg", "csv"):
        first, second = ((tmp_path / name / f"curve.{suffix}").read_bytes() for name in ("one", "two"))
        assert first == second and first
    assert b"/Type3" not in (tmp_path / "one" / "curve.pdf").read_bytes()


def test_notebooks_draw_figures() -> None:
    from IPython.core.formatters import DisplayFormatter

    data, _ = DisplayFormatter().format(k_curve(sweep())[0])
    assert data["image/png"].startswith(b"\x89PNG") and len(data["image/png"]) > 5_000


def test_nothing_is_shown_or_registered() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    k_curve(sweep())
    assert plt.get_fignums() == before


def test_the_cost_figure_says_what_it_shows(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        [
            {
                "shape": shape, "layers": layers, "parameters": size * 1_000_000, "prompts": prompts, "device": "cpu",
                "held_mib": 8 * size, "peak_mib": 9 * size + prompts, "total": size * prompts / 100,
            }
            for shape, layers, size in (("small", 4, 40), ("large", 30, 135))
            for prompts in (16, 128)
        ]
    )  # fmt: skip
    figure, (time, memory) = cost_plot(rows)
    assert [line.get_label() for line in time.get_lines()] == ["small, cpu", "large, cpu"]
    np.testing.assert_allclose(time.get_lines()[1].get_ydata(), [135 * 0.16, 135 * 1.28])
    assert [t.get_text() for t in memory.get_yticklabels()] == ["small, 40 M × 2\ncpu", "large, 135 M × 2\ncpu"]
    # both weights, and above them the highest peak of the shape's rows
    tops = [bar.get_x() + bar.get_width() for bar in memory.patches]
    np.testing.assert_allclose(tops[1::2], [(9 * 40 + 128) / 1024, (9 * 135 + 128) / 1024])
    save_figure(figure, tmp_path, "cost")
    assert (tmp_path / "cost.pdf").stat().st_size > 1000
