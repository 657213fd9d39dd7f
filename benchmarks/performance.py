"""The part of the benchmarks' page about speed and memory: what was measured, against what, and what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from tables import MADE, table

RESULTS = Path(__file__).resolve().parent / "results"


def read(name: str) -> pd.DataFrame | None:
    """A table of results, None where it was not measured."""
    path = RESULTS / f"{name}.csv"
    return pd.read_csv(path) if path.exists() else None


def ratios(rows: pd.DataFrame, over: str, under: str, value: str = "seconds") -> pd.Series:
    """One row's value over another's, repeat by repeat."""
    wide = rows.pivot(index="repeat", columns="what", values=value)
    return (wide[over] / wide[under]).dropna()


def line(what: str, against: str, ratio: pd.Series, asked: str, more: str = "") -> dict[str, str]:
    """A row of the table: the median of the repeats' ratios, with their range."""
    value = f"**{ratio.median():.2f} ×** ({ratio.min():.2f} – {ratio.max():.2f})"
    return {"what": what, "against": against, "asked": asked, "median (range)": value, "n": str(len(ratio)), "": more}


def lines() -> list[dict[str, str]]:
    """All rows that were measured."""
    found = []
    shifts = read("shifts_speed")
    if shifts is not None:
        for name, times in (("magnitude and distance", "two"), ("magnitude, distance and own", "three")):
            for which, more in (("", "logits at all positions"), (", no logits", "the last position's logits alone")):
                against = f"{times} plain Hugging Face forwards"
                ratio = ratios(shifts, name, f"{times} forwards{which}")
                asked = "≤ 1.10 ×" if not which else "–"
                found.append(line(f"shifts of all heads and MLPs: {name}", against, ratio, asked, more))
    sweeps = read("sweeps")
    if sweeps is not None:
        worst = sweeps.groupby("what").largest_difference.max()
        for kind, what, asked in (
            ("grafts", "weights moved, all positions", "≥ 2.3 ×"),
            ("patches at the answer", "activations patched at the answer", "≥ 10 ×"),
        ):
            ratio = ratios(sweeps, f"{kind}, TransformerLens", f"{kind}, sweep")
            more = f"largest difference of a log-probability {worst[f'{kind}, sweep']:.0e}"
            modules = int(sweeps.modules.iloc[0])
            found.append(
                line(f"exact effects of {modules}: {what}", "TransformerLens, a forward each", ratio, asked, more)
            )
        for rule, exact, against in (
            ("gradient", "grafts, TransformerLens", "exact grafts, TransformerLens"),
            ("gradient", "grafts, sweep", "exact grafts, our sweep"),
            ("activation_gradient", "patches at all positions, sweep", "exact patches at all positions, our sweep"),
        ):
            if not {rule, exact} <= set(sweeps.what):
                continue
            # each screen beside what it approximates
            alike = sweeps[sweeps.what == (exact if "patches" in exact else rule)].spearman.median()
            asked = "≥ 50 ×" if rule == "gradient" else "–"
            ratio = ratios(sweeps, exact, rule)
            more = f"Spearman {alike:.3f}"
            found.append(line(f"screen of all modules: `{rule}`", against, ratio, asked, more))
    answers = read("answers")
    if answers is not None:
        different = answers.groupby("what").different.sum()
        for kind, what, asked in (
            ("short answers", "accuracy on short answers after worked examples", "≥ 5 ×"),
            ("short answers with nothing in common", "the same, prompts that share nothing", "–"),
        ):
            ratio = ratios(answers, f"{kind}, generate", f"{kind}, one forward")
            more = f"{different[f'{kind}, one forward']:.0f} verdicts differ"
            found.append(line(what, "Hugging Face `generate`", ratio, asked, more))
        more = f"{different['sweep, ours']:.0f} accuracies differ"
        ratio = ratios(answers, "sweep, naive", "sweep, ours")
        found.append(line("K-sweep with 100 random controls", "the naive loop", ratio, "≥ 3 ×", more))
    told = read("sweep_stops")
    if told is not None:
        ratio = ratios(told, "sweep, naive", "sweep, ours")
        more = f"{told.different.sum():.0f} accuracies differ"
        found.append(line("the same", "the naive loop, given the stop strings", ratio, "–", more))
    texts = read("texts")
    return found if texts is None else [*found, *written(texts)]


def written(texts: pd.DataFrame) -> list[dict[str, str]]:
    """The rows about generation."""
    different = texts.groupby("what").different.sum()
    stops = "`generate`, given the stop strings"
    ratio = ratios(texts, "short answers, generate with stop strings", "short answers, one forward")
    more = f"{different['short answers, one forward']:.0f} verdicts differ"
    found = [line("accuracy on short answers after worked examples", stops, ratio, "–", more)]
    for kind, what, against, asked in (
        ("generation", "tokens a second, a graft in place", "`generate` of the target", "≥ 0.98 ×"),
        ("sentences", "the same, texts that end at unequal lengths", stops, "–"),
    ):
        plain = f"{kind}, generate{' with stop strings' if kind == 'sentences' else ''}"
        ratio = ratios(texts, f"{kind}, ours with a graft", plain, "tokens_a_second")
        more = f"{different[f'{kind}, ours']:.0f} texts of the target differ"
        found.append(line(what, against, ratio, asked, more))
    return found


def verdicts() -> str:
    """Every verdict by one forward pass and by generate."""
    rows = read("verdicts")
    if rows is None:
        return ""
    said = "; ".join(f"{r.model} {100 * r.accuracy:.1f} % right, {r.different} differ" for r in rows.itertuples())
    return (
        f"Verdicts by one forward pass beside those by `generate`, {rows.questions.iloc[0]} questions of "
        f"{rows['pair'].iloc[0]}: {said}."
    )


def made() -> str:
    """When, of which commit and where the last rows of each file were measured, of those that note it."""
    path = RESULTS / MADE
    if not path.exists():
        return ""
    rows = [
        {
            "file": f"`{name}`",
            "day": of["date"],
            "commit": of["commit"],
            "on": ", ".join([f"{of['processor']}, {of['cores']} cores", *([of["gpu"]] if "gpu" in of else [])]),
            "torch, transformers": f"{of['torch'].partition('+')[0]}, {of['transformers']}",
        }
        for name, of in json.loads(path.read_text(encoding="utf-8")).items()
    ]
    return f"""### Where these numbers come from

The last rows of each file in `benchmarks/results/`; + where the code was changed beside its commit. Files that are not
named here were measured before this was noted.

{table(pd.DataFrame(rows))}
"""


def memory() -> str:
    """The peaks beside the loaded models."""
    rows = read("shifts_memory")
    if rows is None:
        return ""
    peak = rows.set_index(["what", "prompts"]).peak_mib
    plain = peak["forwards", 64]
    said = [
        f"{what} of {prompts:,} prompts {peak[what, prompts] - plain:+.0f} MiB"
        for what in ("summary", "values")
        for prompts in sorted(rows[rows.what == what].prompts)
    ]
    return (
        f"Peak memory of the shift analysis above that of plain forwards of both models ({plain:.0f} MiB beside the "
        f"loaded weights, batches of 8; asked for: ≤ 64 MiB): {', '.join(said)}. `summarize_shifts` keeps no prompt's "
        "value; `measure_shifts` returns every prompt's, twenty bytes a module, measure and prompt. Freed memory is "
        "given back at once here; glibc's habit of keeping it adds tens of MiB that depend on the order of batch sizes."
    )


def kills() -> str:
    """Runs that were killed at random moments."""
    rows = read("kills_verdicts")
    if rows is None:
        return ""
    shown = rows.rename(columns=lambda name: name.replace("_", " "))
    return f"""### Runs that are killed

`python benchmarks/kills.py`: a small run, `kill -9` of the run with its processes, or of one worker, at moments spread
at random over all its cells, while models are loaded (one in four), and while tables and figures are written (the last
two), started again each time, beside the same run undisturbed on the serial engine. Two starts in one folder and a full
disk are tests (`tests/test_killed_runs.py`).

{table(shown)}
"""


def peers() -> str:
    """The same measurement with other libraries."""
    rows = read("peers")
    if rows is None:
        return ""
    shown = []
    for kind, what in (
        ("shifts", "magnitude and distance of all heads and MLPs, 64 prompts"),
        ("patches", "the answer's log-probability with each MLP patched at the answer, one by one, 8 prompts"),
    ):
        for name in dict.fromkeys(w.partition(", ")[2] for w in rows.what if w.startswith(kind)):
            here = rows[rows.what == f"{kind}, {name}"]
            ratio = ratios(rows, f"{kind}, {name}", f"{kind}, ours")
            shown.append(
                {
                    "what": what,
                    "with": name,
                    "seconds": f"{here.seconds.median():.2f}",
                    "of ours, median (range)": f"{ratio.median():.1f} × ({ratio.min():.1f} – {ratio.max():.1f})",
                    "largest difference from ours": f"{here.largest_difference.max():.0e}" if name != "ours" else "–",
                    "n": len(here),
                }
            )
    return f"""### Other libraries

`python benchmarks/peers.py` (nnsight 0.8.1 and pyvene 0.1.8 are installed for it, and are no dependencies): how long
the same numbers take with each library on {rows["pair"].iloc[0]}, batches of 8 × 64 tokens, float32, two threads, in
turns. TransformerLens's forward has the logits of all positions; ours and nnsight's have those of the last.

{table(pd.DataFrame(shown))}
"""


def engines() -> str:
    """Seconds of one run on every engine."""
    rows = read("engines")
    if rows is None:
        return ""
    alone = rows[(rows.engine == "serial") & (rows.threads == 1)].set_index("repeat")
    shown = []
    for (engine, threads), each in rows.groupby(["engine", "threads"], sort=False):
        here = each.set_index("repeat")
        after = (alone.seconds - alone.first_cell) / (here.seconds - here.first_cell)
        compared = each.tables_equal.dropna().astype(str)
        same = "the same bytes" if compared.eq("True").all() else "DIFFER"
        shown.append(
            {
                "engine": f"{engine}, {threads} thread{'s' * (threads > 1)}" + (" each" if engine != "serial" else ""),
                "processes": 1 if engine == "serial" else 2,
                "seconds": f"{here.seconds.median():.0f}",
                "of which to the first cell": f"{here.first_cell.median():.0f}",
                "whole run": f"{(alone.seconds / here.seconds).median():.2f} ×",
                "after the first cell": f"{after.median():.2f} ×",
                "tables": same if len(compared) and engine != "serial" else "–",
                "n": len(each),
            }
        )
    return f"""### Engines

`python benchmarks/engines.py`: one run of {int(rows.cells.iloc[0])} cells on {rows["pair"].iloc[0]} (32 questions
each), on two shared cores; how many times faster than the serial engine with one thread (medians of repeats in turns).

{table(pd.DataFrame(shown))}
"""


def cost() -> str:
    """Seconds and memory by size."""
    rows = read("cost")
    if rows is None:
        return ""
    stages = ["shifts", "test", "screen", "exact effects", "evaluation", "random sets", "total"]
    shown = pd.DataFrame(
        {
            "shape": rows["shape"],
            "parameters": [f"{p / 1e6:,.0f} M" for p in rows.parameters],
            "modules": rows.modules,
            "on": [f"{r.device}, {r.dtype}" for r in rows.itertuples()],
            "prompts": [f"{p:,}" for p in rows.prompts],
            **{stage: [f"{v:.1f}" for v in rows[stage]] for stage in stages},
            "both models, GiB": [f"{h / 1024:.1f}" for h in rows.held_mib],
            "peak, GiB": [f"{p / 1024:.1f}" for p in rows.peak_mib],
        }
    )
    further = extrapolated(rows)
    beyond = f"\n\n**Extrapolated, not measured:** {further}." if further else ""
    return f"""### Cost against size

`python benchmarks/cost.py`: the whole pipeline on models of random weights, 64 tokens a prompt, batches of 16, in
seconds a stage: shifts of all heads and MLPs (magnitude, distance, own), their test, the gradient screen of all, exact
effects of the 16 highest, accuracy of target, source and graft, four random sets. Memory is that of a process of its
own. The 2B and 9B pairs' rows were measured on one GPU (`benchmarks/on_gpu.sh`). The CPU's rows are of several days,
and its cores are shared: some ran when it was half as fast, so stages compare within a row.

![Seconds against prompts, and memory, by shape](../figures/cost.png)

{table(shown)}{beyond}
"""


def extrapolated(rows: pd.DataFrame) -> str:
    """The total at the most prompts, for shapes that stop before: each prompt more costs what the last ones did."""
    most, found = rows.prompts.max(), []
    for (shape, device, dtype), here in rows.groupby(["shape", "device", "dtype"], sort=False):
        here = here.sort_values("prompts")
        if len(here) < 2 or here.prompts.iloc[-1] == most:
            continue
        (n, a), (m, b) = here[["prompts", "total"]].iloc[-2:].to_numpy()
        total = b + (most - m) * (b - a) / (m - n)
        found.append(
            f"{shape} ({device}, {dtype}) with {most:,} prompts about {total:.0f} s, each prompt beyond {m:.0f} at the "
            f"cost of those between {n:.0f} and {m:.0f}"
        )
    return "; ".join(found)


def residence() -> str:
    """Both models in memory, or one at a time."""
    found = []
    rows = read("residence")
    for row in [] if rows is None else rows.itertuples():
        where = "the process, above what it needs without a model"
        found.append((row.pair, "CPU, float32", row.one_at_a_time, where, row.shifts_mib, "–"))
    rows = read("cost_turns")
    for row in [] if rows is None else rows.itertuples():
        on = f"{row.device}, {row.dtype}"
        what = "the process, models included" if "cpu" in row.device else "the GPU"
        found.append((f"{row.shape}, {row.prompts} prompts", on, row.one_at_a_time, what, row.peak_mib, row.total))
    if not found:
        return ""
    shown = pd.DataFrame(
        [
            {
                "pair": pair,
                "on": on,
                "in memory": "one at a time" if turns else "both",
                "peak, GiB": f"{peak / 1024:.2f}",
                "of": what,
                "pipeline, s": seconds if seconds == "–" else f"{seconds:.0f}",
            }
            for pair, on, turns, what, peak, seconds in found
        ]
    )
    return f"""### One model at a time

`python benchmarks/speed.py --only residence` (shifts of 64 prompts) and `python benchmarks/cost.py --one-at-a-time`
(the pipeline above; with `TMPDIR=/dev/shm` the files were in memory): the peak with both models in memory, and with
one while the other lies in a file.

{table(shown)}
"""
