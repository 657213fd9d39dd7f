"""The whole analysis of shifts between two models as one folder: tables, figures and a page.

A folder holds ``config.yaml``, ``environment.json``, ``compatibility.csv``, ``shifts.parquet`` (every value),
``table.csv`` (tests), ``consistency.csv``, ``concentration.csv``, ``stability.csv``, ``summary.md`` and ``figures/``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mechtransplant.activations import Positions, Text
from mechtransplant.errors import UnknownNameError, UsageError, check_count, check_seed
from mechtransplant.experiment.cells import write_atomically
from mechtransplant.experiment.drawing import draw
from mechtransplant.experiment.folder import begin, check_begun, locked, write_compatibility
from mechtransplant.localization import (
    FEWEST_TO_HALVE,
    concentration,
    consistency,
    refuse_overlap,
    topk_stability,
)
from mechtransplant.pair import Pair, load_pair
from mechtransplant.shifts import average_by_template, measure_shifts, shifts_and_vectors
from mechtransplant.shifts.recorder import SLOT_KINDS
from mechtransplant.significance import CORRECTIONS, NORMS, SIGNED, test_shifts
from mechtransplant.tasks import Task, load_task

if TYPE_CHECKING:
    import pandas as pd

#: what is measured; the seed paper's `lae` is a rule, and its absolute values have no direction to test
_DIRECT = ("magnitude", "distance", "own", "inherited")
_NORMS = tuple(m for m in _DIRECT if m in NORMS)


@dataclass(frozen=True)
class ShiftConfig:
    """What is measured: a pair, its task (by default the pair's own), and control prompts of another task, if any.

    ``text``: with ``positions`` "decoding", whose text both models read. ``permutations``: of every test.
    ``unit`` "template" averages over the prompts that share one before anything is tested; directions, which compare
    prompts with each other, are then left out.
    """

    pair: str
    task: str | None = None
    control: str | None = None
    prompts: int = 64
    unit: Literal["prompt", "template"] = "prompt"
    positions: Positions = "answer"
    kinds: tuple[str, ...] = ("head", "mlp")
    correction: str = "max-t"
    k: int = 8
    batch_size: int = 16
    seed: int = 0
    text: Text = "target"
    permutations: int = 10_000


def report_shifts(config: ShiftConfig, folder: str | Path, progress: bool = True) -> str:
    """Measure, test and draw; writes the folder and returns its page.

    Questions are the ``discover`` split, so that ``choose`` and ``test`` stay untouched. A folder of the same config,
    weights and questions, finished or killed, is written again. Raises UsageError, before anything is written, for a
    folder that holds anything else, and for anything wrong in the config.
    """
    folder = Path(folder)
    # before any weights are loaded
    if config.correction not in CORRECTIONS:
        raise UnknownNameError("correction", config.correction, CORRECTIONS)
    check_seed(config.seed)
    if config.unit not in ("prompt", "template"):
        raise UnknownNameError("unit", config.unit, ("prompt", "template"))
    refuse_overlap(config.kinds)
    for key, least in {"prompts": 8, "k": 1, "batch_size": 1, "permutations": 100}.items():
        check_count(key, getattr(config, key), least=least)
    if config.text != "target" and config.positions != "decoding":
        raise UsageError(f"--text is whose text is read with --positions decoding; positions are {config.positions!r}")
    pair = load_pair(config.pair)
    name = config.task or pair.default_task
    if name is None:
        raise UsageError(f"pair {config.pair!r} has no task of its own: give --task")
    task, control = _questions(name, config), None if config.control is None else _questions(config.control, config)
    began = {"config": json.loads(json.dumps(asdict(config))), **_depends_on(pair, task, control)}
    check_begun(folder, began)
    options: dict[str, Any] = {
        "positions": config.positions, "text": config.text, "batch_size": config.batch_size, "progress": progress,
    }  # fmt: skip
    modules = [m for kind in config.kinds if kind in SLOT_KINDS for m in pair.modules(kind)]
    if modules and config.k > len(modules):
        raise UsageError(f"k must be at most {len(modules)}, the number of modules, got {config.k}")
    against, vectors = None, None
    if config.unit == "template":
        shifts = average_by_template(measure_shifts(pair, task, config.kinds, _DIRECT, **options), task)
    else:
        wanted = (*_DIRECT, "projection")
        shifts, vectors = shifts_and_vectors(pair, task, config.kinds, wanted, seed=config.seed, **options)
    if control is not None:
        against = measure_shifts(pair, control, config.kinds, _DIRECT, **options)
        against = average_by_template(against, control) if config.unit == "template" else against
    own = shifts[shifts.measure == "own"].groupby("module", observed=True)["value"].max()
    # on a clean planted pair fewer modules than k change at all
    k = min(config.k, int((own > 0).sum()))
    tables = {
        "table": _tested(shifts, against, config),
        "consistency": consistency(shifts[shifts.measure == "magnitude"], vectors, seed=config.seed),
        "concentration": _concentrated(shifts, config),
    }
    if k and shifts.prompt.nunique() >= FEWEST_TO_HALVE:
        tables["stability"] = topk_stability(shifts, k, "own", seed=config.seed).frequency.assign(k=k)
    with locked(folder):
        begin(folder, began)
        write_compatibility(folder, pair)
        # the page is written last: without it the folder is not finished
        (folder / "summary.md").unlink(missing_ok=True)
        temporary = folder / ".shifts.tmp"
        shifts.to_parquet(temporary, index=False)
        temporary.replace(folder / "shifts.parquet")
        for key, frame in tables.items():
            write_atomically(folder / f"{key}.csv", frame.to_csv(index=False, float_format="%.8g"))
        draw(folder)
        page = summarise(pair, task, control, shifts, tables, config)
        write_atomically(folder / "summary.md", page)
    return page


def _questions(name: str, config: ShiftConfig) -> Task:
    return load_task(name).split(config.prompts, 1, 1, config.seed).discover


def _tested(shifts: pd.DataFrame, against: pd.DataFrame | None, config: ShiftConfig) -> pd.DataFrame:
    """Every test that is valid, one family each: magnitude, projection, and task against control."""
    import pandas as pd

    signed = [m for m in SIGNED if (shifts.measure == m).any()]
    how: dict[str, Any] = {
        "correction": config.correction, "permutations": config.permutations, "seed": config.seed,
    }  # fmt: skip
    tables = [test_shifts(shifts, measure=m, **how) for m in signed]
    if against is not None:
        tables += [test_shifts(shifts, against, m, **how) for m in _DIRECT]
    return pd.concat(tables, ignore_index=True)


def _concentrated(shifts: pd.DataFrame, config: ShiftConfig) -> pd.DataFrame:
    """How concentrated every norm is that is above 0 anywhere; raises UsageError where none is."""
    import pandas as pd

    above = shifts[shifts.value > 0].measure
    measures = [m for m in _NORMS if (above == m).any()] or _NORMS
    each = [concentration(shifts, m, config.k, seed=config.seed).assign(measure=m) for m in measures]
    return pd.concat(each, ignore_index=True)


def _depends_on(pair: Pair, task: Task, control: Task | None) -> dict[str, Any]:
    tasks = {"task": task, "control": control}
    return {
        "weights": {"source": pair.source.fingerprint, "target": pair.target.fingerprint},
        "questions": {k: {"n": len(t), "fingerprint": t.fingerprint} for k, t in tasks.items() if t is not None},
    }


def summarise(
    pair: Pair,
    task: Task,
    control: Task | None,
    shifts: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    config: ShiftConfig,
) -> str:
    """The page, in Markdown."""
    import pandas as pd

    table = tables["table"]
    modules = shifts.module.nunique()
    said = "" if control is None else f" against {len(control)} control prompts of `{control.name}`"
    forms = len({e.template for e in task})
    unit = f"the unit is the template, of which there are {forms}"
    if config.unit == "prompt":
        unit = f"the unit is the prompt; they share {forms} templates (`--unit template` makes those the unit)"
    whose = {"target": "the target's text", "source": "the source's text", "gold": "the gold answer"}[config.text]
    read = f" ({whose})" if config.positions == "decoding" else ""
    lines = [
        f"# Shifts of {pair.name or config.pair} on {task.name}",
        "",
        f"Source `{pair.source.name}`, target `{pair.target.name}`; {modules} modules ({', '.join(config.kinds)}), "
        f"{len(task)} prompts{said}, positions `{config.positions}`{read}, {config.correction} at 0.05; {unit}.",
        "",
        "| measure | test | n | modules found | largest effects: Cohen's d (mean in the measure's units) |",
        "|---|---|---|---|---|",
    ]
    for (measure, test), rows in table.groupby(["measure", "test"], sort=False):
        found = rows[rows.p_adjusted <= 0.05]
        first = found.reindex(found.effect_size.abs().sort_values(ascending=False).index).head(5)
        each = zip(first.module, first.effect_size, first.effect, strict=True)
        names = ", ".join(f"{m} {d:+.1f} ({mean:+.2g})" for m, d, mean in each)
        lines.append(f"| {measure} | {test} | {int(rows.n.max())} | {len(found)} of {len(rows)} | {names or '–'} |")
    lines += [
        "",
        "A large d says that a shift is alike on every prompt, not that it is large: the mean stands beside it.",
    ]
    head = ["measure", "statistic", "value", "less its bias", "95 % interval", "by chance", "p"]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in tables["concentration"].to_dict("records"):
        top = f" (k = {row['k']})" if row["statistic"] == "top_k_share" else ""
        what = str(row["statistic"]).replace("_", " ") + top
        interval = "–" if pd.isna(row["low"]) else f"{row['low']:.3g} – {row['high']:.3g}"
        numbers = [f"{row['value']:.3g}", f"{row['corrected']:.3g}", interval, f"{row['null']:.3g}", f"{row['p']:.2g}"]
        lines.append(f"| {row['measure']} | {what} | {' | '.join(numbers)} |")
    lines += [
        "",
        "p says that prompts agree on which modules shift most; how concentrated that is, only the value says.",
    ]
    nowhere = [m for m in _NORMS if not (tables["concentration"].measure == m).any()]
    lines += [f"No module's `{m}` is above 0 on any prompt: of it there is nothing to localise." for m in nowhere]
    consistent, sure = tables["consistency"], tables.get("stability")
    if "alignment" in consistent.columns:
        lines += [
            "",
            f"Alignment with the other prompts: median {consistent.alignment.median():.2f} over modules, "
            f"{int((consistent.alignment_p <= 0.05).sum())} of {modules} above the null at p ≤ 0.05 (not adjusted).",
        ]
    if sure is not None:
        k = int(sure.k.iloc[0])
        fewer = "" if k == config.k else f" (no more than {k} of {modules} modules have any)"
        often = int((sure.frequency >= 0.95).sum())
        lines += [
            "",
            f"The {k} largest own shifts{fewer}: {often} modules are among them in at least 95 % of resamples.",
        ]
    if pair.planted and sure is not None:
        largest = list(sure.module[: len(pair.planted)])
        lines.append(
            f"Planted: {', '.join(pair.planted)}; {len(set(largest) & set(pair.planted))} of them are among the "
            f"{len(pair.planted)} largest own shifts."
        )
    notes = table.note[table.note != ""]
    if len(notes):
        lines.append(
            f"{len(notes)} rows of `table.csv` have a note on what to beware of, for example: {notes.iloc[0]}."
        )
    return "\n".join(lines) + "\n"
