"""A smaller version of benchmarks/calibration.py: error rates hold where promised, and fail where it is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import calibration

SETS = 300


@pytest.mark.parametrize(
    ("test", "shape", "prompts"),
    [
        ("sign-flip", "gaussian", 8),
        ("sign-flip", "heavy", 32),
        ("control", "skewed", 8),
        ("control", "heavy", 32),
        ("matched", "skewed", 16),
        ("direction", "heavy", 32),
    ],
)
def test_error_rates(test: str, shape: str, prompts: int) -> None:
    rows = pd.DataFrame(calibration.error_rates(test, shape, prompts, SETS))
    family = rows[rows.rate == "family-wise error"].set_index("correction").value
    # 99.99 % binomial intervals: six cells, and a false alarm in thousands of runs
    low, high = stats.binom.ppf([0.00005, 0.99995], SETS, 0.05) / SETS
    assert low <= family["max-t"] <= high and low <= family["max-t-step-down"] <= high
    assert max(family["holm"], family["bh"], family["by"]) <= high
    discovery = rows[rows.rate == "false-discovery rate"].set_index("correction").value
    assert discovery["bh"] <= 0.07 and discovery["by"] <= 0.05
    assert float(rows[rows.rate == "uniform p (KS)"].value.iloc[0]) > 1e-4


def test_the_known_failure_is_there() -> None:
    rows = pd.DataFrame(calibration.error_rates("sign-flip", "skewed", 16, SETS))
    family = rows[rows.rate == "family-wise error"].set_index("correction").value
    assert family["max-t"] > stats.binom.ppf(0.99995, SETS, 0.05) / SETS


@pytest.mark.parametrize("shape", ["gaussian", "skewed"])
def test_coverage_of_intervals(shape: str) -> None:
    covered = pd.DataFrame(calibration.coverage(shape, 32, 1000)).set_index("interval").coverage
    assert (covered > 0.9).all() and (covered < 0.985).all()
