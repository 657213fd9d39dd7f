"""The page of the study heads against MLPs: every number is computed from its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.evaluation import Evaluation
from mechtransplant.experiment.heads_mlps_sets import ARMS, DEPTHS, MATCHES, NAMES, NEAR, mlps
from mechtransplant.experiment.words import row_of
from mechtransplant.pair import Pair

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.heads_mlps import HeadsMlpsConfig


def page_of(
    config: HeadsMlpsConfig,
    pair: Pair,
    target: Evaluation,
    source: Evaluation,
    table: pd.DataFrame,
    left_out: Sequence[str],
) -> str:
    """The page, in Markdown."""
    counts = ", ".join(map(str, config.counts))
    ablation = ""
    if config.methods:
        how = " or ".join(config.methods)
        ablation = f"; an *ablation* ({how}) takes the same modules out of the source"
    lines = [
        f"# Heads against MLPs: {pair.name} on {source.task}",
        "",
        f"Source `{pair.source.name}` ({source.accuracy:.1%}), target `{pair.target.name}` ({target.accuracy:.1%}); "
        f"{len(source)} `test` questions. Heads, MLPs, and both together (`mixed`) are ranked by `{config.rule}` on "
        f"{config.discover} `discover` questions; every arm takes the first of its ranking, at the number or at the "
        f"parameters of {counts} MLPs. A *graft* puts the source's weights into the target (K/V `{config.kv}`)"
        f"{ablation}. Changes are against the model that was changed, with 95 % paired intervals: accuracy in "
        "percentage points, the gold answer's log-probability in nats.",
        "",
        *_sentences(table),
        "",
        "## Anywhere in the model",
        "",
        *_whole(table, config.sets),
        "",
        "## Within a third of the depth",
        "",
        *_thirds(table),
        "",
        *_caveats(config, table, left_out),
    ]
    return "\n".join(lines) + "\n"


def _verb(intervention: str, method: str) -> str:
    return "grafting" if intervention == "graft" else f"{method}-ablating"


def _interventions(table: pd.DataFrame) -> list[tuple[str, str]]:
    return list(dict.fromkeys(zip(table.intervention, table.method, strict=True)))


def _sentences(table: pd.DataFrame) -> list[str]:
    """What each intervention did at the largest count among those with the most arms, and by depth."""
    lines = []
    for intervention, method in _interventions(table):
        mine = table[(table.intervention == intervention) & (table.method == method)]
        for match in MATCHES[::-1]:
            rows = mine[(mine.depth == "all") & (mine.match == match)]
            if len(rows):
                arms = rows["count"].value_counts()
                count = max(arms[arms == arms.max()].index)
                at = f"the parameters of {mlps(count)}" if match == "parameters" else _modules(count)
                said = [_arm_said(row, match) for row in _records(rows[rows["count"] == count])]
                lines.append(f"- At {at}, {_verb(intervention, method)} changes accuracy by {'; '.join(said)}.")
        smallest = mine["count"].min()
        rows = mine[(mine.depth != "all") & (mine.match == "modules") & (mine["count"] == smallest)]
        parts = []
        for arm in ("head", "mlp"):
            found = rows[(rows.arm == arm) & rows.log_probability_change.notna()]
            values = [f"{row['depth']} {_nats(row['log_probability_change'])}" for row in _records(found)]
            if values:
                parts.append(f"{_named(arm, smallest)} {', '.join(values)}")
        if parts:
            lines.append(
                f"- By third, {_modules(smallest)}: {_verb(intervention, method)} changes the answer's log-probability "
                f"by, in nats, {'; '.join(parts)}."
            )
    return lines


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


def _named(arm: str, size: int) -> str:
    """What a set of that size is made of."""
    return NAMES[arm][:-1] if size == 1 and arm != "mixed" else NAMES[arm]


def _arm_said(row: dict[str, Any], match: str) -> str:
    size = f"{row['modules']} {_named(row['arm'], row['modules'])}"
    if row["arm"] == "mixed":
        size = f"{row['modules']} from the mixed ranking"
    if match == "parameters" and abs(row["near"] - 1) >= 0.005:
        size += f", {row['near']:.0%} of those parameters"
    random = "there is no other set to compare with"
    if row["random_sets"]:
        random = (
            f"random sets: median {_points(row['random_median'])}, beats {row['beaten']:.0f} of {row['random_sets']}"
        )
    return f"{_points(row['accuracy_change'])} points ({size}; {random})"


def _points(change: float) -> str:
    return f"{100 * change:+.1f}"


def _nats(change: float) -> str:
    return f"{change:+.2f}"


def _p(value: Any) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.3f}"


def _whole(table: pd.DataFrame, sets: int) -> list[str]:
    lines = [
        f"Random: median and range of the changes of up to {sets} random sets of the same kinds and parameters; "
        "*beats*: how many of them the set beats (a graft by a larger gain, an ablation by a larger loss).",
        "",
        "| intervention | equal | MLPs | arm | modules | share | accuracy, points | random | beats | p | log p, nats | "
        "random | p |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in _records(table[table.depth == "all"]):
        what = "graft" if row["intervention"] == "graft" else f"{row['method']} ablation"
        near = "" if row["match"] == "modules" or abs(row["near"] - 1) < 0.005 else f" ({row['near']:.0%})"
        accuracy = (
            f"{_points(row['accuracy_change'])} [{_points(row['accuracy_low'])}, {_points(row['accuracy_high'])}]"
        )
        random, log_random, beats = "none", "none", "–"
        if row["random_sets"]:
            random = _range(row, "random_", _points)
            beats = f"{row['beaten']:.0f} of {row['random_sets']}"
        log_p = "–"
        if not _missing(row["log_probability_change"]):
            ends = [_nats(row[f"log_probability_{end}"]) for end in ("change", "low", "high")]
            log_p = f"{ends[0]} [{ends[1]}, {ends[2]}]"
        if not _missing(row["random_log_probability_median"]):
            log_random = _range(row, "random_log_probability_", _nats)
        cells = [what, f"{row['match']}{near}", row["count"], row["arm"], row["modules"], f"{row['share']:.1%}"]
        cells += [accuracy, random, beats, _p(row["p"]), log_p, log_random, _p(row["p_log_probability"])]
        lines.append(row_of(cells))
    return lines


def _missing(value: Any) -> bool:
    return value is None or bool(np.isnan(value))


def _range(row: dict[str, Any], ends: str, said: Any) -> str:
    median, low, high = (said(row[f"{ends}{end}"]) for end in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _thirds(table: pd.DataFrame) -> list[str]:
    """One row an intervention, match, count and arm; a cell has both changes and the two p."""
    keys = ["intervention", "method", "match", "count", "arm"]
    rows = table[table.depth != "all"]
    if not len(rows):
        return ["No third has candidates enough."]
    cells = {(*(r[k] for k in keys), r["depth"]): r for r in _records(rows)}
    lines = [
        "Accuracy in points / log-probability in nats, and the p of both among random sets of the same third.",
        "",
        "| intervention | equal | MLPs | arm | early | middle | late |",
        "|---|---|---|---|---|---|---|",
    ]
    order = {arm: at for at, arm in enumerate(ARMS)}
    first = {(row["intervention"], row["method"]): at for at, row in reversed(list(enumerate(_records(rows))))}
    by = sorted({c[:-1] for c in cells}, key=lambda key: (first[key[:2]], *key[2:4], order[key[4]]))
    for key in by:
        intervention, method, match, count, arm = key
        what = "graft" if intervention == "graft" else f"{method} ablation"
        said = [_third(cells.get((*key, depth))) for depth in DEPTHS[1:]]
        lines.append(f"| {what} | {match} | {count} | {arm} | {' | '.join(said)} |")
    return lines


def _third(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    log_p = "–" if _missing(row["log_probability_change"]) else _nats(row["log_probability_change"])
    ranks = f"p {_p(row['p'])} / {_p(row['p_log_probability'])}" if row["random_sets"] else "no random set"
    return f"{_points(row['accuracy_change'])} / {log_p}; {ranks}"


def _caveats(config: HeadsMlpsConfig, table: pd.DataFrame, left_out: Sequence[str]) -> list[str]:
    once = table.assign(members=[" ".join(sorted(n.split())) for n in table.names])
    once = once.drop_duplicates(["intervention", "method", "depth", "members"])
    tested = once[once.random_sets > 0]
    few = int((tested.random_sets < config.sets).sum())
    without = len(once) - len(tested)
    small = int((tested.p <= 0.05).sum())
    adjusted = int((tested.p_adjusted <= 0.05).sum())
    # where the floor of p is above 0.05 no set could have been among the small ones
    able = int((1 / (1 + tested.random_sets) <= 0.05).sum())
    lines = [
        "## How to read it",
        "",
        f"- Nothing was chosen: all {len(table)} rows are in `study.csv`, {len(once)} of them different. p are "
        "one-sided permutation p among random sets, (1 + how many do as well) / (1 + how many there are), and are "
        f"**not adjusted** in these tables. Of {len(tested)} different ones in accuracy, {small} are at most 0.05 "
        f"({able} could be: p is never below 1 / (1 + random sets)); after Benjamini–Hochberg over all of them "
        f"(`p_adjusted`), {adjusted}.",
        f"- {few} of those {len(tested)} sets have fewer than {config.sets} others of their make-up, and are compared "
        f"with all there are; {without} sets have none, and no p.",
        "- Random sets are matched in kind and parameters; in depth by thirds of the layers where that leaves 1000 "
        "sets, else by halves, else not (`random_depth`); within a third they come from that third.",
        "- `mixed` at equal parameters goes down the ranking until the budget is used and passes over what no longer "
        "fits; it may come out as heads alone, or as MLPs alone (`names`). `near` is a set's parameters over the "
        "budget.",
    ]
    if config.kv != "never":
        lines.append(
            f"- Parameters count the K and V that heads bring under `{config.kv}`; random sets are matched without "
            "them."
        )
    if left_out:
        lines.append(
            f"- Left out, because there are too few modules or none within {NEAR:.0%} of the parameters: "
            f"{'; '.join(left_out)}."
        )
    missing = [NAMES[arm] for arm in ARMS if not (table.arm == arm).any()]
    if missing:
        lines.append(f"- No set of {', '.join(missing)} could be made.")
    lines.append(
        "- A graft's gain says that modules suffice in the target, an ablation's loss that the source needs them: a "
        "module that every skill needs is lost as well, which random sets show only where such modules are among them."
    )
    return lines
