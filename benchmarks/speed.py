"""How fast the statistics and the shift analysis are, side by side with what they are compared to.

    python benchmarks/speed.py [--repeats 7] [--pair smollm2/generations] [--out benchmarks/results]

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


def forwards(pair_name: str, repeats: int, batch: int = 8, length: int = 64) -> list[str]:
    """The shift analysis of one batch, beside plain forwards of the two models."""
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

    def plain(times: int, **options: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for model in (pair.target, pair.source, pair.target)[:times]:
                    model.hf(**one.inputs, **options)

        return run

    def analysis(*measures: str) -> Callable[[], None]:
        collector = Collector(pair, batch, ("head", "mlp"), measures, PromptValues(batch))

        def run() -> None:
            with torch.no_grad(), PairRecorder(pair, collector.slots, collector.needs_moved) as recorder:
                recorder.read(one, collector.consumer(one))

        return run

    # the least that a forward can be asked for: what the analysis itself asks for
    least = {"use_cache": False, "logits_to_keep": 1}
    seconds = interleaved(
        {
            "two": plain(2),
            "two, hidden states": plain(2, **least),
            "distance": analysis("distance"),
            "both": analysis("magnitude", "distance"),
            "three": plain(3),
            "three, hidden states": plain(3, **least),
            "own": analysis("magnitude", "distance", "own"),
        },
        repeats,
    )
    lines = []
    for name, base, what in (
        ("distance", "two", "distance of all heads and MLPs against two plain forwards"),
        ("both", "two", "magnitude and distance against two plain forwards"),
        ("own", "three", "magnitude, distance and own against three plain forwards"),
    ):
        ratios = [seconds[name] / seconds[f"{base}{which}"] for which in ("", ", hidden states")]
        cells = [f"{np.median(r):.2f} × | {r.min():.2f} – {r.max():.2f}" for r in ratios]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    head = (
        f"{pair_name}, {batch} × {length} tokens, float32, two threads; ratios, medians of {repeats} interleaved "
        f"repeats (two plain forwards: {np.median(seconds['two']):.2f} s). On the right the forwards "
        "compute no logits but the last position's, as the analysis does:\n\n"
        "| what | plain forwards | range | without logits | range |\n|---|---|---|---|---|"
    )
    return [head, *lines]


def peak(pair_name: str, prompts: int) -> float:
    """MiB that a process needs beside its loaded models at its peak, measuring shifts (0 prompts: plain forwards)."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", pair_name, str(prompts)],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **GIVE_BACK},
    )  # fmt: skip
    return float(done.stdout.strip().splitlines()[-1])


def child(pair_name: str, prompts: int) -> None:
    """One memory measurement; prints in MiB how far the peak lies above what the loaded models hold."""
    import torch

    from mechtransplant.activations import plan_reading
    from mechtransplant.pair import load_pair
    from mechtransplant.shifts import measure_shifts
    from mechtransplant.tasks import load_task

    torch.set_num_threads(2)
    pair = load_pair(pair_name)
    task = load_task(str(pair.default_task), max(prompts, 32), seed=0)
    held = _status("VmRSS")
    # the peak of loading (adapters are merged in copies) is not what is asked for: start it anew
    Path("/proc/self/clear_refs").write_text("5")
    if prompts:
        measure_shifts(pair, task, batch_size=8)
    else:
        with torch.no_grad():
            for batch in plan_reading(pair.target, task).batches(pair.target.hf, 8):
                for model in (pair.target, pair.source):
                    model.hf(**batch.inputs, use_cache=False, logits_to_keep=1)
    print(_status("VmHWM") - held)


def _status(key: str) -> float:
    """A line of /proc/self/status in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def memory(pair_name: str) -> list[str]:
    plain, few, many = (peak(pair_name, n) for n in (0, 32, 320))
    return [
        f"Peak memory beside the loaded models ({pair_name}, batches of 8, positions `all`): plain forwards of both "
        f"models on 32 prompts {plain:.0f} MiB, `measure_shifts` of 32 prompts {few:.0f} MiB, of 320 prompts "
        f"{many:.0f} MiB. (Freed memory given back at once; glibc's habit of keeping it adds tens of MiB that depend "
        "on the order of batch sizes.)",
    ]


def main() -> None:
    if "--child" in sys.argv:
        child(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pair", default="smollm2/generations")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = "`python benchmarks/speed.py`, on two shared cores: ratios carry over, seconds do not."
    parts = [f"## Speed and memory\n\n{about}"]
    parts += statistics(arguments.repeats)
    parts.append("\n".join(forwards(arguments.pair, arguments.repeats)))
    parts += memory(arguments.pair)
    text = "\n\n".join(parts) + "\n"
    (arguments.out / "speed.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
