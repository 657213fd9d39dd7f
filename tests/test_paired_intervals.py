"""Intervals of paired accuracies agree with independent solutions, hold the truth, and are never empty."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from mechtransplant.figures.calibration import interval_coverage
from mechtransplant.significance import (
    accuracy_ratio_interval,
    mcnemar_exact,
    mcnemar_power,
    paired_difference_interval,
    recovery_interval,
)
from mechtransplant.significance.paired import (
    AFTER,
    OUTCOMES,
    SOURCE,
    TARGET,
    difference_intervals,
    null_variance,
    ratio_intervals,
    recovery_intervals,
    score_statistic,
)

Z2 = stats.norm.ppf(0.975) ** 2
#: both right, gained, lost, both wrong
TABLES = [(40, 9, 3, 8), (43, 8, 3, 3), (3, 20, 1, 1), (5, 12, 0, 13), (120, 60, 25, 51), (2, 30, 1, 217)]
#: statsmodels 0.15.0 (in an environment of its own): [[both, gained], [lost, neither]] of each of TABLES to
#: statsmodels.stats.proportion._confint_riskratio_paired_nam(table).confint, the score interval without correction
RATIOS = [
    (0.9803829079541265, 1.3592729481676187),
    (0.964552962911321, 1.3029641149703983),
    (2.4305852403206427, 14.725102186782289),
    (1.882065624895041, 7.5301263731769605),
    (1.1121577262507887, 1.3950538526039624),
    (3.818687447162921, 31.510949929449914),
]
#: statsmodels 0.15.0: statsmodels.stats.contingency_tables.mcnemar([[4, b], [c, 6]], exact=True).pvalue
MCNEMAR = {
    (0, 0): 1.0,
    (1, 0): 1.0,
    (5, 0): 0.0625,
    (0, 7): 0.015625,
    (3, 9): 0.14599609375,
    (10, 10): 1.0,
    (12, 4): 0.076812744140625,
    (30, 17): 0.07894069368148846,
    (101, 60): 0.001538316615149198,
}


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """(before, after)"""
    cells = [(True, True)] * both + [(False, True)] * gained + [(True, False)] * lost + [(False, False)] * neither
    before, after = np.array(cells, dtype=bool).T
    return before, after


def tables(sizes: tuple[int, ...], each: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([rng.multinomial(n, rng.dirichlet(np.full(8, 0.4))) for n in sizes for _ in range(each)], float)


# --- against independent solutions ----------------------------------------------------------------------------------


def tango(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Tango's interval by his closed form of the restricted estimate (1998) and a root finder."""

    def excess(delta: float) -> float:
        # q: the likeliest probability of a lost question when the difference is delta
        b = -(gained + lost) + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 8 * n * c, 0)) - b) / (4 * n)
        return (gained - lost - n * delta) ** 2 - Z2 * n * (2 * q + delta * (1 - delta))

    estimate = (gained - lost) / n
    # beside the estimate, where a table without discordant answers makes both sides 0
    low = -1.0 if estimate == -1 else optimize.brentq(excess, -1 + 1e-12, estimate - 1e-9)
    high = 1.0 if estimate == 1 else optimize.brentq(excess, estimate + 1e-9, 1 - 1e-12)
    return low, high


@pytest.mark.parametrize("table", [*TABLES, (0, 3, 0, 20), (10, 0, 2, 0), (7, 0, 0, 9), (0, 0, 1, 0), (0, 4, 0, 0)])
def test_difference_is_tangos(table: tuple[int, int, int, int]) -> None:
    found = paired_difference_interval(*answers(*table))
    assert found == pytest.approx(tango(table[1], table[2], sum(table)), abs=1e-9)


@pytest.mark.parametrize(("table", "expected"), list(zip(TABLES, RATIOS, strict=True)))
def test_ratio_without_correction_is_statsmodels(table: tuple[int, ...], expected: tuple[float, float]) -> None:
    counts = np.zeros((1, 8))
    counts[0, [7, 1, 4, 0]] = table
    low, high = ratio_intervals(counts, corrected=False)
    assert (low[0], high[0]) == pytest.approx(expected, rel=1e-8)
    corrected = accuracy_ratio_interval(*answers(*table))
    assert corrected[0] < expected[0] and corrected[1] > expected[1]


def test_ratio_without_correction_equals_statsmodels_live() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    if not hasattr(proportion, "_confint_riskratio_paired_nam"):
        pytest.skip("this statsmodels has no paired ratio")
    rng = np.random.default_rng(1)
    for _ in range(20):
        table = rng.integers(1, 40, 4)
        counts = np.zeros((1, 8))
        counts[0, [7, 1, 4, 0]] = table
        low, high = ratio_intervals(counts, corrected=False)
        found = proportion._confint_riskratio_paired_nam(table)
        assert (low[0], high[0]) == pytest.approx(tuple(getattr(found, "confint", found[0])), rel=1e-6)


@pytest.mark.parametrize("recovery", [-0.7, 0.0, 0.3, 0.8, 1.0, 1.9])
def test_null_variance_is_that_of_the_likeliest_table(recovery: float) -> None:
    contrast = AFTER - TARGET - recovery * (SOURCE - TARGET)

    def unlikely(p: np.ndarray, counts: np.ndarray) -> float:
        return -float((counts * np.log(np.maximum(p, 1e-300))).sum())

    for counts in tables((6, 20, 60), 4, seed=3):
        found = null_variance(counts[None], contrast[None])[0]
        # unseen outcomes may have a probability too
        best = optimize.minimize(
            unlikely,
            np.full(8, 1 / 8),
            args=(counts,),
            method="SLSQP",
            bounds=[(0, 1)] * 8,
            constraints=[
                {"type": "eq", "fun": lambda p: p.sum() - 1},
                {"type": "eq", "fun": lambda p: p @ contrast},
            ],
            options={"ftol": 1e-12, "maxiter": 500},
        )
        # 8: no step in double precision goes further down
        assert best.success or best.status == 8
        assert found == pytest.approx(best.x @ contrast**2, abs=5e-4)


def test_recovery_weights_are_those_of_empirical_likelihood() -> None:
    """Where every outcome was seen, the likeliest table is Owen's empirical likelihood."""
    emplike = pytest.importorskip("statsmodels.emplike.descriptive")
    counts = np.array([9, 4, 7, 12, 3, 2, 5, 8.0])
    for recovery in (0.2, 0.5, 1.2):
        contrast = AFTER - TARGET - recovery * (SOURCE - TARGET)
        each = np.repeat(contrast, counts.astype(int))
        weights = emplike.DescStat(each).test_mean(0, return_weights=True)[2].ravel()
        assert null_variance(counts[None], contrast[None])[0] == pytest.approx(weights @ each**2, rel=1e-5)


def test_recovery_with_a_source_that_is_always_right_and_a_target_that_never_is() -> None:
    """Recovery is then the accuracy after the graft, and its interval Wilson's."""
    after = np.arange(40) < 13
    found = recovery_interval(np.zeros(40, bool), np.ones(40, bool), after)
    low, high = stats.binomtest(13, 40).proportion_ci(method="wilson")
    # the source's and target's accuracies are estimates too: a little wider than with both known
    assert found[0] <= 100 * low + 1e-6 and found[1] >= 100 * high - 1e-6
    assert found == pytest.approx((100 * low, 100 * high), abs=6)


def test_the_interval_is_the_set_of_accepted_values() -> None:
    """On a grid: no gaps, and nothing accepted outside."""
    counts = tables((5, 12, 40, 100), 60)
    differences, gain, gap = difference_intervals(counts, TARGET, AFTER), AFTER - TARGET, SOURCE - TARGET
    cases = [
        (gain, np.ones(8), differences, np.linspace(-0.999, 0.999, 50), False),
        (AFTER, TARGET, ratio_intervals(counts), np.geomspace(0.01, 100, 50), True),
        (gain, gap, recovery_intervals(counts), np.tan(np.linspace(-1.55, 1.55, 50)), False),
    ]
    for top, bottom, (low, high), values, corrected in cases:
        bounded = ~(np.isinf(low) & np.isinf(high))
        for value in values:
            contrast = np.broadcast_to(top - value * bottom, counts.shape)
            step = max(1.0, abs(value)) / 2 if corrected else 0.0
            accepted = score_statistic(counts, contrast, step) <= Z2
            inside = (low <= value) & (value <= high)
            np.testing.assert_array_equal(accepted[bounded], inside[bounded], err_msg=f"{value}")


def test_exact_mcnemar_equals_statsmodels_recorded_and_live() -> None:
    for (gained, lost), expected in MCNEMAR.items():
        before, after = answers(4, gained, lost, 6)
        assert mcnemar_exact(before, after) == pytest.approx(expected, abs=1e-12)
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    for gained in range(0, 40, 3):
        for lost in range(0, 40, 4):
            before, after = answers(4, gained, lost, 6)
            live = contingency.mcnemar([[4, gained], [lost, 6]], exact=True).pvalue
            assert mcnemar_exact(before, after) == pytest.approx(live, abs=1e-12)


# --- they hold the truth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("overlap", [0.2, 0.9])
def test_coverage(n: int, overlap: float) -> None:
    """1,000 data sets of three models whose answers go together; accuracies 0.35, 0.6 and 0.9."""
    sets = 1000
    rng = np.random.default_rng([n, int(10 * overlap)])
    shared, own = rng.normal(size=(400_000, 1)), rng.normal(size=(400_000, 3))
    latent = math.sqrt(overlap) * shared + math.sqrt(1 - overlap) * own
    right = latent < stats.norm.ppf([0.35, 0.9, 0.6])
    p = np.bincount(right @ [4, 2, 1], minlength=8) / len(right)
    # equal tables have equal intervals
    counts, each = np.unique(rng.multinomial(n, p, size=sets).astype(float), axis=0, return_inverse=True)
    # 99.99 % binomial intervals: sixteen of them, and a false alarm in hundreds of changes
    low, high = stats.binom.ppf([0.00005, 0.99995], sets, 0.95) / sets
    # the distribution of a count is lumpy, and the correction is meant to be cautious
    cautious = 0.99 if n == 30 else 0.98
    for name, ends, truth in (
        ("difference", difference_intervals(counts, TARGET, AFTER), p @ (AFTER - TARGET)),
        ("gap", difference_intervals(counts, TARGET, SOURCE), p @ (SOURCE - TARGET)),
        ("ratio", ratio_intervals(counts), p @ AFTER / (p @ TARGET)),
        ("Recovery", recovery_intervals(counts), p @ (AFTER - TARGET) / (p @ (SOURCE - TARGET))),
    ):
        reported = np.isfinite(ends[0]) | (name != "Recovery")
        held = (ends[0] <= truth) & (truth <= ends[1])
        hit = held[each.ravel()][reported[each.ravel()]].mean()
        assert low <= hit <= (max(high, cautious) if name == "ratio" or n == 30 else high), (name, hit)


def test_the_committed_study_draws_and_keeps_what_the_docstrings_promise() -> None:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "coverage.csv"
    study = pd.read_csv(path)
    figure, panels = interval_coverage(study)
    assert panels.shape == (2, 4) and [p.get_title() for p in panels[0]] == list(dict.fromkeys(study.quantity))
    assert figure.legends
    chosen = study[study.chosen].set_index("quantity")
    assert (chosen.coverage >= 0.945).all()
    assert (chosen.worst[["difference", "gap", "TIR"]] >= 0.925).all()
    # where the ratio is known to fail without a correction
    plain = study[(study.quantity == "TIR") & (study.method == "score") & (study.n == 25)]
    assert float(plain.worst.iloc[0]) < 0.9 < float(chosen[chosen.n == 25].worst["TIR"])


# --- boundaries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 10, 200])
def test_no_answer_differs(n: int) -> None:
    """The interval is not empty: it is ± z²/(n + z²)."""
    for same in (np.zeros(n, bool), np.ones(n, bool), np.arange(n) % 2 == 0):
        low, high = paired_difference_interval(same, same)
        assert (low, high) == pytest.approx((-Z2 / (n + Z2), Z2 / (n + Z2)), abs=1e-12)
        assert recovery_interval(same, same, same) == (-math.inf, math.inf)
    low, high = accuracy_ratio_interval(np.ones(n, bool), np.ones(n, bool))
    assert 0 < low < 1 < high < math.inf and low * high == pytest.approx(1)
    assert accuracy_ratio_interval(np.zeros(n, bool), np.zeros(n, bool)) == (0, math.inf)


@pytest.mark.parametrize("n", [1, 3, 30])
def test_all_wrong_and_then_all_right(n: int) -> None:
    wrong, right = np.zeros(n, bool), np.ones(n, bool)
    low, high = paired_difference_interval(wrong, right)
    assert high == 1 and -1 < low < 1
    assert paired_difference_interval(right, wrong) == pytest.approx((-high, -low))
    low, high = accuracy_ratio_interval(wrong, right)
    assert low > 0 and high == math.inf
    low, high = accuracy_ratio_interval(right, wrong)
    assert low == 0 and 0 < high < math.inf
    if n == 30:
        low, high = recovery_interval(wrong, right, right)
        assert 80 < low < 100 < high < 120
        low, high = recovery_interval(wrong, right, wrong)
        assert -20 < low < 0 < high < 20


def test_exchanging_the_models_turns_the_interval_round() -> None:
    for table in TABLES:
        before, after = answers(*table)
        low, high = paired_difference_interval(before, after)
        assert paired_difference_interval(after, before) == pytest.approx((-high, -low), abs=1e-12)
        low, high = accuracy_ratio_interval(before, after)
        assert accuracy_ratio_interval(after, before) == pytest.approx((1 / high, 1 / low), rel=1e-9)
        assert low <= after.mean() / before.mean() <= high


def test_recovery_is_unbounded_exactly_where_the_interval_of_the_gap_covers_zero() -> None:
    counts = tables((8, 30, 100), 200, seed=5)
    low, high = recovery_intervals(counts)
    gap_low, gap_high = difference_intervals(counts, TARGET, SOURCE)
    covers = (gap_low <= 0) & (gap_high >= 0)
    assert 0 < covers.mean() < 1
    np.testing.assert_array_equal(np.isinf(low), covers)
    np.testing.assert_array_equal(np.isinf(high), covers)
    with np.errstate(divide="ignore", invalid="ignore"):
        recovery = counts @ (AFTER - TARGET) / (counts @ (SOURCE - TARGET))
    assert np.all((low <= recovery)[~covers] & (recovery <= high)[~covers])


def test_a_higher_level_is_wider_and_more_questions_are_narrower() -> None:
    rows = np.repeat(OUTCOMES.astype(bool), [4, 9, 3, 6, 1, 2, 1, 5], axis=0)
    for interval, columns in (
        (paired_difference_interval, (0, 2)),
        (accuracy_ratio_interval, (0, 2)),
        (recovery_interval, (0, 1, 2)),
    ):
        small = [rows[:, c] for c in columns]
        large = [np.tile(each, 10) for each in small]
        low, high = interval(*small)
        wide, narrow = interval(*small, level=0.99), interval(*large)
        if math.isfinite(low):
            assert wide[0] < low < narrow[0] < narrow[1] < high < wide[1]
        assert math.isfinite(narrow[0]) and math.isfinite(narrow[1])
        # analytic: the same twice
        assert interval(*small) == (low, high)


def test_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired_difference_interval(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError, match="no questions"):
        accuracy_ratio_interval(np.ones(0, bool), np.ones(0, bool))


@pytest.mark.parametrize(
    ("n", "gained", "lost", "alpha"), [(12, 0.5, 0.1, 0.05), (9, 0.3, 0.3, 0.2), (10, 0.8, 0, 0.05)]
)
def test_the_power_of_mcnemar_is_the_sum_over_all_outcomes(n: int, gained: float, lost: float, alpha: float) -> None:
    found = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            flips = math.comb(n, b) * math.comb(n - b, c)
            chance = flips * gained**b * lost**c * (1 - gained - lost) ** (n - b - c)
            before = np.array([False] * b + [True] * c, dtype=bool)
            found += chance * (mcnemar_exact(before, ~before) <= alpha)
    assert mcnemar_power(n, gained, lost, alpha) == pytest.approx(found, abs=1e-12)


def test_the_power_of_mcnemar_at_its_ends() -> None:
    assert mcnemar_power(50, 0, 0) == 0 and mcnemar_power(5, 1, 0) == 0 and mcnemar_power(6, 1, 0) == 1
    # without a change the test keeps its level
    assert 0 < mcnemar_power(500, 0.2, 0.2) <= 0.05
    for wrong in ((0, 0.1, 0.1), (10, 0.7, 0.4), (10, -0.1, 0.1)):
        with pytest.raises(ValueError, match="no probabilities"):
            mcnemar_power(*wrong)
