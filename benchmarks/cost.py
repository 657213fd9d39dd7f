"""What the whole pipeline costs, by size of the models and number of prompts: seconds and memory, stage by stage.

    python benchmarks/cost.py [--shapes smollm2-4 smollm2-12 smollm2-30] [--prompts 16 128 1024] [--device cpu]
                              [--dtype float32] [--out benchmarks/results]

Models of a shape have random weights (nothing is fetched, and what they answer is of no matter here); the source is the
target with small changes everywhere. Every row of ``cost.csv`` is a process of its own, added when it is finished, and
memory is its peak. Prompts have 64 tokens with their answers, in batches of 16.

Stages: shifts of all heads and MLPs (magnitude, distance, own); the gradient screen of all of them; exact effects of
the 16 highest; evaluation of target, source and graft; four random sets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from tables import save

ROOT = Path(__file__).resolve().parent.parent
BATCH, TOP, RANDOM = 16, 16, 4
#: hidden size, layers, heads, K/V heads, head's width, MLP's width, vocabulary
SHAPES: dict[str, tuple[str, int, int, int, int, int, int, int]] = {
    "smollm2-4": ("llama", 576, 4, 9, 3, 64, 1536, 49152),
    "smollm2-12": ("llama", 576, 12, 9, 3, 64, 1536, 49152),
    "smollm2-30": ("llama", 576, 30, 9, 3, 64, 1536, 49152),
    "gemma2-2b": ("gemma2", 2304, 26, 8, 4, 256, 9216, 256000),
    "gemma2-9b": ("gemma2", 3584, 42, 16, 8, 256, 14336, 256000),
}


def random_pair(shape: str, device: str, dtype: str) -> Any:
    """Two models of a shape, and the family's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig
    from transformers.initialization import no_init_weights

    from mechtransplant.pair import LanguageModel, make_pair
    from mechtransplant.weights import models_folder

    kind, hidden, layers, heads, kv, width, inner, vocabulary = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(models_folder() / "family" / "first")
    config: Any = {"llama": LlamaConfig, "gemma2": Gemma2Config}[kind](
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=width,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    models = []
    generator = torch.Generator(device).manual_seed(0)
    for number in range(2):
        with no_init_weights(), torch.device(device):
            hf = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        hf.tie_weights()
        for name, parameter in hf.named_parameters():
            parameter.requires_grad_(False)
            if "norm" in name:
                # Gemma's norms multiply by 1 + weight
                parameter.fill_(0.0 if kind == "gemma2" else 1.0)
            elif number == 0:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                other = models[0].hf.get_parameter(name)
                parameter.copy_(other).add_(torch.empty_like(other).normal_(0, 0.001, generator=generator))
        hf.config._name_or_path = f"{shape}-{number}"
        models.append(LanguageModel(f"{shape}-{number}", hf.eval(), tokenizer))
    return make_pair(models[1], models[0], shape)


@contextmanager
def timed(stages: dict[str, float], name: str, finish: Callable[[], object]) -> Iterator[None]:
    """A block whose seconds are noted."""
    finish()
    started = time.perf_counter()
    yield
    finish()
    stages[name] = round(time.perf_counter() - started, 3)


def pipeline(pair: Any, prompts: int, finish: Callable[[], object]) -> dict[str, float]:
    """Seconds of every stage."""
    from sweeps import sums

    from mechtransplant.controls import random_matched
    from mechtransplant.evaluation import evaluate
    from mechtransplant.evaluation.sweeps import Change, sweep
    from mechtransplant.grafting import Graft
    from mechtransplant.modules import parse_address
    from mechtransplant.ranking import rank_modules
    from mechtransplant.shifts import measure_shifts
    from mechtransplant.significance import test_shifts

    task, stages = sums(pair, prompts), {}
    # the first call of anything compiles, allocates and imports
    evaluate(pair.target, task.subset(range(min(8, prompts))), batch_size=8)
    with timed(stages, "shifts", finish):
        shifts = measure_shifts(pair, task, batch_size=BATCH)
    with timed(stages, "test", finish):
        test_shifts(shifts, permutations=1000)
    with timed(stages, "screen", finish):
        ranking = rank_modules(pair, task, "gradient", ("head", "mlp"), batch_size=BATCH)
    top = [str(m) for m in ranking.module[:TOP]]
    with timed(stages, "exact effects", finish):
        changes = [Change(parse_address(m).layer, Graft([m]).applied(pair)) for m in top]
        sweep(pair.target, task, changes, BATCH)
    with timed(stages, "evaluation", finish):
        evaluate(pair.target, task, batch_size=BATCH)
        evaluate(pair.source, task, batch_size=BATCH)
        with Graft(top).applied(pair):
            evaluate(pair.target, task, batch_size=BATCH)
    with timed(stages, "random sets", finish):
        for drawn in random_matched(pair, top, RANDOM, 0).sets:
            with Graft(drawn).applied(pair):
                evaluate(pair.target, task, batch_size=BATCH)
    return stages


def child(shape: str, prompts: int, device: str, dtype: str, one_at_a_time: bool) -> None:
    """One row, printed as JSON."""
    import torch
    from speed import _status

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    started = time.perf_counter()
    pair = random_pair(shape, device, dtype)
    if one_at_a_time:
        from mechtransplant.weights import Residence, admit

        residence = Residence()
        for model in (pair.source, pair.target):
            admit(model.hf, residence)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    else:
        held = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    made = time.perf_counter() - started
    stages = pipeline(pair, prompts, torch.cuda.synchronize if on_gpu else lambda: None)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _status("VmHWM")
    row = {
        "shape": shape,
        "layers": pair.layout.layers,
        "parameters": sum(p.numel() for p in pair.target.hf.parameters()),
        "modules": len(pair.modules(("head", "mlp"))),
        "prompts": prompts,
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "held_mib": round(held),
        "peak_mib": round(peak),
        "made": round(made, 1),
        **stages,
        "total": round(sum(stages.values()), 2),
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2-4", "smollm2-12", "smollm2-30"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[16, 128, 1024])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--one-at-a-time", action="store_true", help="both models in memory, then one: cost_turns.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.shapes[0], arguments.prompts[0], arguments.device, arguments.dtype, arguments.one_at_a_time)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / ("cost_turns.csv" if arguments.one_at_a_time else "cost.csv")
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    both = [False, True] if arguments.one_at_a_time else [False]
    for prompts, shape, turns in product(arguments.prompts, arguments.shapes, both):
        asked = {"shape": shape, "prompts": prompts, "dtype": arguments.dtype}
        if arguments.one_at_a_time:
            asked["one_at_a_time"] = turns
        on = arguments.device.split(":")[0]
        if any(all(r[k] == v for k, v in asked.items()) and ("cpu" in r["device"]) == (on == "cpu") for r in rows):
            continue
        options = ["--device", arguments.device, "--dtype", arguments.dtype]
        options += ["--one-at-a-time"] * turns
        command = [sys.executable, __file__, "--child", "--shapes", shape, "--prompts", str(prompts), *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            print(f"{shape}, {prompts} prompts: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        rows.append(asked | json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
        save(pd.DataFrame(rows), path)


if __name__ == "__main__":
    main()
