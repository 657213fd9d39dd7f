"""Write benchmarks/README.md and the benchmarks' figures from benchmarks/results/, and from nothing else.

    python benchmarks/report.py [--check] [--results FOLDER]

Of another folder, the page and the figures lie in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import performance
from matplotlib.figure import Figure
from tables import table

from mechtransplant.figures import calibration_plot, cost_plot, interval_coverage, power_plot, save_figure

HERE = Path(__file__).resolve().parent
RESULTS, FIGURES = HERE / "results", HERE.parent / "figures"


def percent(value: float, digits: int = 1) -> str:
    return "–" if pd.isna(value) else f"{100 * value:.{digits}f}"


def wide(rows: pd.DataFrame, index: list[str], value: str, digits: int = 1) -> str:
    """Rows of one number, a column for each number of prompts, in per cent."""
    grid = rows.pivot(index=index, columns="prompts", values=value)
    order = list(dict.fromkeys(rows[index].itertuples(index=False, name=None)))
    grid = grid.loc[order].map(lambda v: percent(v, digits)).reset_index()
    return table(grid)


def outside(rows: pd.DataFrame, both: bool) -> pd.DataFrame:
    """The cells outside their bounds; bounds that only say "at most" count from above."""
    return rows[(rows.value > rows.high) | (both & (rows.value < rows.low))]


def said(rows: pd.DataFrame, both: bool, promise: str) -> str:
    """How many cells keep a promise, and each that does not."""
    out = outside(rows, both)
    text = f"{len(rows) - len(out)} of {len(rows)} cells {promise}."
    if len(out):
        names = [
            f"{r.test}, {r.shape}, n = {r.prompts}, {r.correction}: {r.value:.4f} (bounds {r.low:.4f} – {r.high:.4f})"
            for r in out.rename(columns={"shape": "shape"}).itertuples()
        ]
        text += f" With 99 % bounds about {len(rows) * 0.01:.1f} fall outside by chance. Outside: {'; '.join(names)}."
    return text


def calibration() -> str:
    rates, covered = (pd.read_csv(RESULTS / f"calibration_{name}.csv") for name in ("rates", "coverage"))
    valid = rates[rates.valid]
    family, discovery = (valid[valid.rate == r] for r in ("family-wise error", "false-discovery rate"))
    exact = family[family.correction.isin(["max-t", "max-t-step-down"])]
    bound = family[family.correction == "holm"]
    uniform = valid[valid.rate == "uniform p (KS)"]
    broken = rates[(rates.rate == "family-wise error") & ~rates.valid & (rates.correction == "max-t")]
    sets = int(rates.sets.min())
    out = uniform[uniform.value < 0.01]
    order = ["mean", "difference", "size", "alignment", "gini", "effective_number", "top_k_share"]
    covered = covered.assign(at=covered.interval.map(order.index)).sort_values("at", kind="stable")
    small = "; ".join(f"{r.test}, {r.shape}, n = {r.prompts}: p = {r.value:.4f}" for r in out.itertuples())
    return f"""## Calibration: data sets in which nothing differs

`python benchmarks/calibration.py`: {sets:,} null data sets a cell, 60 correlated modules, n = 8 to 256 prompts, 999
permutations; gaussian, heavy-tailed (t with 3 degrees of freedom) and skewed (centred exponential) shifts.

![Family-wise error against the number of prompts, one panel a test](../figures/calibration.png)

*Family-wise error of max-T at 0.05. Grey: the 99 % binomial interval of {sets:,} data sets. Hollow: the test is not valid for
this shape.*

**Family-wise error at 0.05, max-T (single-step and step-down).** {said(exact, True, "lie in their 99 % binomial interval")}
Holm, which may only be below: {said(bound, False, "are not above it")}

Family-wise error of single-step max-T, in per cent:

{wide(exact[exact.correction == "max-t"], ["test", "shape"], "value")}

**False-discovery rate** with 12 of 60 modules shifted by one standard deviation, under positive dependence:
{said(discovery, False, "of BH and BY are at or below 0.05 within the error of the simulation")} Means in per cent:

{wide(discovery, ["test", "shape", "correction"], "value")}

**Uniform p-values** (Kolmogorov–Smirnov, p-values randomised within their steps): {len(uniform) - len(out)} of
{len(uniform)} cells have p ≥ 0.01, where {0.01 * len(uniform):.1f} below would be expected by chance{f" ({small})" if small else ""}.

**Known failure: the sign-flip under skewed shifts.** The mean is 0 and the test finds too much, because it tests symmetry.
The table's `note` says so where shifts are skewed, and names the alternative, `test="control"`, which holds (above).
Family-wise error of max-T, in per cent:

{wide(broken, ["test", "shape"], "value")}

**Coverage of the 95 % intervals**, in per cent ({sets:,} data sets a cell for the first three, {int(covered.sets.min()):,} for the others): the
mean and the difference between task and control prompts (studentised bootstrap), Cohen's d (`size`, bias-corrected
bootstrap), alignment and the three measures of concentration (jackknife). The intervals of d are too narrow below about
32 prompts:

{wide(covered, ["interval", "shape"], "coverage")}
"""


def coverage() -> str:
    rows = pd.read_csv(RESULTS / "coverage.csv")
    each = pd.read_csv(RESULTS / "coverage_settings.csv")
    about = json.loads((RESULTS / "coverage.json").read_text(encoding="utf-8"))
    sizes = about["sizes"]

    def grid(shown: pd.DataFrame, cell: Any) -> str:
        lines = []
        for (quantity, method), here in shown.groupby(["quantity", "method"], sort=False):
            cells = {r.n: cell(r) for r in here.itertuples()}
            name = f"**{method}**" if here.chosen.all() else method
            lines.append([quantity, name, *(cells.get(n, "–") for n in sizes)])
        return table(pd.DataFrame(lines, columns=["quantity", "method", *(f"n = {n}" for n in sizes)]))

    def width(r: Any) -> str:
        return f"{r.median_width:.0f}" if r.quantity == "Recovery" else f"{r.median_width:.3g}"

    order = ["difference", "gap", "TIR", "Recovery"]
    rows = rows.assign(at=rows.quantity.map(order.index)).sort_values("at", kind="stable")
    counted = each[(each.sets >= about["few"]) & (each.coverage < each.lowest)].sort_values("coverage")
    low = table(
        pd.DataFrame(
            {
                "quantity": counted.quantity,
                "n": counted.n,
                "target, %": [percent(v, 0) for v in counted.target],
                "source, %": [percent(v, 0) for v in counted.source],
                "after, %": [percent(v) for v in counted.after],
                "overlap": [f"{v:g}" for v in counted.overlap],
                "data sets": [f"{v:,}" for v in counted.sets],
                "coverage, %": [percent(v) for v in counted.coverage],
                "99 % band from, %": [percent(v) for v in counted.lowest],
            }
        )
    )
    total = int((each.sets >= about["few"]).sum())
    settings = len(about["targets"]) * len(about["sources"]) * len(about["recovered"]) * len(about["overlap"])
    tight = each[(each.quantity == "Recovery") & (each.reported < 0.995)]
    hidden = table(
        pd.DataFrame(
            [
                [
                    f"{percent(t, 0)} → {percent(s, 0)}, overlap {o:g}",
                    *(percent(1 - here[here.n == n].reported.mean(), 0) if n in set(here.n) else "0" for n in sizes),
                ]
                for (t, s, o), here in tight.groupby(["target", "source", "overlap"])
            ],
            columns=["target → source, %", *(f"n = {n}" for n in sizes)],
        )
    )
    return f"""## Coverage: intervals of paired accuracies

`python benchmarks/coverage.py`: {about["sets"]:,} simulated data sets for each of {settings} settings and n (target right on
{", ".join(percent(v, 0) for v in about["targets"])} % of the questions, source on {" or ".join(percent(v, 0) for v in about["sources"])} %, graft at {", ".join(f"{v:g}" for v in about["recovered"])} of the way; answers of the three that go
together little or much, correlation {" or ".join(f"{v:g}" for v in about["overlap"])}). Difference: after − target; gap: source − target. TIR counts
where the target has a right answer, Recovery where the method's own interval of the gap does not cover 0. Bold: what
the package uses. All its intervals come from one score test (`mechtransplant.significance.paired`), TIR's with a
continuity correction.

![Coverage against the number of questions: mean and lowest of the settings](../figures/coverage.png)

*Grey: the 99 % binomial interval of {about["sets"]:,} data sets. Blue: what the package uses.*

Coverage of 95 % intervals in per cent, mean of the settings / lowest setting (at least {about["few"]} data sets):

{grid(rows, lambda r: f"{percent(r.coverage)} / {percent(r.worst)}")}

Typical width (median data set of the median setting; Recovery in percentage points; inf: unbounded more often than not):

{grid(rows, width)}

**What stays below.** {total - len(counted)} of {total} cells of the chosen methods are in or above the 99 % binomial band of their setting;
by chance {0.005 * total:.0f} would be below. Counts are lumpy, which lets score intervals of differences dip a little under
their level here and there. Recovery is below where the gap is small and most data sets are withheld: those that remain
are the ones whose gap came out large. The cells below:

{low}

**Recovery withheld**, % of data sets (means over how far the graft goes; settings never withheld are left out):

{hidden}
"""


def real_null() -> str:
    rows = pd.read_csv(RESULTS / "real_null.csv")
    inside = int((rows.family_wise_error <= rows.high).sum())
    shown = rows.assign(
        error=[percent(v) for v in rows.family_wise_error],
        bounds=[f"{percent(a)} – {percent(b)}" for a, b in zip(rows.low, rows.high, strict=True)],
        small=[percent(v) for v in rows.share_of_small_p],
    )[["pair", "null", "measure", "modules", "n", "repeats", "error", "bounds", "small"]]
    shown.columns = [
        "pair", "null", "measure", "modules", "prompts", "repeats", "family-wise error, %", "99 % interval",
        "p ≤ 0.05, % of modules",
    ]  # fmt: skip
    deviation = ", ".join(f"{p}: {d:.1e}" for p, d in rows.groupby("pair", sort=False).swap_deviation.first().items())
    return f"""## Real models in which nothing differs

`python benchmarks/real_null.py`. *Labels swapped*: a coin decides for every prompt which model is called the source.
*One task in two*: the prompts of one task, divided at random into task and control. Exchanging the two models negates
every magnitude to within {deviation}. {inside} of {len(rows)} rows are not above the 99 % interval of 5 %.

{table(shown)}
"""


def power() -> str:
    rows = pd.read_csv(RESULTS / "power.csv")
    tested = rows[rows.test != "none"]
    shown = tested.assign(
        planted_found=[percent(v, 0) for v in tested.planted_found],
        found_planted=[percent(v, 0) for v in tested.found_planted],
        auroc=[f"{v:.2f}" for v in tested.auroc],
        share=[f"{p} of {m}" for p, m in zip(tested.planted, tested.modules, strict=True)],
    )
    grids = []
    for pair, here in shown.groupby("pair", sort=False):
        grid = pd.DataFrame({"measure, test": list(dict.fromkeys(here.measure + ", " + here.test))})
        for n, at in here.groupby("n"):
            keyed = at.set_index(at.measure + ", " + at.test).loc[grid["measure, test"]]
            grid[f"n = {n}: planted found / findings planted"] = [
                f"{a} / {b}" for a, b in zip(keyed.planted_found, keyed.found_planted, strict=True)
            ]
        share = here.share.iloc[0]
        grids.append(f"**{pair}** ({share} modules planted), in per cent:\n\n{table(grid)}")
    untested = rows[rows.test.isin(["none", "direction"])]
    order = untested.assign(value=[f"{v:.2f}" for v in untested.auroc]).pivot(
        index=["measure", "n"], columns="pair", values="value"
    )[list(dict.fromkeys(rows.pair))]
    order.columns = [c.removeprefix("family/planted-") for c in order.columns]
    newline = "\n\n"
    return f"""## Planted pairs: what is found, and is it planted?

`python benchmarks/power.py`: {int(rows.repeats.iloc[0])} draws of n task (and n control) questions for each pair; max-T at 0.05 over all
heads and MLPs. The pairs and how they were made: `models/family/planted-*/README.md`.

![Planted modules found and findings that are planted](../figures/power.png)

{newline.join(grids)}

**Ordering without a test.** Area under the ROC curve when modules are ordered by the mean of a measure (projection: by
its mean), 1 = every planted module before every other, 0.5 = chance:

{table(order.reset_index())}
"""


def speed() -> str:
    found = performance.lines()
    statistics = (RESULTS / "statistics_speed.md").read_text(encoding="utf-8").strip()
    measured = f"""
`python benchmarks/speed.py`, `sweeps.py`, `answers.py`, `texts.py`: smollm2/generations, float32, two threads of two
shared cores; what is compared is interleaved in one process, ratios are taken repeat by repeat. Batches of 8 prompts with
64 tokens; generation writes 32 answers to the pair's own questions in batches of 16, and 16 texts of unequal lengths.

{table(pd.DataFrame(found))}
"""
    parts = [
        measured.strip() if found else "",
        performance.verdicts(),
        performance.memory(),
        statistics,
        performance.cost(),
        performance.residence(),
        performance.peers(),
        performance.engines(),
        performance.kills(),
        performance.made(),
    ]
    return "## Speed and memory\n\n" + "\n\n".join(part for part in parts if part)


def grafting_speed() -> str:
    rows = pd.read_csv(RESULTS / "grafting_speed.csv")
    shown = pd.DataFrame(
        {
            "graft": rows.graft,
            "strength": [f"{s:g}" for s in rows.strength],
            "numbers": [f"{n:,}" for n in rows.numbers],
            "apply, ms": [f"{1000 * (c + a):.1f}" for c, a in zip(rows.check_seconds, rows.apply_seconds, strict=True)],
            "undo, ms": [f"{1000 * u:.1f}" for u in rows.undo_seconds],
            "both, of a forward": [
                f"{r.ratio:.3f} ({r.ratio_low:.3f} – {r.ratio_high:.3f})" for r in rows.itertuples()
            ],
            "replaced, MiB": [f"{r:.1f}" for r in rows.replaced_mib],
            "peak, MiB": [f"{p:.1f}" for p in rows.peak_mib],
            "held after undoing, MiB": [f"{max(left, 0):.1f}" for left in rows.left_mib],
        }
    )
    whole = rows.iloc[0]
    return f"""## Applying and undoing a graft

`python benchmarks/grafting_speed.py`: {whole.pair}, float32, two threads; beside every graft a plain forward of 8 × 64
tokens (median {whole.forward_seconds:.2f} s). Medians of {whole.repeats} rounds, ratios within a round with their range. The first graft of a
pair looks at every source weight once, for NaN and Inf (and reads it, if it is mapped from a file): {whole.first_seconds:.2f} s here.
Peak: how far a process of its own rises above the loaded models; the kernel counts pages in batches, so that it can
read a little low.

{table(shown)}
"""


def operators() -> str:
    rows = pd.read_csv(RESULTS / "operators.csv", keep_default_na=False, na_values=[""])
    about = json.loads((RESULTS / "operators.json").read_text(encoding="utf-8"))
    equal = pd.DataFrame(
        {
            "pair": rows.pair,
            "operator": rows.operator,
            "strength": [f"{s:g}" for s in rows.strength],
            "tensors equal to the bit": [f"{e} of {t}" for e, t in zip(rows.equal_tensors, rows.tensors, strict=True)],
            "numbers that differ": [f"{d:,} of {n:,}" for d, n in zip(rows.different, rows.numbers, strict=True)],
            "largest difference": ["–" if d == 0 else f"{d:.1e}" for d in rows.max_difference],
            "reason": rows.reason.fillna("–"),
        }
    )
    reasons = {
        r.reason: letter
        for letter, r in zip("abc", rows.dropna(subset="reason").drop_duplicates("reason").itertuples(), strict=False)
    }
    equal["reason"] = [reasons.get(r, r) for r in equal.reason]
    told = rows.dropna(subset="reason").groupby("reason", sort=False)[["different", "explained"]].sum()
    notes = "\n".join(
        f"* {reasons[reason]}: {reason} (checked number by number: {r.explained:,} of {r.different:,})."
        for reason, r in told.iterrows()
    )

    def both(one: str, digits: int) -> list[str]:
        pairs = zip(rows[f"mergekit_{one}"], rows[f"ours_{one}"], strict=True)
        return ["–" if pd.isna(a) else f"{a:.{digits}f} / {b:.{digits}f}" for a, b in pairs]

    cost = pd.DataFrame(
        {
            "pair": rows.pair,
            "operator": rows.operator,
            "strength": [f"{s:g}" for s in rows.strength],
            "from folder to folder, s": both("seconds", 1),
            "peak, MiB": both("peak_mib", 0),
            "in memory, s": both("memory_seconds", 3),
        }
    )
    versions = about["mergekit"]
    return f"""## Merge operators beside mergekit's

`python benchmarks/operators.py`: whole models, every linear layer, norm and embedding, {about["dtype"]}, {about["threads"]} thread; mergekit
{versions["mergekit"]} (torch {versions["torch"]}) by its command line, ours as a graft (torch {about["ours"]["torch"]}). DARE: the same seed for every tensor, given
to mergekit's function. The ancestor of smollm2/generations is {about["ancestors"]["smollm2/generations"]}; elsewhere changes are taken from the target.

{table(equal)}

{notes}

Cost, mergekit / ours: {about["repeats"]} runs of either, in turn, each in a process of its own; seconds of the best, the largest peak.
*From folder to folder*: start Python, load, merge, save. mergekit reads tensor by tensor; ours holds both models and the
bytes to be restored, and also compares the models and tokenizers and looks for NaN. *In memory*: the merge alone, of
models that are loaded (mergekit gives new tensors; ours writes in place, keeps what was there, and puts it back within
the time).

{table(cost)}
"""


def accuracy() -> str:
    rows = pd.read_csv(RESULTS / "operators_accuracy.csv")

    def cell(r: Any) -> str:
        return f"{percent(r.accuracy)} ({percent(r.low)} – {percent(r.high)})"

    parts = []
    for (pair, modules), here in rows.groupby(["pair", "modules"], sort=False):
        merged = here[here.strength.notna()]
        strengths = sorted(merged.strength.unique())
        lines = []
        for name, each in merged.groupby("operator", sort=False):
            cells = {r.strength: cell(r) for r in each.itertuples()}
            lines.append([name, f"{each.parameters.iloc[0]:,}", *(cells.get(s, "–") for s in strengths)])
        grid = pd.DataFrame(lines, columns=["operator", "numbers", *(f"strength {s:g}" for s in strengths)])
        ends = ", ".join(f"{r.operator} {cell(r)}" for r in here[here.strength.isna()].itertuples())
        parts.append(
            f"**{pair}**, {modules} linear layers, {here.n.iloc[0]} questions ({here.task.iloc[0]}); {ends}:\n\n{table(grid)}"
        )
    newline = "\n\n"
    return f"""## Operators at equal budget

`python benchmarks/operators.py --only-accuracy`: the linear layers whose weights differ most (rule `weight_delta`, ‖W_source − W_target‖),
merged by each operator with its default options; the last rows swap as many whole blocks, wherever they lie, as come
nearest in numbers. Accuracy on the test split in per cent, with the 95 % Wilson interval. Nothing was chosen by these
numbers, and no operator was tuned; without an ancestor, "linear" and "task_arithmetic" are the line of "replace".

{newline.join(parts)}
"""


def screens() -> str:
    rows = pd.read_csv(RESULTS / "screens.csv")
    grid = pd.DataFrame(
        {
            "pair": rows.pair,
            "modules": [f"{r.modules} ({r.kinds})" for r in rows.itertuples()],
            "rule": [f"`{r}`" for r in rows.rule],
            "Spearman with single_swap": [f"{v:.2f}" for v in rows.spearman],
            "top tenth shared": [f"{v:.0%}" for v in rows.top_tenth_shared],
            "seconds": [f"{v:.2f}" for v in rows.seconds],
            "single_swap, seconds": [f"{v:.1f}" for v in rows.single_swap_seconds],
            "times cheaper": [f"{v:.0f}" for v in rows.times_cheaper],
        }
    )
    return f"""## First-order screens against exact effects

`python benchmarks/screens.py`: how far the rules from gradients rank modules as the exact effect of grafting each alone
(`single_swap`) does, on {" or ".join(str(n) for n in dict.fromkeys(rows.questions))} questions, and what both cost in process
time on one thread. `activation_gradient` approximates another quantity, the effect of patches.

{table(grid)}
"""


def page() -> str:
    parts = [
        calibration(),
        coverage(),
        real_null(),
        power(),
        screens(),
        speed(),
        grafting_speed(),
        operators(),
        accuracy(),
    ]
    return (
        "# What was measured about the software itself\n\nWritten by `python benchmarks/report.py` from "
        "`benchmarks/results/`. What the words mean: [docs/statistics.md](../docs/statistics.md).\n\n"
        + "\n".join(parts)
    )


def pictures() -> dict[str, tuple[Figure, pd.DataFrame]]:
    """The benchmarks' figures, and their rows, by their names in figures/."""
    drawn: dict[str, Any] = {
        "calibration": (calibration_plot, "calibration_rates"),
        "coverage": (interval_coverage, "coverage"),
        "cost": (cost_plot, "cost"),
        "power": (power_plot, "power"),
    }
    rows = {name: pd.read_csv(RESULTS / f"{results}.csv") for name, (_, results) in drawn.items()}
    return {name: (draw(rows[name])[0], rows[name]) for name, (draw, _) in drawn.items()}


def digest(rows: pd.DataFrame) -> str:
    """What a benchmark's figure belongs to: its rows."""
    return hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()[:16]


def main() -> None:
    global RESULTS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is what the results say")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    ours = arguments.results.resolve() == RESULTS
    RESULTS = performance.RESULTS = arguments.results
    text, path, figures = page(), HERE / "README.md", FIGURES
    if not ours:
        path, figures = RESULTS / "README.md", RESULTS / "figures"
        text = text.replace("](../figures/", "](figures/").replace("`benchmarks/results/`", "this folder")
        text = re.sub(r"\[([^]]*)\]\(\.\./docs/[^)]*\)", r"\1", text)
    if arguments.check:
        same = path.exists() and path.read_text(encoding="utf-8") == text
        sys.exit(0 if same else f"{path.name} is not what the results say: python benchmarks/report.py")
    path.write_text(text, encoding="utf-8")
    for name, (figure, rows) in pictures().items():
        save_figure(figure, figures, name, rows, run=f"of {name}.csv {digest(rows)}")
    print(text)
    print(f"Written to {path}, figures to {figures}")


if __name__ == "__main__":
    main()
