"""Recipes on ``choose``: what each gains with a share of the parameters, by kind and rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, PAGE, PURPLE, SKY, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_LOOKS = tuple(zip((BLUE, ORANGE, GREEN, PURPLE, BLACK, SKY), "os^DvX", ("-", "--", "-.", ":", "-", "--"), strict=True))
#: how many rules stay legible in a panel
MOST = 6


def recipe_curves(rows: pd.DataFrame, title: str = "") -> tuple[Figure, Any]:
    """Log-probability of the gold answer against the share of parameters, a panel a kind and a line a rule.

    Every point is the best strength and operator of its rule and share; of more than six rules, the six that reach
    highest are drawn, and the paper's ``lae`` in place of the last of them where it is not one of them.

    Args:
        rows: columns kind, rule, strength, share, parameters, log_probability, as ``screen.csv`` has them; the models'
            own are drawn where target_log_probability and source_log_probability are columns.
    """
    lacking = [c for c in ("kind", "rule", "share", "parameters", "log_probability") if c not in rows.columns]
    if lacking or not rows.log_probability.notna().any():
        raise UsageError(f"the frame lacks {', '.join(lacking) or 'measured recipes'}: pass a screen.csv")
    measured = rows[rows.log_probability.notna()]
    best = measured.loc[measured.groupby(["kind", "rule", "share"], sort=False).log_probability.idxmax()]
    reached = best.groupby("rule").log_probability.max().sort_values(ascending=False)
    rules, kinds = list(reached.index[:MOST]), list(dict.fromkeys(best.kind))
    if "lae" in reached and "lae" not in rules:
        rules[-1] = "lae"
    across = min(4, len(kinds))
    down = -(-len(kinds) // across)
    with style():
        figure, grid = new_figure(PAGE, 0.7 + 0.2 * bool(title) + 1.6 * down, columns=across, rows=down)
        panels = list(np.atleast_1d(grid).flat)
        for panel in panels[len(kinds) :]:
            panel.remove()
        for at, (panel, kind) in enumerate(zip(panels, kinds, strict=False)):
            for rule, (colour, marker, dashes) in zip(rules, _LOOKS, strict=False):
                line = best[(best.kind == kind) & (best["rule"] == rule)].sort_values("parameters")
                panel.plot(
                    100 * line.parameters, line.log_probability, color=colour, marker=marker, linestyle=dashes,
                    markersize=3, linewidth=0.9, label=rule,
                )  # fmt: skip
            for role, dashes in (("target", ":"), ("source", "--")):
                if f"{role}_log_probability" in rows:
                    height = float(rows[f"{role}_log_probability"].iloc[0])
                    panel.axhline(height, color=GREY, linestyle=dashes, linewidth=0.8, label=role)
            panel.set_title(kind.replace("+", " and "))
            panel.set_xlabel("parameters, %")
            if at % across == 0:
                panel.set_ylabel("log p(gold answer), nats")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        said = "choose questions, best strength and operator"
        figure.suptitle(f"{title}: {said}" if title else said)
    return figure, panels[: len(kinds)]
