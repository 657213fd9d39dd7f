"""The page of a screen: every number is computed from its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mechtransplant.experiment.words import row_of
from mechtransplant.pair import Pair

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.experiment.screen_config import ScreenConfig

#: recipes that the page names
SHOWN = 12


def page_of(
    config: ScreenConfig,
    pair: Pair,
    n: int,
    base: Mapping[str, Mapping[str, float | None]],
    table: pd.DataFrame,
    best: Any,
) -> str:
    """The page, in Markdown; ``best`` is the row of the best recipe, or None."""
    measured = table[table.log_probability.notna()]
    lines = [
        f"# Screen {config.name}: {pair.name or 'pair'}",
        "",
        f"Source `{pair.source.name}`, target `{pair.target.name}`; {len(table)} recipes, ranked on "
        f"{config.split.discover} `discover` questions and compared on {n} `choose` questions by the mean "
        f"log-probability of the gold answer (nats). Target {_said(base['target'])}, source {_said(base['source'])}. "
        "No `test` question was asked, so no number here is a result: the best recipe's is what a run of `best.yaml` "
        "reports.",
        "",
        _verdict(config, measured, best),
        "",
        "## The best recipes",
        "",
        "| kind | rule | operator | strength | K | parameters | log-probability | right | perplexity | KL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(row) for row in measured.nlargest(SHOWN, "log_probability").to_dict("records")]
    lines += [
        "",
        "## The best of every kind and rule",
        "",
        "| kind | rule | strength | K | parameters | log-probability |",
    ]
    lines.append("|---|---|---|---|---|---|")
    tops = measured.loc[measured.groupby(["kind", "rule"], sort=False).log_probability.idxmax()]
    for row in tops.sort_values("log_probability", ascending=False, kind="stable").to_dict("records"):
        lines.append(
            f"| {row['kind']} | `{row['rule']}` | {row['strength']:g} | {row['k']} | {row['parameters']:.1%} | "
            f"{row['log_probability']:.3f} |"
        )
    if config.counted == "changes":
        lines += [
            "",
            "Parameters are those that a graft changes, or that its directions take (low_rank); where an operator "
            "keeps a part of its modules' changes, the modules have more.",
        ]
    empty = len(table) - len(measured)
    if empty:
        lines += ["", f"{empty} recipes have no module: the first of their ranking is larger than the share."]
    return "\n".join(lines) + "\n"


def _said(found: Mapping[str, float | None]) -> str:
    right = found["accuracy"]
    # a certain answer has 0, not −0
    value = round(found["log_probability"] or 0.0, 3) + 0.0
    return f"{value:.3f}" + ("" if right is None else f" ({right:.1%} right)")


def _verdict(config: ScreenConfig, measured: pd.DataFrame, best: Any) -> str:
    if best is None:
        return "**No recipe** is within the limit of perplexity, or has any module."
    row = measured.loc[best]
    limit = (
        "" if config.perplexity is None else f" among those that raise perplexity by at most {config.perplexity:.1%}"
    )
    # counted as a graft's operator says
    changed = " (by what is changed, or taken by directions)" if config.counted == "changes" else ""
    return (
        f"**Best{limit}**: K = {row.k} ({row.kind}) by `{row['rule']}`, strength {row.strength:g}, {row.operator}, "
        f"{row.parameters:.1%} of the parameters{changed}: {row.log_probability:.3f} nats."
    )


def _row(row: Mapping[Any, Any]) -> str:
    found = ["–" if row[key] != row[key] else form.format(row[key]) for key, form in _FORMS.items()]
    cells = [row["kind"], f"`{row['rule']}`", row["operator"], f"{row['strength']:g}", row["k"]]
    cells += [f"{row['parameters']:.1%}", f"{row['log_probability']:.3f}", *found]
    return row_of(cells)


_FORMS = {"accuracy": "{:.1%}", "perplexity_change": "{:+.1%}", "kl": "{:.3g}"}
