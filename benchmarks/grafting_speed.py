"""What applying and undoing a graft costs, beside a forward pass, and what it allocates beside what it replaces.

    python benchmarks/grafting_speed.py [--pair smollm2/generations] [--repeats 11] [--out benchmarks/results]

Seconds: one process, two threads; a plain Hugging Face forward (8 × 64 tokens, no gradients, no key/value cache) and
every graft in turn; ratios are taken within a round, and medians over rounds. Memory: a process of its own for every
row, the peak above what the loaded and touched models hold, with freed memory given back at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from speed import GIVE_BACK, ROOT, _status
from tables import save

BATCH, LENGTH = 8, 64
#: what is grafted → strengths
GRAFTS: dict[str, tuple[float, ...]] = {"all linear layers": (1.0, 0.5), "one MLP": (1.0, 0.5), "one head": (1.0, 0.5)}


def modules_of(pair: Any, what: str) -> list[str]:
    """The addresses of a row."""
    middle = pair.layout.layers // 2
    return {"all linear layers": pair.modules("linear"), "one MLP": [f"L{middle}.mlp"], "one head": [f"L{middle}H0"]}[
        what
    ]


def seconds(pair_name: str, repeats: int) -> pd.DataFrame:
    """One row a graft and strength: seconds of applying and undoing, and their sum over a forward's."""
    import torch

    from mechtransplant.grafting import Graft
    from mechtransplant.pair import load_pair

    torch.set_num_threads(2)
    pair = load_pair(pair_name)
    ids = torch.randint(100, 1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    grafts = {(what, s): Graft(modules_of(pair, what), s) for what, all_of in GRAFTS.items() for s in all_of}
    times: dict[tuple[str, float], list[tuple[float, float, float, float]]] = {key: [] for key in grafts}
    first = {}
    for at in range(repeats + 1):
        for key, graft in grafts.items():
            # a forward beside each: on a shared machine the next minute is not like the last
            started = time.perf_counter()
            with torch.no_grad():
                pair.target.hf(ids, use_cache=False)
            forward = time.perf_counter() - started
            started = time.perf_counter()
            applied = graft.applied(pair)
            checked = time.perf_counter()
            with applied:
                inside = time.perf_counter()
            done = time.perf_counter()
            if at:
                times[key].append((forward, checked - started, inside - checked, done - inside))
            else:
                first[key] = inside - started
    rows = []
    for (what, strength), graft in grafts.items():
        forward, check, apply, undo = np.array(times[what, strength]).T
        ratio = (check + apply + undo) / forward
        rows.append(
            {
                "pair": pair_name,
                "graft": what,
                "strength": strength,
                "numbers": graft.parameter_count(pair),
                "repeats": repeats,
                "forward_seconds": np.median(forward),
                "check_seconds": np.median(check),
                "apply_seconds": np.median(apply),
                "undo_seconds": np.median(undo),
                "ratio": np.median(ratio),
                "ratio_low": ratio.min(),
                "ratio_high": ratio.max(),
                "first_seconds": first[what, strength],
            }
        )
    return pd.DataFrame(rows)


def memory(pair_name: str, what: str, strength: float) -> dict[str, float]:
    """MiB that are replaced, the peak above the loaded models, and what is still held after undoing."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", pair_name, what, str(strength)],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **GIVE_BACK},
    )  # fmt: skip
    replaced, peak, left = map(float, done.stdout.split()[-3:])
    return {"replaced_mib": replaced, "peak_mib": peak, "left_mib": left}


def child(pair_name: str, what: str, strength: float) -> None:
    """One memory measurement."""
    import torch

    from mechtransplant.grafting import Graft
    from mechtransplant.pair import load_pair

    torch.set_num_threads(2)
    pair = load_pair(pair_name)
    # weights that are mapped from a file count when they are first read, which is not the graft's doing
    for model in (pair.source, pair.target):
        for p in model.hf.parameters():
            p.detach().sum()
    last = pair.layout.layers - 1
    with Graft([f"L{last}H1"], strength).applied(pair):
        pass
    graft = Graft(modules_of(pair, what), strength)
    parameters = pair.target_parameters
    replaced = sum(r.of(parameters[r.parameter]).nbytes for r in graft.regions(pair)) / 2**20
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with graft.applied(pair):
        pass
    print(replaced, _status("VmHWM") - held, _status("VmRSS") - held)


def main() -> None:
    if "--child" in sys.argv:
        child(sys.argv[2], sys.argv[3], float(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2/generations")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = seconds(arguments.pair, arguments.repeats)
    held = [memory(arguments.pair, r.graft, r.strength) for r in rows.itertuples()]
    rows = pd.concat([rows, pd.DataFrame(held)], axis=1)
    save(rows, arguments.out / "grafting_speed.csv", "%.5g")
    print(rows.to_string(index=False))


if __name__ == "__main__":
    main()
