"""The same measurement with other libraries: shifts of all heads and MLPs, and patches of every MLP, one by one.

    python benchmarks/peers.py [--pair smollm2/generations] [--repeats 5] [--peers FOLDER] [--out benchmarks/results]

nnsight and pyvene are no dependencies: without ``--peers`` they are installed by pip into a temporary folder, without
what they depend on. Prompts of 64 tokens in batches of eight (64 for shifts, 8 for patches), float32, two threads; rows
are interleaved in one process, and every repeat compares the numbers.

Shifts: each library reads every head's z and every MLP's output of both models, and the same lines of torch turn them
into magnitude and distance (pyvene has no z of a grouped-query model's heads, and is left out). Patches: each library
moves the source's output of an MLP at the answer's positions, one forward an MLP; log p of the answer is the result.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sweeps import TransformerLens, sums
from tables import save

from mechtransplant.activations import Reading
from mechtransplant.pair import LanguageModel, Pair, copy_without_hooks, load_pair
from mechtransplant.patching import patch_effects
from mechtransplant.shifts.collector import Collector, PromptValues
from mechtransplant.shifts.recorder import PairRecorder

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("nnsight==0.8.1", "pyvene==0.1.8")
#: what they import and this project does not have
BESIDE = ("cloudpickle==3.1.3", "zstandard==0.25.0", "plotnine==0.15.9", "mizani==0.14.6")
#: (heads' z, MLPs' outputs), layer by layer
Read = tuple[list[torch.Tensor], list[torch.Tensor]]


def read_by_bridge(model: LanguageModel, ids: torch.Tensor) -> Read:
    """TransformerLens: a cache of the hooks that are wanted."""
    _, cache = model.bridge.run_with_cache(
        ids, names_filter=lambda name: name.endswith(("attn.hook_z", "mlp.hook_out"))
    )
    layers = range(model.layout.layers)
    return [cache[f"blocks.{n}.attn.hook_z"] for n in layers], [cache[f"blocks.{n}.mlp.hook_out"] for n in layers]


def read_by_nnsight(wrapped: Any, ids: torch.Tensor) -> Read:
    """nnsight: one trace."""
    import nnsight

    with wrapped.trace(input_ids=ids, logits_to_keep=1):
        zs, outs = nnsight.save([]), nnsight.save([])
        for layer in wrapped.model.layers:
            zs.append(layer.self_attn.o_proj.input)
            outs.append(layer.mlp.output)
    return zs, outs


def shifts_of(pair: Pair, source: Read, target: Read) -> np.ndarray:
    """Magnitude and distance of all heads, then all MLPs, by prompt: (2, modules, prompts)."""
    found = []
    for layer, zs in enumerate(zip(source[0], target[0], strict=True)):
        ours = [
            torch.einsum("bphd,hdm->bphm", z.reshape(*z.shape[:2], pair.layout.heads, -1), m.output_weights(layer))
            for z, m in zip(zs, (pair.source, pair.target), strict=True)
        ]
        found += _measures(*(write.transpose(1, 2).transpose(0, 1) for write in ours))
    for pieces in zip(source[1], target[1], strict=True):
        found += _measures(*(out[None] for out in pieces))
    return np.stack(found, 1)


def _measures(source: torch.Tensor, target: torch.Tensor) -> list[np.ndarray]:
    """Of (modules, prompts, positions, width): one array (2, prompts) a module."""
    magnitude = source.abs().mean(-1) - target.abs().mean(-1)
    norm = torch.linalg.vector_norm
    distance = 2 * norm(source - target, dim=-1) / (norm(source, dim=-1) + norm(target, dim=-1))
    both = torch.stack([magnitude, distance]).mean(-1)
    return [both[:, module].numpy() for module in range(both.shape[1])]


def shifts(pair: Pair, wrapped: dict[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """name → a function that measures shifts of one batch."""
    rows = torch.randint(3, min(1000, len(pair.target.tokenizer)), (64, 64), generator=torch.Generator().manual_seed(0))
    reading = Reading(rows.tolist(), [(0, 64)] * len(rows))

    def ours() -> np.ndarray:
        values = PromptValues(len(rows))
        collector = Collector(pair, len(rows), ("head", "mlp"), ("magnitude", "distance"), values)
        with PairRecorder(pair, collector.slots, False) as recorder:
            for batch in reading.batches(pair.target.hf, 8):
                recorder.read(batch, collector.consumer(batch))
        return np.stack([values.values["magnitude"], values.values["distance"]])

    def by(read: Callable[[str, torch.Tensor], Read]) -> np.ndarray:
        parts = [shifts_of(pair, read("source", ids), read("target", ids)) for ids in rows.split(8)]
        return np.concatenate(parts, 2)

    def by_bridge() -> np.ndarray:
        return by(lambda role, ids: read_by_bridge(getattr(pair, role), ids))

    def by_nnsight() -> np.ndarray:
        return by(lambda role, ids: read_by_nnsight(wrapped[role], ids))

    return {"shifts, ours": ours, "shifts, TransformerLens": by_bridge, "shifts, nnsight": by_nnsight}


def patches(pair: Pair, wrapped: dict[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """name → a function that gives log p of the answers, (MLPs, questions)."""
    import pyvene

    twin = copy_without_hooks(pair.target.hf, share_parameters=True)
    task, mlps = sums(pair), pair.modules("mlp")
    theirs = TransformerLens(pair, task)
    inputs = {"input_ids": theirs.ids, "attention_mask": theirs.mask}
    start, length = int(theirs.start[0]), theirs.ids.shape[1]
    if (theirs.start != start).any():
        raise SystemExit("this tokenizer makes prompts of several lengths: a slice of positions would not do")

    def by_nnsight() -> np.ndarray:
        import nnsight

        source, target = wrapped["source"], wrapped["target"]
        with source.trace(**inputs):
            outs = nnsight.save([])
            for layer in source.model.layers:
                outs.append(layer.mlp.output)
        found = []
        for layer in range(len(mlps)):
            with target.trace(**inputs):
                target.model.layers[layer].mlp.output[:, start:] = outs[layer][:, start:]
                logits = target.lm_head.output.save()
            found.append(theirs.score(logits))
        return np.array(found)

    def by_pyvene() -> np.ndarray:
        outs: list[torch.Tensor] = []
        handles = [
            layer.mlp.register_forward_hook(lambda _, __, output: outs.append(output))
            for layer in pair.source.hf.model.layers
        ]
        pair.source.hf(**inputs)
        for handle in handles:
            handle.remove()
        places = [[list(range(start, length))] * len(task)]
        found = []
        for layer in range(len(mlps)):
            config = pyvene.IntervenableConfig(
                {"layer": layer, "component": "mlp_output"}, intervention_types=pyvene.VanillaIntervention
            )
            model = pyvene.IntervenableModel(config, model=twin)
            moved = {model.sorted_keys[0]: outs[layer][:, start:]}
            _, output = model(inputs, source_representations=moved, unit_locations={"base": places})
            found.append(theirs.score(output.logits))
        return np.array(found)

    return {
        "patches, ours": lambda: patch_effects(pair, task, mlps, "answer", batch_size=len(task))[1].log_probability,
        "patches, TransformerLens": lambda: theirs.patches(mlps),
        "patches, nnsight": by_nnsight,
        "patches, pyvene": by_pyvene,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2/generations")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="a folder in which nnsight and pyvene are installed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.peers or Path(temporary)
        if arguments.peers is None:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, *PEERS, *BESIDE], check=True)
        # behind everything else: they use the versions that are here
        sys.path.append(str(folder))
        measure(arguments.pair, arguments.repeats, arguments.out)


def measure(name: str, repeats: int, out: Path) -> None:
    """Every row, repeat by repeat."""
    import nnsight

    pair = load_pair(name)
    # they change the modules that they are given: twins with the same parameters
    twins = {r: copy_without_hooks(getattr(pair, r).hf, share_parameters=True) for r in ("source", "target")}
    wrapped = {role: nnsight.NNsight(twin) for role, twin in twins.items()}
    functions = {**shifts(pair, wrapped), **patches(pair, wrapped)}
    for model in (pair.source, pair.target):
        model.bridge  # noqa: B018  (made before the clock starts)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for repeat in range(-1, repeats):
        first: dict[str, np.ndarray] = {}
        for what, function in functions.items():
            started = time.perf_counter()
            with torch.no_grad():
                values = function()
            seconds = time.perf_counter() - started
            kind = what.partition(",")[0]
            difference = float(np.abs(values - first.setdefault(kind, values)).max())
            row = {"pair": name, "repeat": repeat, "what": what, "seconds": round(seconds, 4)}
            row |= {"values": values.size, "largest_difference": difference}
            print(row, flush=True)
            # the first round is not counted
            if repeat >= 0:
                rows.append(row)
        save(pd.DataFrame(rows), out / "peers.csv", "%.6g")


if __name__ == "__main__":
    main()
