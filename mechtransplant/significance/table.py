"""A frame of shifts becomes a table of tests: one row a module, its effect, interval, p-value and adjusted p-value.

A shift frame has columns ``module, prompt, measure, value`` (and any others): one row a module, prompt and measure.
The unit of analysis is the prompt.
"""

from __future__ import annotations

import warnings
from math import comb
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UnknownNameError, UsageError, check_count, check_level, check_seed
from mechtransplant.selection import remember
from mechtransplant.significance.corrections import CORRECTIONS, adjust
from mechtransplant.significance.effects import Effects, one_sample_effects, two_sample_effects
from mechtransplant.significance.permutation import Permuted, label_permutation, sign_flip

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Test = Literal["auto", "sign-flip", "direction", "wilcoxon", "t", "control", "matched"]
#: name → what it tests and what it assumes
TESTS: dict[str, str] = {
    "sign-flip": "signed values are symmetric about 0 (permutation of signs; assumes symmetry, not normality)",
    "direction": "projections on a direction that other prompts fixed are symmetric about 0 (permutation of signs)",
    "wilcoxon": "signed values are symmetric about 0 (Wilcoxon's signed ranks)",
    "t": "signed values have mean 0 (Student's t; assumes normality, or many prompts)",
    "control": "task and control prompts have one distribution (permutation of labels; any measure)",
    "matched": "task and control prompts of a pair are exchangeable (labels permuted within pairs; any measure)",
}
#: measures that are centred at 0 under the null hypothesis
SIGNED = ("magnitude", "projection")
#: measures that are never negative: only a comparison with control prompts can test them
NORMS = ("distance", "own", "inherited", "lae", "lae_relative")
#: a module's skewness above this many standard errors is said in its row of the table
SKEWED = 3.5
#: and in every row where the root mean square over modules is above this: what few prompts show of one module, many
#: modules show together
SKEWED_AS_A_WHOLE = 1.35


def test_shifts(
    shifts: pd.DataFrame,
    control: pd.DataFrame | None = None,
    measure: str | None = None,
    test: Test = "auto",
    correction: str = "max-t",
    permutations: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Test every module's shift, all modules and measures of the frame in one family.

    Args:
        shifts: columns module, prompt, measure, value; one row a module, prompt and measure, NaN where one is missing.
        control: the same for control prompts. Without it, only signed measures can be tested.
        measure: which measure; by default every one in the frame that the test is valid for.
        test: a name in ``TESTS``; "auto" is "control" where control prompts are given, "direction" for projections,
            else "sign-flip". "matched" pairs the task's prompt with the control's of the same number.
        correction: "max-t" (Westfall and Young's single step), "max-t-step-down", "holm", "bonferroni", "bh", "by" or
            "none". max-T needs a permutation test.
        permutations: random ones, or all where there are no more than that.
        level: of the intervals.

    Returns:
        columns module, measure, n (prompts; the smaller group's where there are two), effect (mean, or difference of
        means, in the measure's units), low, high (its studentised bootstrap interval), statistic (a t statistic;
        signed ranks for "wilcoxon"), p, p_adjusted, test, effect_size (Cohen's d), size_low, size_high, permutations
        (0 where none were made) and note (what to beware of, and which test to use instead).

    Raises:
        UsageError: a test that is invalid for the measure (a sign-flip of a norm), frames that do not fit together,
            duplicate rows, fewer than two prompts.
    """
    _check_names(test, correction, permutations, level, seed)
    measured = [frame for frame in (shifts, control) if frame is not None]
    shifts = _chosen(shifts, measure, "shifts")
    kind = _resolve(shifts, control, test)
    if kind == "direction":
        shifts = shifts[shifts.measure == "projection"]
    elif control is None and measure is None:
        shifts = shifts[shifts.measure.isin(_signed(shifts))]
    if control is not None:
        control = _chosen(control, measure, "control")
        shifts, control = _common(shifts, control)
    else:
        refuse_norms(shifts, kind)
    values, columns = _matrix(shifts)
    others = None if control is None else _matrix(control, columns)[0]
    if kind == "matched":
        assert control is not None
        values, others = _matched(shifts, control, columns), None
    _check_counts(values, others, columns)
    found = _run(kind, values, others, permutations, seed)
    p_adjusted = _adjusted(found, correction, kind)
    effects = (
        one_sample_effects(values, level, seed=seed)
        if others is None
        else two_sample_effects(values, others, level, seed=seed)
    )
    return remember(_table(columns, kind, values, others, found, p_adjusted, effects), *measured)


# a user's test file that imports it has no test of this name
test_shifts.__test__ = False  # type: ignore[attr-defined]


def _check_names(test: str, correction: str, permutations: int, level: float, seed: int) -> None:
    if test not in get_args(Test):
        raise UnknownNameError("test", test, get_args(Test))
    if correction not in CORRECTIONS:
        raise UnknownNameError("correction", correction, CORRECTIONS)
    if correction.startswith("max-t") and test in ("t", "wilcoxon"):
        raise UsageError(
            f"{correction} needs the permutations of all modules, and {test} makes none: use correction='holm', 'by' "
            "or 'bh', or test='sign-flip'"
        )
    check_count("permutations", permutations, least=99)
    check_seed(seed)
    check_level(level)


def _chosen(frame: pd.DataFrame, measure: str | None, what: str) -> pd.DataFrame:
    """The rows of the measure that was asked for; raises UsageError for a frame of another form."""
    lacking = [c for c in ("module", "prompt", "measure", "value") if c not in getattr(frame, "columns", [])]
    if lacking:
        raise UsageError(f"{what} lacks the columns {', '.join(lacking)}: pass a frame from measure_shifts")
    if measure is not None:
        known = list(dict.fromkeys(frame.measure))
        if measure not in known:
            raise UnknownNameError(f"measure of {what}", measure, known)
        frame = frame[frame.measure == measure]
    if frame.empty:
        raise UsageError(f"{what} has no rows: pass a frame from measure_shifts")
    unnamed = [c for c in ("module", "prompt", "measure") if frame[c].isna().any()]
    if unnamed:
        raise UsageError(f"{what} has rows without {' and '.join(unnamed)}: remove them, or say what they belong to")
    return frame


def _resolve(shifts: pd.DataFrame, control: pd.DataFrame | None, test: str) -> str:
    """The test that "auto" stands for; raises UsageError where control prompts and test do not go together."""
    if test == "auto":
        if control is not None:
            return "control"
        return "direction" if set(shifts.measure) == {"projection"} else "sign-flip"
    if test in ("control", "matched") and control is None:
        raise UsageError(f"test={test!r} compares with control prompts: pass control=measure_shifts(pair, other_task)")
    if test not in ("control", "matched") and control is not None:
        raise UsageError(f"test={test!r} takes no control prompts: use test='control' or 'matched', or leave them out")
    if test == "direction" and "projection" not in set(shifts.measure):
        raise UsageError("test='direction' needs the measure 'projection': measure_shifts(…, measures=['projection'])")
    return test


def _signed(frame: pd.DataFrame) -> list[str]:
    """The measures that are signed: known to be, or unknown ones with values below 0."""
    found = []
    for name, group in frame.groupby("measure", sort=False, observed=True):
        unknown = name not in (*SIGNED, *NORMS, "alignment")
        if name in SIGNED or (unknown and bool((group.value < 0).any())):
            found.append(str(name))
    if not found:
        refuse_norms(frame, "sign-flip")
    return found


def refuse_norms(frame: pd.DataFrame, test: str) -> None:
    """Raise UsageError where a test of "centred at 0" is asked of values that cannot be."""
    for name, group in frame.groupby("measure", sort=False, observed=True):
        if name == "alignment":
            raise UsageError(
                "alignment of one prompt depends on all others, so its signs cannot be flipped: test "
                "measure='projection' instead, or read alignment with its null from localization.consistency"
            )
        if name in NORMS or (name not in SIGNED and not bool((group.value < 0).any())):
            raise UsageError(
                f"{test} of {name!r} is invalid: it is never negative, so it cannot be centred at 0; compare with "
                "control prompts (control=measure_shifts(pair, other_task)), or test measure='magnitude', 'projection'"
            )


def _common(shifts: pd.DataFrame, control: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the measures that both frames have; raises UsageError where their modules differ."""
    both = set(shifts.measure) & set(control.measure)
    # of one prompt, both depend on the other prompts of their own group
    both -= {"alignment", "projection"}
    if not both and {"alignment", "projection"} & set(shifts.measure):
        raise UsageError(
            "alignment and projection depend on the other prompts of their own group, so groups cannot be compared by "
            "them: measure magnitude, distance, own or inherited in both"
        )
    if not both:
        raise UsageError(
            f"shifts have {', '.join(dict.fromkeys(shifts.measure))} and control has "
            f"{', '.join(dict.fromkeys(control.measure))}: measure the same in both (alignment and projection cannot "
            "be compared between groups)"
        )
    shifts, control = shifts[shifts.measure.isin(both)], control[control.measure.isin(both)]
    differ = set(zip(shifts.module, shifts.measure, strict=True)) ^ set(
        zip(control.module, control.measure, strict=True)
    )
    if differ:
        raise UsageError(
            f"shifts and control differ in {len(differ)} modules (first {sorted(differ)[0][0]}): measure the same kinds"
        )
    return shifts, control


def _matrix(frame: pd.DataFrame, columns: list[tuple[str, str]] | None = None) -> tuple[Floats, list[tuple[str, str]]]:
    """(values of shape (prompts, columns), the (measure, module) of each column, in the frame's order)."""
    import pandas as pd

    pairs = pd.MultiIndex.from_arrays([frame.measure.astype(str), frame.module.astype(str)])
    if columns is None:
        columns = cast("list[tuple[str, str]]", list(pairs.unique()))
    column = pd.MultiIndex.from_tuples(columns).get_indexer(pairs)
    prompts, _ = pd.factorize(frame.prompt, sort=True)
    flat = prompts * len(columns) + column
    if len(np.unique(flat)) < len(flat):
        repeated = frame[pd.Series(flat, index=frame.index).duplicated()].iloc[0]
        raise UsageError(
            f"module {repeated.module} has several values of {repeated.measure} for prompt {repeated.prompt}: the "
            "prompt is the unit, so give one value each (average over positions or seeds first)"
        )
    values = np.full((int(prompts.max()) + 1, len(columns)), np.nan)
    try:
        values.reshape(-1)[flat] = frame.value.to_numpy(dtype=float, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the shifts' values must be numbers ({error}): convert the column first") from error
    if np.isinf(values).any():
        raise UsageError("the shifts hold infinite values: a model's activations overflowed; use dtype float32")
    return values, columns


def one_measure(frame: pd.DataFrame, measure: str | None = None) -> pd.DataFrame:
    """The rows of one measure; raises UsageError where a frame has several and none is named."""
    frame = _chosen(frame, measure, "shifts")
    known = list(dict.fromkeys(frame.measure))
    if len(known) > 1:
        raise UsageError(f"the frame has the measures {', '.join(map(str, known))}: say measure=…")
    return frame


def shift_matrix(frame: pd.DataFrame) -> tuple[Floats, list[str]]:
    """One measure's values of shape (prompts, modules), NaN where one is missing, and the modules in their order.

    Raises UsageError for a frame of several measures or with several values of one module and prompt.
    """
    values, columns = _matrix(one_measure(frame))
    return values, [module for _, module in columns]


def _matched(shifts: pd.DataFrame, control: pd.DataFrame, columns: list[tuple[str, str]]) -> Floats:
    """Task minus control of the prompts of one number; raises UsageError where the numbers differ."""
    if set(shifts.prompt) != set(control.prompt):
        raise UsageError(
            f"test='matched' pairs prompts by number: the task has {shifts.prompt.nunique()} and the control "
            f"{control.prompt.nunique()} prompts, or other numbers; use test='control' for unmatched prompts"
        )
    return _matrix(shifts, columns)[0] - _matrix(control, columns)[0]


def _check_counts(values: Floats, others: Floats | None, columns: list[tuple[str, str]]) -> None:
    for group in (values,) if others is None else (values, others):
        few = np.isfinite(group).sum(0) < 2
        if few.any():
            raise UsageError(
                f"{columns[int(np.argmax(few))][1]} has fewer than two prompts: a test needs at least two, and six "
                "(or four in each of two groups) to reach p < 0.05"
            )


def _run(kind: str, values: Floats, others: Floats | None, permutations: int, seed: int) -> Permuted:
    """The test of every column; tests without permutations give NaN where those would be."""
    if kind == "control":
        assert others is not None
        return label_permutation(values, others, permutations, seed)
    if kind in ("sign-flip", "direction", "matched"):
        return sign_flip(values, permutations, seed)
    from scipy import stats

    function: Any = stats.ttest_1samp if kind == "t" else stats.wilcoxon
    arguments = (0.0,) if kind == "t" else ()
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # a module whose values are all 0 has no ranks and no spread; what it gets is set below
        warnings.simplefilter("ignore")
        result = function(values, *arguments, axis=0, nan_policy="omit")
    still = np.nansum(np.abs(values), axis=0) == 0
    p = np.where(still, 1.0, np.asarray(result.pvalue, dtype=float))
    statistic = np.where(still, 0.0, np.asarray(result.statistic, dtype=float))
    none = np.full(len(p), np.nan)
    return Permuted(statistic, p, none, none, 0, True)


def _adjusted(found: Permuted, correction: str, kind: str) -> Floats:
    if correction == "max-t":
        return found.p_max
    if correction == "max-t-step-down":
        return found.p_step_down
    smallest = len(found.p) / (found.permutations + 1)
    if correction in ("holm", "bonferroni") and not found.exact and smallest > 0.05:
        warnings.warn(
            f"{correction} over {len(found.p)} tests cannot go below {smallest:.2g} with {found.permutations:,} "
            "permutations: ask for more, or use correction='max-t'",
            stacklevel=3,
        )
    return adjust(found.p, correction)


def _table(
    columns: list[tuple[str, str]],
    kind: str,
    values: Floats,
    others: Floats | None,
    found: Permuted,
    p_adjusted: Floats,
    effects: Effects,
) -> pd.DataFrame:
    import pandas as pd

    n = np.isfinite(values).sum(0)
    if others is not None:
        n = np.minimum(n, np.isfinite(others).sum(0))
    frame = pd.DataFrame(
        {
            "module": [module for _, module in columns],
            "measure": [measure for measure, _ in columns],
            "n": n,
            "effect": effects.mean,
            "low": effects.low,
            "high": effects.high,
            "statistic": found.statistic,
            "p": found.p,
            "p_adjusted": p_adjusted,
            # a projection's signs are flipped like any others, but its direction came from other prompts
            "test": ["direction" if kind == "sign-flip" and m == "projection" else kind for m, _ in columns],
            "effect_size": effects.size,
            "size_low": effects.size_low,
            "size_high": effects.size_high,
            "permutations": found.permutations,
            "note": _notes(kind, values, others, [measure for measure, _ in columns]),
        }
    )
    return frame


def smallest_p(kind: str, n: int, other: int = 0) -> float:
    """The smallest two-sided p-value that a permutation test of this many prompts can reach, were all enumerated."""
    if kind == "control":
        return float((2 if n == other else 1) / comb(n + other, n))
    return float(2.0 ** (1 - n))


def _notes(kind: str, values: Floats, others: Floats | None, measures: list[str]) -> list[str]:
    """What a reader of a row must know: too few prompts, or shifts that break the test's assumption."""
    n = np.isfinite(values).sum(0)
    m = n if others is None else np.isfinite(others).sum(0)
    z = _skewness_z(values, n) if kind in ("sign-flip", "direction", "wilcoxon", "t") else np.zeros(len(n))
    broken = "assumes a normal mean" if kind == "t" else "assumes symmetry"
    # control prompts answer another question, whether the shift is specific to the task, and hold under any shape
    advice = f"and this test {broken}: read the interval low–high, or compare with control prompts (test='control')"
    whole = {name: float(np.sqrt(np.mean(z[[x == name for x in measures]] ** 2))) for name in set(measures)}
    notes = []
    for at, name in enumerate(measures):
        parts = []
        if kind != "t":
            floor = smallest_p(kind, int(n[at]), int(m[at]))
            if floor > 0.05:
                parts.append(f"with so few prompts no p-value is below {floor:.2g}")
        if abs(z[at]) > SKEWED:
            parts.append(f"skewed ({z[at]:+.1f} standard errors), {advice}")
        elif whole[name] > SKEWED_AS_A_WHOLE:
            parts.append(f"the modules are skewed as a whole ({whole[name]:.1f} standard errors), {advice}")
        notes.append("; ".join(parts))
    return notes


def _skewness_z(values: Floats, n: NDArray[np.int64]) -> Floats:
    """Sample skewness of every column over its standard error for normal values; 0 where there is no spread."""
    from scipy.stats import skew

    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # of equal values: no skewness
        warnings.simplefilter("ignore")
        skewness = np.nan_to_num(np.asarray(skew(values, axis=0, nan_policy="omit"), dtype=float))
        error = np.sqrt(6 * (n - 2) / ((n + 1) * (n + 3)))
        return np.nan_to_num(skewness / error, nan=0.0, posinf=0.0, neginf=0.0)
