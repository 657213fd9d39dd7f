"""Tests and corrections agree with scipy and with slow, obvious references; what is invalid is refused."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
from frames import frame
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mechtransplant.errors import UsageError
from mechtransplant.significance import (
    adjust,
    effective_tests,
    label_permutation,
    one_sample_effects,
    power,
    prompts_needed,
    shift_matrix,
    sign_flip,
    smallest_effect,
    two_sample_effects,
)
from mechtransplant.significance import test_shifts as table_of


def correlated(rng: np.random.Generator, prompts: int, modules: int) -> np.ndarray:
    return rng.normal(size=(prompts, modules)) + rng.normal(size=(prompts, 1))


# --- against scipy --------------------------------------------------------------------------------------------------


def abs_t(x: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(stats.ttest_1samp(x, 0, axis=axis).statistic)


def abs_welch(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(stats.ttest_ind(x, y, axis=axis, equal_var=False).statistic)


@pytest.mark.parametrize("prompts", [2, 5, 9])
def test_every_sign_flip_equals_scipys_exact_test(prompts: int) -> None:
    x = correlated(np.random.default_rng(prompts), prompts, 4)
    ours = sign_flip(x)
    theirs = stats.permutation_test(
        (x,), abs_t, permutation_type="samples", alternative="greater", n_resamples=np.inf, vectorized=True, axis=0
    )
    np.testing.assert_allclose(ours.p, theirs.pvalue, atol=1e-12)
    assert ours.exact and ours.permutations == 2 ** (prompts - 1)
    np.testing.assert_allclose(ours.statistic, stats.ttest_1samp(x, 0).statistic, rtol=1e-12)


@pytest.mark.parametrize(("first", "second"), [(4, 5), (3, 7), (6, 5)])
def test_every_division_equals_scipys_exact_test(first: int, second: int) -> None:
    rng = np.random.default_rng(first)
    x, y = correlated(rng, first, 4) ** 3, correlated(rng, second, 4)
    ours = label_permutation(x, y)
    theirs = stats.permutation_test(
        (x, y), abs_welch, permutation_type="independent", alternative="greater", n_resamples=np.inf, vectorized=True
    )
    assert ours.exact
    np.testing.assert_allclose(ours.p, theirs.pvalue, atol=1e-12)
    np.testing.assert_allclose(ours.statistic, stats.ttest_ind(x, y, equal_var=False).statistic, rtol=1e-9)


def test_random_permutations_count_the_observed_one() -> None:
    x = np.full((64, 2), 0.5) + np.random.default_rng(0).normal(size=(64, 2)) * 0.01
    found = sign_flip(x, 999)
    assert found.permutations == 999 and not found.exact
    # nothing reaches an effect as large as this: (0 + 1) / (999 + 1), never 0
    assert (found.p == 0.001).all() and (found.p_max == 0.001).all()


def test_t_and_wilcoxon_equal_scipy() -> None:
    x = correlated(np.random.default_rng(3), 23, 6)
    for name, function in (("t", lambda v: stats.ttest_1samp(v, 0)), ("wilcoxon", stats.wilcoxon)):
        table = table_of(frame(x), test=name, correction="none")  # type: ignore[arg-type]
        theirs = [function(x[:, i]) for i in range(6)]
        np.testing.assert_allclose(table.p, [r.pvalue for r in theirs], rtol=0, atol=1e-12)
        np.testing.assert_allclose(table.statistic, [r.statistic for r in theirs], rtol=1e-12)
        assert (table.permutations == 0).all()


@pytest.mark.parametrize(("ours", "theirs"), [("bh", "bh"), ("by", "by")])
def test_false_discovery_equals_scipy(ours: str, theirs: str) -> None:
    p = np.random.default_rng(1).random(50) ** 2
    np.testing.assert_allclose(adjust(p, ours), stats.false_discovery_control(p, method=theirs), atol=1e-12)


def test_holm_equals_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(2).random(40) ** 3
    for name in ("holm", "bonferroni"):
        np.testing.assert_allclose(adjust(p, name), multitest.multipletests(p, method=name)[1], atol=1e-12)


# --- max-T against a slow reference ---------------------------------------------------------------------------------


def slow_max_t(x: np.ndarray) -> tuple[list[float], list[float]]:
    """Single-step and step-down max-T over every sign-flip, as Westfall and Young write them, one number at a time."""
    prompts, modules = x.shape
    observed = [abs(float(stats.ttest_1samp(x[:, j], 0).statistic)) for j in range(modules)]
    every = []
    for signs in itertools.product([1, -1], repeat=prompts):
        flipped = x * np.array(signs)[:, None]
        every.append([abs(float(stats.ttest_1samp(flipped[:, j], 0).statistic)) for j in range(modules)])
    single = [sum(max(row) >= observed[j] * (1 - 1e-9) for row in every) / len(every) for j in range(modules)]
    order = sorted(range(modules), key=lambda j: -observed[j])
    stepped, worst = [0.0] * modules, 0.0
    for place, j in enumerate(order):
        rest = order[place:]
        share = sum(max(row[r] for r in rest) >= observed[j] * (1 - 1e-9) for row in every) / len(every)
        worst = max(worst, share)
        stepped[j] = worst
    return single, stepped


@pytest.mark.parametrize("seed", range(4))
def test_max_t_equals_a_slow_reference(seed: int) -> None:
    x = correlated(np.random.default_rng(seed), 6, 5) + np.array([0, 0, 0.5, 1.5, 3])
    single, stepped = slow_max_t(x)
    found = sign_flip(x)
    np.testing.assert_allclose(found.p_max, single, atol=1e-12)
    np.testing.assert_allclose(found.p_step_down, stepped, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(1, 6))
def test_order_of_the_adjustments(seed: int, prompts: int, modules: int) -> None:
    x = correlated(np.random.default_rng(seed), prompts, modules)
    found = sign_flip(x, 199, seed)
    assert (found.p <= found.p_step_down + 1e-12).all()
    assert (found.p_step_down <= found.p_max + 1e-12).all()
    # a module's rank by p_max follows its statistic, whatever its scale
    rescaled = sign_flip(x * np.geomspace(1e-6, 1e6, modules), 199, seed)
    np.testing.assert_allclose(rescaled.p_max, found.p_max)


def test_chunks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from mechtransplant.significance import permutation

    x, y = (correlated(np.random.default_rng(s), 40, 7) for s in (0, 1))
    whole = sign_flip(x, 500), label_permutation(x, y, 500)
    monkeypatch.setattr(permutation, "CHUNK", 1000)
    for one, other in zip(whole, (sign_flip(x, 500), label_permutation(x, y, 500)), strict=True):
        np.testing.assert_array_equal(one.p, other.p)
        np.testing.assert_array_equal(one.p_max, other.p_max)


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6])
def test_an_arrangement_ties_with_itself(scale: float) -> None:
    """Groups that barely spread beside a large difference: the observed division and its mirror image still count."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        task, control = 1 + scale * rng.normal(size=(4, 3)), scale * rng.normal(size=(4, 3))
        assert (label_permutation(task, control).p == 2 / 70).all()
        flips = 1 + scale * rng.normal(size=(8, 3))
        flips[7, 1] = np.nan
        found = sign_flip(flips)
        np.testing.assert_allclose(found.p, [1 / 128, 1 / 64, 1 / 128])
        assert (found.p_max >= found.p).all()


def test_modules_with_fewer_prompts_do_not_drown_the_others() -> None:
    """Half of the family has half of the prompts: an effect on the others is found nearly as often as alone."""
    found = {"alone": 0, "together": 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        values, others = rng.normal(size=(16, 10)), rng.normal(size=(16, 10))
        values[:, 0] += 1.6
        others[::2] = np.nan
        found["alone"] += sign_flip(values, 499).p_max[0] <= 0.05
        found["together"] += sign_flip(np.hstack([values, others]), 499).p_max[0] <= 0.05
    assert found["alone"] > 50 and found["together"] > 0.85 * found["alone"]


def test_divisions_that_empty_a_side_do_not_count() -> None:
    rng = np.random.default_rng(0)
    task, control = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    task[2:, 1], control[2:, 1] = np.nan, np.nan
    found = label_permutation(task, control, 4000)
    # of the divisions that leave two on each side, a third at least is as extreme (2 of 6)
    assert found.p[1] >= 0.3 and found.p_max[1] >= found.p[1]


def test_missing_values_are_left_out() -> None:
    x = correlated(np.random.default_rng(5), 10, 3)
    x[7:, 1] = np.nan
    found = sign_flip(x)
    np.testing.assert_allclose(found.p[1], sign_flip(x[:7, 1:2]).p[0])
    np.testing.assert_allclose(found.p[[0, 2]], sign_flip(x[:, [0, 2]]).p)
    y = correlated(np.random.default_rng(6), 6, 3)
    both = label_permutation(x[:6], y, 5000)
    np.testing.assert_allclose(both.statistic, stats.ttest_ind(x[:6], y, equal_var=False).statistic, rtol=1e-9)


# --- the table ------------------------------------------------------------------------------------------------------


def test_table_has_the_contracts_columns_and_keeps_the_order() -> None:
    rng = np.random.default_rng(0)
    shifts = frame(correlated(rng, 20, 5) + [0, 0, 3, 0, 0])
    table = table_of(shifts)
    assert list(table)[:10] == [
        "module", "measure", "n", "effect", "low", "high", "statistic", "p", "p_adjusted", "test",
    ]  # fmt: skip
    assert list(table.module) == [f"L{i}.mlp" for i in range(5)] and (table.n == 20).all()
    assert (table.test == "sign-flip").all() and table.p_adjusted[2] < 0.05
    shuffled = table_of(shifts.sample(frac=1, random_state=1)).set_index("module").loc[table.module]
    np.testing.assert_allclose(shuffled.effect, table.effect)
    np.testing.assert_allclose(shuffled.p_adjusted, table.p_adjusted)


def test_all_modules_and_measures_are_one_family() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 6)) + [2, 0, 0, 0, 0, 0]
    both = pd.concat([frame(x), frame(y, "other")], ignore_index=True)
    table = table_of(both)
    expected = sign_flip(np.hstack([x, y])).p_max
    np.testing.assert_allclose(table.p_adjusted, expected)
    assert list(table.measure) == ["magnitude"] * 4 + ["other"] * 6
    mixed = pd.concat([frame(x), frame(y, "projection", "p{}")], ignore_index=True)
    assert list(table_of(mixed).test) == ["sign-flip"] * 4 + ["direction"] * 6


@pytest.mark.parametrize("measure", ["distance", "own", "inherited", "lae", "my-norm"])
@pytest.mark.parametrize("test", ["auto", "sign-flip", "t", "wilcoxon"])
def test_a_norm_cannot_be_centred_at_0(measure: str, test: str) -> None:
    norms = frame(np.abs(np.random.default_rng(0).normal(size=(10, 3))), measure)
    correction = "holm" if test in ("t", "wilcoxon") else "max-t"
    with pytest.raises(UsageError, match=r"never negative.*control"):
        table_of(norms, test=test, correction=correction)  # type: ignore[arg-type]
    assert (table_of(norms, control=norms).p == 1).all()


def test_a_mixed_frame_tests_what_can_be_tested() -> None:
    rng = np.random.default_rng(0)
    both = pd.concat([frame(rng.normal(size=(9, 3))), frame(rng.random((9, 3)), "own")], ignore_index=True)
    assert set(table_of(both).measure) == {"magnitude"}
    assert set(table_of(both, control=both).measure) == {"magnitude", "own"}
    with pytest.raises(UsageError, match="never negative"):
        table_of(both, measure="own")


def test_matched_prompts_are_paired_by_number() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(30, 1)) * 10
    task, control = shared + rng.normal(size=(30, 4)) + [1, 0, 0, 0], shared + rng.normal(size=(30, 4))
    found = table_of(frame(task, "own"), control=frame(control, "own"), test="matched")
    np.testing.assert_allclose(found.effect, (task - control).mean(0))
    np.testing.assert_allclose(found.p, sign_flip(task - control).p)
    unmatched = table_of(frame(task, "own"), control=frame(control, "own"))
    assert found.p[0] < 0.01 < unmatched.p[0], "what prompts share hides the effect where they are not matched"
    with pytest.raises(UsageError, match="pairs prompts by number"):
        table_of(frame(task, "own"), control=frame(control[:20], "own"), test="matched")


def test_a_module_that_never_shifts_is_not_found() -> None:
    x = np.random.default_rng(0).normal(size=(12, 3))
    x[:, 1] = 0
    for test, correction in (("sign-flip", "max-t"), ("t", "bh"), ("wilcoxon", "bh")):
        row = table_of(frame(x), test=test, correction=correction).iloc[1]  # type: ignore[arg-type]
        assert (row.effect, row.low, row.high, row.statistic, row.p, row.p_adjusted) == (0, 0, 0, 0, 1, 1)
    row = table_of(frame(np.abs(x), "own"), control=frame(np.abs(x[:8]), "own")).iloc[1]
    assert (row.effect, row.p) == (0, 1)


def test_notes_name_the_alternative() -> None:
    rng = np.random.default_rng(0)
    skewed = rng.exponential(size=(200, 2)) - 1
    notes = table_of(frame(skewed)).note
    assert notes.str.contains("assumes symmetry").all() and notes.str.contains("test='control'").all()
    assert not table_of(frame(rng.normal(size=(200, 2)))).note.any()
    assert table_of(frame(rng.normal(size=(5, 2)))).note.str.contains("no p-value is below 0.062").all()
    three = np.abs(rng.normal(size=(3, 2)))
    control = table_of(frame(three, "own"), control=frame(three[::-1], "own"))
    assert control.note.str.contains("no p-value is below 0.1").all()


def test_what_one_module_cannot_show_many_show_together() -> None:
    """With 16 prompts hardly a module is visibly skewed; the family is, and says so. Symmetric families rarely do."""
    said = {"skewed": 0, "gaussian": 0}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        for name, draw in (("skewed", rng.exponential), ("gaussian", rng.normal)):
            values = draw(size=(16, 60)) + draw(size=(16, 1))
            notes = table_of(frame(values - values.mean()), permutations=99).note
            said[name] += bool(notes.str.contains("skewed").all())
    assert said["skewed"] >= 35 and said["gaussian"] <= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": "sing-flip"}, "did you mean sign-flip"),
        ({"correction": "bonferoni"}, "did you mean bonferroni"),
        ({"measure": "own"}, "unknown measure of shifts 'own'"),
        ({"test": "t"}, "max-t needs the permutations"),
        ({"test": "control"}, "pass control="),
        ({"test": "direction"}, "projection"),
        ({"permutations": 10}, "at least 99"),
        ({"permutations": 500.0}, "whole number"),
        ({"level": 1.2}, "level"),
        ({"level": "0.95"}, "level"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table_of(frame(np.random.default_rng(0).normal(size=(9, 2))), **change)  # type: ignore[arg-type]


def test_wrong_frames() -> None:
    good = frame(np.random.default_rng(0).normal(size=(9, 2)))
    with pytest.raises(UsageError, match="lacks the columns value"):
        table_of(good.drop(columns="value"))
    with pytest.raises(UsageError, match="several values"):
        table_of(pd.concat([good, good.iloc[:1]]))
    with pytest.raises(UsageError, match="no rows"):
        table_of(good.iloc[:0])
    with pytest.raises(UsageError, match="fewer than two prompts"):
        table_of(good[good.prompt == 0])
    with pytest.raises(UsageError, match="differ in"):
        table_of(good, control=good[good.module == "L0.mlp"])
    with pytest.raises(UsageError, match="measure the same in both"):
        table_of(good, control=good.assign(measure="own"))
    with pytest.raises(UsageError, match="rows without prompt"):
        table_of(pd.concat([good, good.iloc[:1].assign(prompt=np.nan)]))
    with pytest.raises(UsageError, match="must be numbers"):
        table_of(good.assign(value="large"))
    with pytest.raises(UsageError, match="infinite"):
        table_of(good.assign(value=np.inf))
    with pytest.raises(UsageError, match="depends on all others"):
        table_of(good.assign(measure="alignment"))
    with pytest.raises(UsageError, match="say measure="):
        shift_matrix(pd.concat([good, good.assign(measure="own")]))


def test_few_permutations_are_said_to_be_too_few_for_holm() -> None:
    with pytest.warns(UserWarning, match="cannot go below"):
        table_of(frame(np.random.default_rng(0).normal(size=(20, 50))), correction="holm", permutations=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table_of(frame(np.random.default_rng(0).normal(size=(20, 50))), correction="holm", permutations=5000)


# --- effects and power ----------------------------------------------------------------------------------------------


def test_effects_are_means_and_cohens_d() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)) + [0, 1, 5], rng.normal(size=(25, 3))
    one = one_sample_effects(x)
    np.testing.assert_allclose(one.mean, x.mean(0))
    np.testing.assert_allclose(one.size, x.mean(0) / x.std(0, ddof=1))
    two = two_sample_effects(x, y)
    np.testing.assert_allclose(two.mean, x.mean(0) - y.mean(0))
    spread = np.sqrt((x.var(0, ddof=1) + y.var(0, ddof=1)) / 2)
    np.testing.assert_allclose(two.size, (x.mean(0) - y.mean(0)) / spread)
    for found in (one, two):
        assert (found.low < found.mean).all() and (found.mean < found.high).all()
        assert (found.size_low < found.size).all() and (found.size < found.size_high).all()
        # the studentised interval is close to Student's for normal values
    t = stats.ttest_1samp(x, 0).confidence_interval()
    np.testing.assert_allclose(one.low, t.low, atol=0.08)
    np.testing.assert_allclose(one.high, t.high, atol=0.08)


def test_power_equals_a_simulation() -> None:
    rng = np.random.default_rng(0)
    n, tests, d = 24, 10, 0.9
    level = 1 - 0.95 ** (1 / tests)
    x = rng.normal(size=(n, 20_000)) + d
    found = (stats.ttest_1samp(x, 0).pvalue <= level).mean()
    assert power(d, n, tests) == pytest.approx(found, abs=0.015)
    y = rng.normal(size=(n, 20_000))
    found = (stats.ttest_ind(x, y).pvalue <= level).mean()
    assert power(d, n, tests, design="control") == pytest.approx(found, abs=0.015)


def test_the_calculator_inverts_power() -> None:
    for design in ("one-sample", "control"):
        n = prompts_needed(0.5, design=design)  # type: ignore[arg-type]
        assert power(0.5, n, design=design) >= 0.8 > power(0.5, n - 1, design=design)  # type: ignore[arg-type]
        d = smallest_effect(n, design=design)  # type: ignore[arg-type]
        assert power(d, n, design=design) == pytest.approx(0.8, abs=1e-6) and d <= 0.5  # type: ignore[arg-type]
    # with five prompts no sign-flip p-value is below 2/32
    assert power(50.0, 5) == 0 and smallest_effect(5) == float("inf") and power(50.0, 6, tests=1) > 0.99
    # 3 against 3: no division is rarer than 2 of 20
    assert power(50.0, 3, tests=1, design="control") == 0 and power(50.0, 4, tests=1, design="control") > 0.99
    with pytest.raises(UsageError, match="effect of 0"):
        prompts_needed(0)
    for wrong in ({"effect_size": "a"}, {"prompts": 64.5}, {"tests": float("nan")}, {"alpha": "a"}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} must be"):
            power(**{"effect_size": 0.5, "prompts": 64, **wrong})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="effect_size must be"):
        prompts_needed("x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="design"):
        power(0.5, 20, design="crossed")  # type: ignore[arg-type]


def test_correlated_modules_count_as_fewer() -> None:
    rng = np.random.default_rng(0)
    independent = effective_tests(frame(rng.normal(size=(60, 50))), permutations=4000)
    same = effective_tests(frame(np.repeat(rng.normal(size=(60, 1)), 50, axis=1)), permutations=4000)
    assert 35 < independent <= 50 and same < 1.5
    with pytest.raises(UsageError, match="never negative"):
        effective_tests(frame(rng.exponential(size=(20, 5)), "distance"))
    with pytest.raises(UsageError, match="alpha"):
        effective_tests(frame(rng.normal(size=(20, 5))), alpha=2)


def test_three_prompts_have_no_interval() -> None:
    found = one_sample_effects(np.array([[1.0], [2.0], [3.5]]))
    assert np.isnan(found.low).all() and np.isnan(found.size_high).all() and found.mean[0] == pytest.approx(6.5 / 3)
    # three ones among 64 zeros: one resample in twenty has no spread, and an endpoint would be infinite
    assert np.isnan(one_sample_effects(np.r_[np.ones(3), np.zeros(61)][:, None]).high).all()
