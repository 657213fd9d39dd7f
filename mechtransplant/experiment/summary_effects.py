"""The part of a run's page about side effects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mechtransplant.experiment.words import head_of, interval_of, points, row_of
from mechtransplant.side_effects import pareto_front

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.run import Run


_FRONT = (
    "On a front: no other graft of this table gains as much at as little harm, one of them strictly; nor does the "
    "untouched target, of gain and harm 0."
)


def label_of(row: Mapping[Any, Any]) -> str:
    """A graft's name in figures and tables."""
    if row["role"] == "all":
        return f"all {row['k']}"
    return f"random {row['k']}" if row["role"] == "random" else f"{row['rule']} {row['k']}"


def side_effects_of(run: Run, plane: pd.DataFrame, effects: pd.DataFrame) -> list[str]:
    columns = ["graft", "gain (points)", "accuracy elsewhere (points)", "worst task (points)", "perplexity"]
    columns += ["KL (nats a token)", "on a Pareto front of"]
    tasks = ", ".join(dict.fromkeys(effects[effects.kind == "task"].what)) or "none"
    said = f"Other tasks: {tasks}. With 95 % intervals, paired.{_texts(run, effects)}"
    lines = ["", "## Side effects", "", said, "", *head_of(columns)]
    grafts = plane[plane.role != "random"]
    for graft in _with_fronts(grafts).to_dict("records"):
        own = effects[(effects.role == graft["role"]) & (effects.rule == graft["rule"]) & (effects.k == graft["k"])]
        # perplexity and KL of a graft that overflows are not known
        own = own.dropna(subset=["change"])
        lines.append(row_of(_cells_of({str(k): v for k, v in graft.items()}, own.to_dict("records"))))
    lines += ["", _FRONT]
    notes = dict.fromkeys(note for c in run.side_effects for note in c["notes"])
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    random = plane[plane.role == "random"]
    if len(random) and "harm" in plane:
        gain, kept = random.gain, -random.harm
        lines += [
            "",
            f"{len(random)} of the random sets: gain {points(gain.min())} to {points(gain.max())} points, accuracy "
            f"elsewhere {points(kept.min())} to {points(kept.max())} points{_random_texts(effects)}.",
        ]
    return lines


def _random_texts(effects: pd.DataFrame) -> str:
    """What random sets do to texts: a graft that beats them may also move the model further."""
    said = ""
    for what, form in (("perplexity", "{:+.1%}"), ("KL", "{:.3g}")):
        found = effects[(effects.role == "random") & (effects.what == what)].change.dropna()
        if len(found):
            said += f", {what} {form.format(found.min())} to {form.format(found.max())}"
    return said


def _texts(run: Run, effects: pd.DataFrame) -> str:
    """Which texts perplexity and KL are measured on."""
    read, spec = effects[effects.kind == "text"], run.config.side_effects
    if read.empty or spec is None:
        return ""
    n = int(read.n.max())
    if spec.file is not None:
        return f" Perplexity and KL: on {n} texts of {spec.file}."
    return f" Perplexity and KL: on {n} texts that the target wrote, so whatever changes its habits raises them."


def _cells_of(graft: dict[str, Any], effects: list[Any]) -> list[str]:
    gain, mean, worst, perplexity, kl = points(graft["gain"]), "–", "–", "–", "–"
    tasks = sorted((e for e in effects if e["kind"] == "task"), key=lambda e: e["change"])
    if tasks:
        gain += f" {interval_of((graft['gain_low'], graft['gain_high']), '')}"
        ends = (-graft["harm_high"], -graft["harm_low"])
        mean = f"{points(-graft['harm'])} {interval_of(ends, '')}"
        low = tasks[0]
        worst = f"{low['what']} {points(low['change'])} {interval_of((low['low'], low['high']), '')}"
    for read in (e for e in effects if e["kind"] == "text"):
        ends = (read["low"], read["high"])
        if read["what"] == "KL":
            kl = f"{read['change']:.3g} {interval_of(ends, '', 1)}"
        else:
            perplexity = f"{100 * read['change']:+.1f} % {interval_of(ends)}"
    return [label_of(graft), gain, mean, worst, perplexity, kl, graft["fronts"]]


def _with_fronts(grafts: pd.DataFrame) -> pd.DataFrame:
    """The grafts with a column ``fronts``: for which harms they are on the front."""
    named = {"harm": "gain and accuracy elsewhere", "kl": "gain and KL"}
    # a graft that overflows has no KL, and is on no front by it
    on = {
        harm: set(pareto_front(grafts[grafts[harm].notna()], harm=harm).query("front").index)
        for harm in named
        if harm in grafts
    }
    fronts = ["; ".join(named[harm] for harm in on if at in on[harm]) for at in grafts.index]
    return grafts.assign(fronts=fronts)
