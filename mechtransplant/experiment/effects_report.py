"""Patch against graft for every head and MLP of a pair, as one folder that a killed start continues.

A folder holds ``config.yaml``, ``environment.json``, ``compatibility.csv``, ``cells.jsonl`` (finished layers),
``effects.csv``, ``summary.md`` and ``figures/``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UnknownNameError, UsageError, check_count, check_seed
from mechtransplant.evaluation.outcome import SMALL
from mechtransplant.experiment.cells import CellStore, cell_key, write_atomically
from mechtransplant.experiment.drawing import draw
from mechtransplant.experiment.folder import begin, locked, write_compatibility
from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import parse_address
from mechtransplant.pair import Pair, load_pair
from mechtransplant.patching import HeadPoint, Patch, patch_versus_graft
from mechtransplant.progress import track
from mechtransplant.significance.effects import FEWEST
from mechtransplant.tasks import Task, load_task

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("head", "mlp", "attn")
#: modules that are measured together, about: both models are read again for every group, and a kill loses one
TOGETHER = 40


@dataclass(frozen=True)
class EffectsConfig:
    """What is moved: a pair, its task (by default the pair's own), kinds of modules; see :func:`patch_versus_graft`."""

    pair: str
    task: str | None = None
    prompts: int = 64
    kinds: tuple[str, ...] = ("head", "mlp")
    heads: HeadPoint = "result"
    kv: KV = "never"
    batch_size: int = 32
    seed: int = 0


def report_effects(config: EffectsConfig, folder: str | Path, progress: bool = True) -> str:
    """Measure and draw; writes the folder and returns its page.

    Questions are the ``discover`` split. Raises UsageError for anything wrong in the config, for a folder that holds
    something else, and for one that was begun with another config or other weights.
    """
    folder = Path(folder)
    check_seed(config.seed)
    for key in ("prompts", "batch_size"):
        check_count(key, getattr(config, key))
    for kind in config.kinds:
        if kind not in KINDS:
            raise UnknownNameError("kind of module", kind, KINDS)
    # before any weights are loaded
    Patch([], heads=config.heads)
    Graft([], kv=config.kv)
    pair = load_pair(config.pair)
    name = config.task or pair.default_task
    if name is None:
        raise UsageError(f"pair {config.pair!r} has no task of its own: give --task")
    task = load_task(name).split(config.prompts, 1, 1, config.seed).discover
    began = {"config": json.loads(json.dumps(asdict(config))), **_depends_on(pair, task)}
    with locked(folder):
        begin(folder, began)
        write_compatibility(folder, pair)
        table = _measure(config, pair, task, CellStore(folder / "cells.jsonl"), progress)
        write_atomically(folder / "effects.csv", table.to_csv(index=False, float_format="%.8g"))
        draw(folder)
        page = summarise(config, pair, task, table)
        write_atomically(folder / "summary.md", page)
    return page


def _depends_on(pair: Pair, task: Task) -> dict[str, Any]:
    return {
        "weights": {"source": pair.source.fingerprint, "target": pair.target.fingerprint},
        "questions": {"n": len(task), "fingerprint": task.fingerprint},
    }


def _measure(config: EffectsConfig, pair: Pair, task: Task, store: CellStore, progress: bool) -> pd.DataFrame:
    """Every module; a finished layer is a cell, and neighbouring layers are measured together."""
    import pandas as pd

    modules = [m for kind in config.kinds for m in pair.modules(kind)]  # type: ignore[arg-type]
    layers = [[m for m in modules if parse_address(m).layer == layer] for layer in range(pair.layout.layers)]
    depends = {**_depends_on(pair, task), **asdict(config)}
    keys = [cell_key({**depends, "modules": inside}) for inside in layers]
    for group in track(_groups(layers, [key in store.cells for key in keys]), "groups of layers", progress):
        wanted = [m for layer in group for m in layers[layer]]
        table = patch_versus_graft(
            pair, task, wanted, heads=config.heads, kv=config.kv, batch_size=config.batch_size, seed=config.seed
        )
        for layer in group:
            rows = table[table.module.isin(layers[layer])].to_json(orient="records", double_precision=15)
            store.put(keys[layer], {"rows": json.loads(rows), "models": table.attrs})
    cells = [store.cells[key] for key in keys]
    table = pd.concat([pd.DataFrame(cell["rows"]) for cell in cells], ignore_index=True)
    # in JSON an end that is not known is null
    table = table.astype({f"{what}_{end}": float for what in ("patch", "graft") for end in ("low", "high")})
    table.attrs.update(cells[-1]["models"])
    return table


def _groups(layers: Sequence[Sequence[str]], finished: Sequence[bool]) -> list[list[int]]:
    """The numbers of the layers that are not finished, in groups of neighbours."""
    groups: list[list[int]] = []
    for layer, done in enumerate(finished):
        if done:
            continue
        if groups and sum(len(layers[at]) for at in groups[-1]) < TOGETHER:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def summarise(config: EffectsConfig, pair: Pair, task: Task, table: pd.DataFrame) -> str:
    """The page, in Markdown."""
    from scipy import stats

    target, source = (table.attrs[role] for role in ("target", "source"))
    gap = source["log_probability"] - target["log_probability"]
    lines = [
        f"# Patch against graft: {pair.name} on {task.name}",
        "",
        f"Source `{pair.source.name}`, target `{pair.target.name}`; {len(table)} modules ({', '.join(config.kinds)}), "
        f"each moved alone, {len(task)} `discover` prompts; heads by `{config.heads}`, K/V `{config.kv}`. Effects are "
        "changes of the gold answer's log-probability, in nats, with 95 % bootstrap intervals over prompts.",
        "",
        f"The source gives the gold answer {source['log_probability']:.2f} nats on average, the target "
        f"{target['log_probability']:.2f}: a gap of {gap:.2f}.",
        "",
        "| kind | n | interval above 0: patch | graft | both | rank correlation of the two |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(table.kind):
        rows = table[table.kind == kind]
        helps = {what: rows[f"{what}_low"] > 0 for what in ("patch", "graft")}
        agree = stats.spearmanr(rows.patch_effect, rows.graft_effect).statistic if len(rows) > 2 else float("nan")
        both = int((helps["patch"] & helps["graft"]).sum())
        counts = f"{int(helps['patch'].sum())} | {int(helps['graft'].sum())} | {both}"
        lines.append(f"| {kind} | {len(rows)} | {counts} | {agree:.2f} |")
    lines += ["", "| module | patch | graft |", "|---|---|---|"]
    order = table[["patch_effect", "graft_effect"]].abs().max(axis=1).sort_values(ascending=False).index
    for row in table.loc[order[:12]].itertuples():
        patch, graft = (
            f"{getattr(row, f'{what}_effect'):+.3f}"
            + f" [{getattr(row, f'{what}_low'):+.3f}, {getattr(row, f'{what}_high'):+.3f}]" * (len(task) >= FEWEST)
            for what in ("patch", "graft")
        )
        planted = " (planted)" if row.module in pair.planted else ""
        lines.append(f"| {row.module}{planted} | {patch} | {graft} |")
    lines += ["", "The twelve largest effects of either kind; `effects.csv` has all. Intervals are one module's own."]
    if len(task) < FEWEST:
        lines += ["", f"{len(task)} prompts are too few for intervals: no effect is known to be above 0."]
    elif len(task) < SMALL:
        lines += ["", f"{len(task)} prompts are few: their bootstrap intervals are too narrow."]
    return "\n".join(lines) + "\n"
