"""How fast the statistics and the shift analysis are, side by side with what they are compared to.

    python benchmarks/speed.py [--repeats 7] [--pair smollm2/generations] [--only shifts] [--out benchmarks/results]

Rows are interleaved in one process, and ratios are medians. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tables import note, save

#: glibc keeps freed memory of many sizes: with these it is given back, and the peak is what was held at once
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROOT = Path(__file__).resolve().parent.parent


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of every function, called in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for at in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if at:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(each) for name, each in seconds.items()}


def statistics(repeats: int) -> list[str]:
    """300 modules × 256 prompts × 10,000 permutations, beside scipy's permutation test of the same statistic."""
    from scipy import stats

    from mechtransplant.significance import test_shifts

    rng = np.random.default_rng(0)
    modules, prompts, permutations = 300, 256, 10_000

    def frame(values: np.ndarray) -> pd.DataFrame:
        names = np.tile([f"m{i}" for i in range(modules)], prompts)
        return pd.DataFrame(
            {
                "module": names,
                "prompt": np.repeat(np.arange(prompts), modules),
                "measure": "magnitude",
                "value": values.ravel(),
            }
        )

    x, y = rng.normal(size=(2, prompts, modules))
    task, control = frame(x), frame(y)
    few = 10

    def scipys() -> object:
        return stats.permutation_test(
            (x[:, :few],),
            lambda v, axis: np.abs(v.mean(axis) / v.std(axis, ddof=1)),
            permutation_type="samples",
            alternative="greater",
            n_resamples=permutations,
            vectorized=True,
            batch=500,
            rng=rng,
        )

    seconds = interleaved(
        {
            "sign": lambda: test_shifts(task, permutations=permutations),
            "control": lambda: test_shifts(task, control=control, permutations=permutations),
            "scipy": scipys,
        },
        repeats,
    )
    median = {name: float(np.median(s)) for name, s in seconds.items()}
    ratio = float(np.median(seconds["scipy"] / few / (seconds["sign"] / modules)))
    return [
        f"`test_shifts` on {modules} modules × {prompts} prompts × {permutations:,} permutations, effects and "
        f"intervals included: sign-flip {median['sign']:.2f} s, task against control {median['control']:.2f} s. "
        f"scipy's `permutation_test` of the same statistic, on {few} modules, takes {median['scipy']:.2f} s: "
        f"{ratio:.0f} × as long a module, without max-T (medians of {repeats}, interleaved).",
    ]


def forwards(pair_name: str, repeats: int, batch: int = 8, length: int = 64) -> pd.DataFrame:
    """Seconds of the shift analysis of one batch and of plain forwards of both models: one row a repeat and name."""
    import torch

    from mechtransplant.activations import Reading
    from mechtransplant.pair import load_pair
    from mechtransplant.shifts.collector import Collector, PromptValues
    from mechtransplant.shifts.recorder import PairRecorder

    torch.set_num_threads(2)
    pair = load_pair(pair_name)
    rows = torch.randint(100, 1000, (batch, length), generator=torch.Generator().manual_seed(0)).tolist()
    reading = Reading(rows, [(0, length)] * batch)
    (one,) = reading.batches(pair.target.hf, batch)

    def plain(times: int, inputs: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for model in (pair.target, pair.source, pair.target)[:times]:
                    model.hf(**inputs)

        return run

    def analysis(*measures: str) -> Callable[[], None]:
        collector = Collector(pair, batch, ("head", "mlp"), measures, PromptValues(batch))

        def run() -> None:
            with torch.no_grad(), PairRecorder(pair, collector.slots, collector.needs_moved) as recorder:
                recorder.read(one, collector.consumer(one))

        return run

    # also the least that a forward can be asked for, which is what the analysis itself asks for
    seconds = interleaved(
        {
            "two forwards": plain(2, one.inputs),
            "two forwards, no logits": plain(2, one.hidden_only),
            "distance": analysis("distance"),
            "magnitude and distance": analysis("magnitude", "distance"),
            "three forwards": plain(3, one.inputs),
            "three forwards, no logits": plain(3, one.hidden_only),
            "magnitude, distance and own": analysis("magnitude", "distance", "own"),
        },
        repeats,
    )
    return pd.DataFrame(
        [
            {"pair": pair_name, "batch": batch, "length": length, "repeat": at, "what": name, "seconds": value}
            for name, values in seconds.items()
            for at, value in enumerate(values)
        ]
    )


def peak(pair_name: str, what: str, prompts: int) -> float:
    """MiB that a process needs beside its loaded models at its peak: "forwards" of both, "summary" or "values"."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", pair_name, what, str(prompts)],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **GIVE_BACK},
    )  # fmt: skip
    return float(done.stdout.strip().splitlines()[-1])


def child(pair_name: str, what: str, prompts: int) -> None:
    """One memory measurement; prints in MiB how far the peak lies above what the loaded models hold."""
    import torch

    from mechtransplant.activations import plan_reading
    from mechtransplant.pair import load_pair
    from mechtransplant.shifts import measure_shifts, summarize_shifts
    from mechtransplant.tasks import load_task

    torch.set_num_threads(2)
    pair = load_pair(pair_name)
    # weights that are mapped from a file count when they are first read
    for model in (pair.source, pair.target):
        for parameter in model.hf.parameters():
            parameter.sum()
    task = load_task(str(pair.default_task), prompts, seed=0)
    held = _status("VmRSS")
    # the peak of loading (adapters are merged in copies) is not what is asked for: start it anew
    Path("/proc/self/clear_refs").write_text("5")
    if what == "forwards":
        with torch.no_grad():
            for batch in plan_reading(pair.target, task).batches(pair.target.hf, 8):
                for model in (pair.target, pair.source):
                    model.hf(**batch.hidden_only)
    else:
        {"summary": summarize_shifts, "values": measure_shifts}[what](pair, task, batch_size=8)
    print(_status("VmHWM") - held)


def _status(key: str) -> float:
    """A line of /proc/self/status in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def whole_process(pair_name: str, one_at_a_time: bool) -> None:
    """Prints the MiB of the process before it has models, and its peaks while it loads them and measures shifts."""
    import torch
    import transformers  # noqa: F401  (not counted as a model's)

    from mechtransplant.pair import load_pair
    from mechtransplant.shifts import summarize_shifts
    from mechtransplant.tasks import load_task

    torch.set_num_threads(2)
    found = [_status("VmRSS")]
    pair = load_pair(pair_name, one_at_a_time=one_at_a_time)
    task = load_task(str(pair.default_task), 64, seed=0)
    found.append(_status("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    summarize_shifts(pair, task, batch_size=8)
    print(*found, _status("VmHWM"))


def residence(pair_name: str) -> pd.DataFrame:
    """What a process needs for both models, and for one at a time, in MiB above what it needs without any."""
    rows = []
    for one_at_a_time in (False, True):
        done = subprocess.run(
            [sys.executable, __file__, "--whole", pair_name, str(int(one_at_a_time))],
            check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **GIVE_BACK},
        )  # fmt: skip
        before, loading, measuring = map(float, done.stdout.strip().splitlines()[-1].split())
        row = {"pair": pair_name, "one_at_a_time": one_at_a_time}
        rows.append({**row, "loading_mib": loading - before, "shifts_mib": measuring - before})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def memory(pair_name: str, path: Path) -> None:
    """Peaks beside the loaded models, MiB; 6,400 prompts take three quarters of an hour; rows that are there stay."""
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    for what, prompts in (("forwards", 64), ("summary", 64), ("values", 64), ("summary", 6400), ("values", 6400)):
        if any((row["what"], row["prompts"]) == (what, prompts) for row in rows):
            continue
        rows.append({"pair": pair_name, "what": what, "prompts": prompts, "peak_mib": peak(pair_name, what, prompts)})
        print(rows[-1], flush=True)
        save(pd.DataFrame(rows), path, "%.4g")


def main() -> None:
    if "--child" in sys.argv:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    if "--whole" in sys.argv:
        whole_process(sys.argv[2], sys.argv[3] == "1")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pair", default="smollm2/generations")
    parser.add_argument("--only", choices=("statistics", "shifts", "memory", "residence"), nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = arguments.only or ("statistics", "shifts", "memory", "residence")
    if "statistics" in wanted:
        text = "\n\n".join(statistics(arguments.repeats)) + "\n"
        (arguments.out / "statistics_speed.md").write_text(text, encoding="utf-8")
        note(arguments.out / "statistics_speed.md")
        print(text)
    if "shifts" in wanted:
        rows = forwards(arguments.pair, arguments.repeats)
        save(rows, arguments.out / "shifts_speed.csv", "%.5g")
        print(rows.groupby("what", sort=False).seconds.describe())
    if "residence" in wanted:
        save(residence(arguments.pair), arguments.out / "residence.csv", "%.4g")
    if "memory" in wanted:
        memory(arguments.pair, arguments.out / "shifts_memory.csv")


if __name__ == "__main__":
    main()
