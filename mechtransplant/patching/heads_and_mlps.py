"""Ablations of heads against MLPs: random sets of both, matched in number of modules and in number of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.activations import ActivationCache
from mechtransplant.errors import UsageError, check_count, check_seed
from mechtransplant.evaluation import gold_scores
from mechtransplant.patching.ablation import Ablation, Method
from mechtransplant.patching.passes import Where
from mechtransplant.progress import track
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import LanguageModel, Pair


def parameter_count(model: LanguageModel, modules: Iterable[str]) -> int:
    """How many numbers some disjoint modules have; a head's are its Q rows and O columns."""
    parameters = dict(model.hf.named_parameters())
    regions = [r for m in modules for r in model.layout.regions(m, parameters)]
    return sum(r.of(parameters[r.parameter]).numel() for r in regions)


def ablate_heads_and_mlps(
    model: LanguageModel | Pair,
    task: Task,
    counts: int | Sequence[int] = (1, 2, 4),
    methods: Sequence[Method] = ("zero",),
    reference: ActivationCache | None = None,
    *,
    sets: int = 20,
    positions: Where = "all",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Ablate random sets of heads and of MLPs, and measure what the model (a pair's target) loses.

    For every count c there are c MLPs, c heads ("modules" matched), and as many heads as have the parameters of c MLPs
    ("parameters" matched, to the nearest head; all heads where they are fewer).

    Args:
        reference: for "mean" and "resample": :func:`reference_activations` of all heads and MLPs.
        sets: how many different random sets of each; fewer where fewer exist.

    Returns:
        one row a set and method: method, kind, matched ("modules", "parameters", or "both" for the MLPs), count (c),
        set, modules (their number), parameters, share (of the model's), names, accuracy, log_probability (mean, in
        nats), and the two less the unharmed model's: accuracy_change, log_probability_change.

    Raises:
        UsageError: more MLPs than there are.
    """
    import pandas as pd

    target: Any = getattr(model, "target", model)
    counts = [counts] if isinstance(counts, int) else list(counts)
    check_count("sets", sets)
    check_seed(seed)
    heads, mlps = (target.layout.of_kind(kind) for kind in ("head", "mlp"))
    for count in counts:
        check_count("count", count, most=min(len(mlps), len(heads)))
    if not counts or not methods:
        raise UsageError("give at least one count and one method")
    each_head, each_mlp = (parameter_count(target, [kind[0]]) for kind in (heads, mlps))
    whole = sum(p.numel() for p in target.hf.parameters())
    rng = np.random.default_rng(seed)
    # ablations read no shared prefix apart: neither does what they are compared with
    base = gold_scores(target, task, batch_size, share_prefix=False)
    plans: list[dict[str, Any]] = []
    for count in counts:
        alike = min(len(heads), max(1, round(count * each_mlp / each_head)))
        for kind, matched, candidates, size in (
            ("mlp", "both", mlps, count),
            ("head", "modules", heads, count),
            ("head", "parameters", heads, alike),
        ):
            for at, names in enumerate(_random_sets(candidates, size, sets, rng)):
                plans.append({"kind": kind, "matched": matched, "count": count, "set": at, "names": names})
    rows = []
    for method in methods:
        for plan in track(plans, f"{method} ablations", progress):
            given = None if method == "zero" else reference
            with Ablation(plan["names"], method, given, positions, seed).applied(target):
                correct, log_probability = gold_scores(target, task, batch_size)
            parameters = len(plan["names"]) * (each_mlp if plan["kind"] == "mlp" else each_head)
            row = {"method": method, **plan, "modules": len(plan["names"]), "names": " ".join(plan["names"])}
            row |= {"parameters": parameters, "share": parameters / whole}
            row |= {"accuracy": correct.mean(), "log_probability": log_probability.mean()}
            row["accuracy_change"] = correct.mean() - base[0].mean()
            row["log_probability_change"] = log_probability.mean() - base[1].mean()
            rows.append(row)
    return pd.DataFrame(rows)


def _random_sets(candidates: list[str], size: int, n: int, rng: np.random.Generator) -> list[list[str]]:
    """Different random sets of one size, each in the order of the candidates."""
    found: dict[tuple[int, ...], list[str]] = {}
    while len(found) < min(n, comb(len(candidates), size)):
        chosen = tuple(sorted(rng.choice(len(candidates), size, replace=False).tolist()))
        found.setdefault(chosen, [candidates[i] for i in chosen])
    return list(found.values())
