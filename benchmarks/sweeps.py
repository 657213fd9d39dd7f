"""The effect of every head and MLP alone: sweeps that repeat nothing, beside one TransformerLens forward a module.

    python benchmarks/sweeps.py [--pair smollm2/generations] [--repeats 7] [--modules N] [--out benchmarks/results]

Eight prompts of equal length, 64 tokens with their answers, none of which begins as another does; float32, two threads;
rows are interleaved in one process and ratios are medians. Every measurement is added to the CSV file, so that a killed
benchmark continues where it was; a repeat's values that are compared with each other are kept beside it until then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tables import save

from mechtransplant.evaluation.batches import encode
from mechtransplant.evaluation.sweeps import Change, sweep
from mechtransplant.grafting import Graft
from mechtransplant.modules import parse_address
from mechtransplant.pair import Pair, load_pair
from mechtransplant.patching import patch_effects
from mechtransplant.ranking import rank_modules
from mechtransplant.tasks import Example, PromptFormat, Task, load_task

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 64


def sums(pair: Pair, questions: int = 8) -> Task:
    """Sums of as many numbers as fill the tokens; every number has two digits, so that all prompts are equally long."""
    rng = np.random.default_rng(0)
    base = load_task("addition")
    for count in range(4, 40):
        numbers = rng.integers(10, 100, (questions, count))
        examples = tuple(Example(" + ".join(map(str, row)), str(row.sum())) for row in numbers)
        task = replace(
            base, name="sums", examples=examples, format=PromptFormat(question="{question} ="), role="discover"
        )
        encoded = encode(task, pair.target.tokenizer)
        if max(len(p) + len(c) for p, c in zip(encoded.prompts, encoded.completions, strict=True)) >= TOKENS:
            return task
    raise SystemExit("this tokenizer makes too few tokens of a sum")


class TransformerLens:
    """What a user of TransformerLens would write: the bridge, one forward a module, log p of the answer."""

    def __init__(self, pair: Pair, task: Task) -> None:
        from mechtransplant.evaluation.batches import pad

        self.pair, encoded = pair, encode(task, pair.target.tokenizer)
        rows = [p + c[:-1] for p, c in zip(encoded.prompts, encoded.completions, strict=True)]
        self.ids, self.mask = pad(rows, 0, "right")
        self.start = torch.tensor([len(p) - 1 for p in encoded.prompts])
        self.gold = encoded.completions
        for model in (pair.source, pair.target):
            model.bridge  # noqa: B018  (made before the clock starts)

    def score(self, logits: torch.Tensor) -> np.ndarray:
        found = []
        for row, (start, gold) in enumerate(zip(self.start.tolist(), self.gold, strict=True)):
            # torch's log_softmax of float32 is 3e-5 nats off on a CPU
            scores = logits[row, start : start + len(gold)].double().log_softmax(-1)
            found.append(scores[torch.arange(len(gold)), torch.tensor(gold)].sum().item())
        return np.array(found)

    def forward(self, hooks: list[Any] | None = None) -> np.ndarray:
        bridge = self.pair.target.bridge
        with torch.no_grad():
            if hooks:
                return self.score(bridge.run_with_hooks(self.ids, attention_mask=self.mask, fwd_hooks=hooks))
            return self.score(bridge(self.ids, attention_mask=self.mask))

    def grafts(self, modules: list[str]) -> np.ndarray:
        """One forward a module, its weights moved."""
        found = []
        for module in modules:
            with Graft([module]).applied(self.pair):
                found.append(self.forward())
        return np.array(found)

    def patches(self, modules: list[str]) -> np.ndarray:
        """One forward a module, its activations of the source's cache moved at the answer's positions."""
        wanted = ("attn.hook_z", "mlp.hook_out")
        with torch.no_grad():
            _, cache = self.pair.source.bridge.run_with_cache(
                self.ids, attention_mask=self.mask, names_filter=lambda name: name.endswith(wanted)
            )
        length = self.ids.shape[1]
        at = torch.arange(length)[None] >= self.start[:, None]
        found = []
        for module in modules:
            address = parse_address(module)
            name = f"blocks.{address.layer}.{'mlp.hook_out' if address.head is None else 'attn.hook_z'}"

            def move(
                tensor: torch.Tensor, hook: Any, head: int | None = address.head, name: str = name
            ) -> torch.Tensor:
                new = tensor.clone()
                if head is None:
                    new[at] = cache[name][at]
                else:
                    new[..., head, :][at] = cache[name][..., head, :][at]
                return new

            found.append(self.forward([(name, move)]))
        return np.array(found)


def measured(pair: Pair, task: Task, modules: list[str]) -> dict[str, Callable[[], np.ndarray]]:
    """name → a function that gives (modules, questions) log-probabilities, or one score a module."""
    theirs = TransformerLens(pair, task)

    def grafts() -> np.ndarray:
        changes = [Change(parse_address(m).layer, Graft([m]).applied(pair)) for m in modules]
        return sweep(pair.target, task, changes, len(task))[1].log_probability

    kinds = ("head", "mlp")
    every = {m: i for i, m in enumerate(pair.modules(kinds))}
    mine = [every[m] for m in modules]

    def screen(rule: str) -> np.ndarray:
        found = rank_modules(pair, task, rule, kinds, batch_size=len(task))
        return found.set_index(found.module.astype(str)).score.reindex(list(every)).to_numpy()[mine]

    return {
        "forward": theirs.forward,
        "grafts, TransformerLens": lambda: theirs.grafts(modules),
        "grafts, sweep": grafts,
        "patches at the answer, TransformerLens": lambda: theirs.patches(modules),
        "patches at the answer, sweep": lambda: (
            patch_effects(pair, task, modules, "answer", heads="z", batch_size=len(task))[1].log_probability
        ),
        "patches at all positions, sweep": lambda: (
            patch_effects(pair, task, modules, "all", batch_size=len(task))[1].log_probability
        ),
        "gradient": lambda: screen("gradient"),
        "activation_gradient": lambda: screen("activation_gradient"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2/generations")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--modules", type=int, help="only so many modules, evenly spaced: a trial, not a result")
    parser.add_argument("--only", nargs="*", help="only these rows")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    pair = load_pair(arguments.pair)
    task = sums(pair)
    modules = [str(m) for m in pair.modules(("head", "mlp"))]
    if arguments.modules:
        modules = [modules[i] for i in np.linspace(0, len(modules) - 1, arguments.modules).round().astype(int)]
    functions = measured(pair, task, modules)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trial = bool(arguments.modules or arguments.only)
    path = arguments.out / ("sweeps-trial.csv" if trial else "sweeps.csv")
    kept = path.with_suffix(".npz")
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    values = dict(np.load(kept)) if kept.exists() else {}
    for repeat in range(arguments.repeats):
        for name in arguments.only or functions:
            if any(r["repeat"] == repeat and r["what"] == name for r in rows):
                continue
            started = time.perf_counter()
            values[name] = functions[name]()
            seconds = time.perf_counter() - started
            print(f"{repeat} {name}: {seconds:.2f} s", flush=True)
            if name.startswith("patches at all") and "activation_gradient" not in values:
                # not timed: what the screen is compared with
                values["activation_gradient"] = functions["activation_gradient"]()
            row = {"pair": arguments.pair, "modules": len(modules), "repeat": repeat, "what": name}
            rows.append({**row, "seconds": round(seconds, 4), **compared(name, values)})
            np.savez(kept, **values)
            save(pd.DataFrame(rows), path, "%.6g")
    kept.unlink(missing_ok=True)


def compared(name: str, values: dict[str, np.ndarray]) -> dict[str, float]:
    """How far a row's values are from TransformerLens's, and how alike a screen ranks the modules."""
    kind = next((kind for kind in ("grafts", "patches at the answer") if kind in name), None)
    theirs = values.get(f"{kind}, TransformerLens")
    if theirs is not None:
        return {"largest_difference": float(np.abs(values[name] - theirs).max())}
    # a screen beside what it approximates: weights moved, or activations at all positions
    screen, exact = {
        "gradient": ("gradient", "grafts, TransformerLens"),
        "patches at all positions, sweep": ("activation_gradient", "patches at all positions, sweep"),
    }.get(name, ("", ""))
    if screen in values and exact in values:
        return {"spearman": stats.spearmanr(values[screen], values[exact].mean(1)).statistic}
    return {}


if __name__ == "__main__":
    main()
