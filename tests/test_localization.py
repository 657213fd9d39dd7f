"""Consistency, concentration and stability: known answers, nulls that hold, and agreement with definitions."""

from __future__ import annotations

import numpy as np
import pytest
from frames import frame
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtransplant.errors import UsageError
from mechtransplant.localization import (
    concentration,
    consistency,
    effective_number,
    flipped_alignments,
    gini,
    lorenz_curve,
    shares,
    top_share,
    topk_stability,
)
from mechtransplant.pair import Pair
from mechtransplant.shifts import measure_shifts, shift_vectors
from mechtransplant.tasks import load_task

# --- indices --------------------------------------------------------------------------------------------------------


def test_indices_of_known_distributions() -> None:
    even, one, half = np.full(10, 0.1), np.eye(10)[0], np.r_[[0.5, 0.5], np.zeros(8)]
    np.testing.assert_allclose(gini(np.stack([even, one, half])), [0, 0.9, 0.8], atol=1e-12)
    np.testing.assert_allclose(effective_number(np.stack([even, one, half])), [10, 1, 2])
    np.testing.assert_allclose(top_share(np.stack([even, one, half]), 2), [0.2, 1, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=40).filter(lambda v: sum(v) > 1e-3))
def test_indices_equal_their_definitions(values: list[float]) -> None:
    x = np.array(values) / sum(values)
    m = len(x)
    assert gini(x) == pytest.approx(np.abs(x[:, None] - x[None, :]).sum() / (2 * m), abs=1e-9)
    entropy = -sum(v * np.log(v) for v in x if v > 0)
    assert effective_number(x) == pytest.approx(np.exp(entropy))
    assert top_share(x, 1) == pytest.approx(x.max())
    assert 1 - 1e-9 <= effective_number(x) <= m + 1e-9


def test_shares_are_of_each_prompts_whole_shift() -> None:
    found, modules = shares(frame(np.array([[1.0, -3.0], [2.0, 2.0], [0.0, 0.0]])))
    np.testing.assert_allclose(found, [[0.25, 0.75], [0.5, 0.5]])
    assert modules == ["L0.mlp", "L1.mlp"]
    with pytest.raises(UsageError, match="nothing to localise"):
        shares(frame(np.zeros((3, 2))))


def test_concentration_tells_agreement_from_chance() -> None:
    rng = np.random.default_rng(0)
    # every prompt puts most of its shift into one module: the same one, or any
    same, any_one = np.full((40, 20), 0.01), np.full((40, 20), 0.01)
    same[:, 3] = 1
    any_one[np.arange(40), rng.integers(0, 20, 40)] = 1
    found, chance = (concentration(frame(v), k=1).set_index("statistic") for v in (same, any_one))
    assert (found.p == 0.001).all() and found.value["top_k_share"] > 0.8 and found.value["effective_number"] < 3
    assert (chance.p > 0.01).all() and (found.low <= found.corrected).all() and (found.corrected <= found.high).all()
    for table in (found, chance):
        assert (table.null_low <= table.null).all() and (table.null <= table.null_high).all()
    with pytest.raises(UsageError, match="k must be a whole number of at least 1 and at most 20"):
        concentration(frame(same), k=21)


def test_concentrations_p_is_uniform_under_its_null() -> None:
    rng = np.random.default_rng(0)
    p = [
        concentration(frame(rng.exponential(size=(10, 12))), k=3, permutations=99, seed=i).p.iloc[0] for i in range(300)
    ]
    from scipy.stats import kstest

    assert kstest(np.array(p) - rng.random(300) / 100, "uniform").pvalue > 0.001


def test_lorenz_curve_rises_to_the_whole(generations: Pair) -> None:
    shifts = measure_shifts(generations, load_task("addition", 12), measures="own")
    curve = lorenz_curve(shifts, permutations=99)
    assert list(curve["rank"]) == list(range(1, 37)) and curve.share.is_monotonic_decreasing
    assert curve.cumulative.iloc[-1] == pytest.approx(1) and curve.null.iloc[-1] == pytest.approx(1)
    assert (curve.null_low <= curve.null_high).all()


# --- consistent -----------------------------------------------------------------------------------------------------


def test_sign_share() -> None:
    values = np.r_[np.ones(18), -np.ones(2)][:, None] * np.array([[1.0, 0.0]])
    found = consistency(frame(values)).set_index("module")
    assert found.sign_share["L0.mlp"] == 0.9 and found.sign_low["L0.mlp"] < 0.9 < found.sign_high["L0.mlp"]
    assert found.sign_p["L0.mlp"] == pytest.approx(2 * 211 / 2**20)
    assert 0.5 < found.sign_null["L0.mlp"] < 0.65
    assert np.isnan(found.sign_share["L1.mlp"]) and found.sign_p["L1.mlp"] == 1
    with pytest.raises(UsageError, match="never negative"):
        consistency(frame(np.abs(values), "own"), measure="own")


def test_flipped_alignments_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 5)) + 1
    found = flipped_alignments(vectors @ vectors.T, 20, np.random.default_rng(3))
    signs = 1.0 - 2.0 * np.random.default_rng(3).integers(0, 2, (7, 20))
    for at in range(20):
        flipped = vectors * signs[:, at : at + 1]
        cosines = []
        for i in range(7):
            others = np.delete(flipped, i, 0).mean(0)
            cosines.append(flipped[i] @ others / np.linalg.norm(flipped[i]) / np.linalg.norm(others))
        assert found[at] == pytest.approx(np.mean(cosines))


class FakeVectors:
    """Vectors held in memory, as ``ShiftVectors`` shows them."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors, self.modules = vectors, list(vectors)

    def gram(self, module: str) -> np.ndarray:
        return self.vectors[module] @ self.vectors[module].T

    def alignment(self, module: str) -> np.ndarray:
        v = self.vectors[module]
        others = v.sum(0) - v
        return (v * others).sum(1) / np.linalg.norm(v, axis=1) / np.linalg.norm(others, axis=1)


def test_alignment_has_a_null_that_holds() -> None:
    """Vectors that point anywhere: the p-values of many modules are uniform; vectors with a direction: all small."""
    from scipy.stats import kstest

    rng = np.random.default_rng(0)
    random = {f"L{i}.mlp": rng.normal(size=(16, 6)) for i in range(200)}
    values = frame(rng.normal(size=(16, 200)))
    found = consistency(values, FakeVectors(random), flips=199)
    assert kstest(found.alignment_p - rng.random(200) / 200, "uniform").pvalue > 0.001
    assert abs(found.alignment.mean() - found.alignment_null.mean()) < 0.02
    directed = {name: v + 1 for name, v in random.items()}
    assert (consistency(values, FakeVectors(directed), flips=199).alignment_p < 0.02).mean() > 0.95


def test_consistency_of_a_real_pair(generations: Pair) -> None:
    task = load_task("addition", 24)
    shifts = measure_shifts(generations, task, measures=("magnitude", "alignment"), positions="answer")
    vectors = shift_vectors(generations, task, positions="answer")
    found = consistency(shifts, vectors, flips=199)
    means = shifts[shifts.measure == "alignment"].groupby("module").value.mean()
    np.testing.assert_allclose(found.alignment, means[found.module])
    assert (found.alignment_low <= found.alignment).all() and (found.alignment <= found.alignment_high).all()
    with pytest.raises(UsageError, match="measure the same task"):
        consistency(measure_shifts(generations, task.subset(range(20))), vectors)
    with pytest.raises(UsageError, match="same kinds"):
        consistency(measure_shifts(generations, task, "linear"), vectors)


# --- stable ---------------------------------------------------------------------------------------------------------


def test_stability_of_a_clear_and_of_no_order() -> None:
    rng = np.random.default_rng(0)
    clear = np.abs(rng.normal(size=(30, 20)) * 0.1 + np.r_[np.ones(5), np.zeros(15)])
    found = topk_stability(frame(clear), k=5)
    assert found.jaccard == 1 and (found.frequency.frequency[:5] == 1).all()
    assert set(found.frequency.module[:5]) == {f"L{i}.mlp" for i in range(5)}
    unclear = topk_stability(frame(rng.exponential(size=(30, 20))), k=5)
    assert unclear.jaccard == pytest.approx(unclear.null, abs=0.12)
    assert "chance" in str(found)
    with pytest.raises(UsageError, match="k must be a whole number of at least 1 and at most 20"):
        topk_stability(frame(clear), k=0)
    with pytest.raises(UsageError, match="four prompts"):
        topk_stability(frame(clear[:3]), k=2)


def test_modules_that_never_shift_are_not_stable() -> None:
    """Of 50 modules only 2 shift: ties among the others must not look like stability."""
    rng = np.random.default_rng(0)
    few = np.zeros((20, 50))
    few[:, :2] = 1 + rng.random((20, 2))
    with pytest.raises(UsageError, match="only 2 of 50 modules shift"):
        topk_stability(frame(few), k=8)
    few[0, 2:] = 1e-9
    found = topk_stability(frame(few), k=8)
    assert (found.frequency.frequency >= 0.95).sum() == 2 and found.jaccard < 0.5


def test_intervals_cover_what_they_estimate() -> None:
    """Alignment and concentration, by the jackknife: naive bootstrap intervals covered 80 % and 10 %."""
    rng = np.random.default_rng(0)
    sizes = rng.gamma(1.0, size=30)
    many = sizes * rng.gamma(4, 0.25, size=(100_000, 30))
    mean_share = (many / many.sum(1, keepdims=True)).mean(0)
    truth = {"gini": float(gini(mean_share)), "effective_number": float(effective_number(mean_share))}
    drawn = [rng.normal(size=(24, 16)) + 0.3 for _ in range(200)]
    aligned = [consistency(frame(v[:, :1]), FakeVectors({"L0.mlp": v}), flips=1).iloc[0] for v in drawn]
    mean = np.mean([row.alignment for row in aligned])
    assert np.mean([row.alignment_low <= mean <= row.alignment_high for row in aligned]) > 0.9
    inside = {name: 0 for name in truth}
    for seed in range(100):
        values = sizes * rng.gamma(4, 0.25, size=(40, 30))
        table = concentration(frame(values), k=3, permutations=1, seed=seed).set_index("statistic")
        for name, value in truth.items():
            inside[name] += bool(table.low[name] <= value <= table.high[name])
    assert min(inside.values()) >= 88


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"seed": 1.5}, {"level": 95}, {"level": "0.95"}, {"permutations": 0}, {"k": 2.0}, {"k": "2"}],
)
def test_wrong_numbers(change: dict[str, object]) -> None:
    values = frame(np.random.default_rng(0).exponential(size=(8, 5)))
    with pytest.raises(UsageError, match=f"{next(iter(change))} must be"):
        concentration(values, **{"k": 2, **change})  # type: ignore[arg-type]


def test_overlapping_kinds_would_count_a_shift_twice(generations: Pair) -> None:
    shifts = measure_shifts(generations, load_task("addition", 8), ("head", "attn", "mlp"), "own")
    for function in (concentration, lorenz_curve, topk_stability):
        with pytest.raises(UsageError, match="count twice"):
            function(shifts)
    assert len(concentration(shifts[shifts.kind != "head"], k=2)) == 3


def test_signs_of_what_has_none() -> None:
    rng = np.random.default_rng(0)
    for measure in ("alignment", "my-norm"):
        with pytest.raises(UsageError):
            consistency(frame(rng.exponential(size=(8, 3)), measure), measure=measure)
    # a prompt without a shift has no sign, and still is a prompt
    one = np.zeros((64, 1))
    one[0] = 1
    found = consistency(frame(one)).iloc[0]
    assert found.sign_share == 1 / 64 and found.sign_p == 1


def test_chance_overlap_equals_a_simulation() -> None:
    rng = np.random.default_rng(0)
    null = topk_stability(frame(rng.exponential(size=(8, 12))), k=4, resamples=10).null
    overlaps = []
    for _ in range(4000):
        one, other = (set(rng.choice(12, 4, replace=False)) for _ in range(2))
        overlaps.append(len(one & other) / len(one | other))
    assert null == pytest.approx(np.mean(overlaps), abs=0.01)
