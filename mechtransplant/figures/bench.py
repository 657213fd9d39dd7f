"""How well rules find planted modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.style import BLACK, BLUE, GREY, ORANGE, PAGE, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_MARKERS = "os^DvP*Xh<>d"


def planted_benchmark(rows: pd.DataFrame) -> tuple[Figure, Any]:
    """AUROC and Recovery of every rule: one mark a pair (mean over seeds), a line at the mean over drifted pairs.

    Args:
        rows: columns pair, drifted, rule, seed, auroc, recovery (per cent), as ``bench_planted`` gives them.
    """
    lacking = [c for c in ("pair", "drifted", "rule", "auroc", "recovery") if c not in rows.columns]
    if lacking or not len(rows):
        raise UsageError(f"the frame lacks {', '.join(lacking) or 'rows'}: pass what bench_planted returns")
    means = rows.groupby(["rule", "pair", "drifted"], sort=False)[["auroc", "recovery"]].mean().reset_index()
    judged = means[means.drifted] if means.drifted.any() else means
    order = list(judged.groupby("rule").auroc.mean().sort_values(kind="stable").index)
    pairs = list(dict.fromkeys(means.pair))
    with style():
        figure, panels = new_figure(PAGE, 1.2 + 0.2 * len(order), columns=2)
        for panel, column, label in zip(panels, ("auroc", "recovery"), ("AUROC", "Recovery, %"), strict=True):
            chance = 0.5 if column == "auroc" else 0
            panel.axvline(chance, color=GREY, linewidth=0.6, linestyle=":")
            for index, pair in enumerate(pairs):
                mine = means[means.pair == pair].set_index("rule")[column]
                drifted = bool(means[means.pair == pair].drifted.iloc[0])
                y = np.array([order.index(r) for r in mine.index]) + (0.12 if drifted else -0.12)
                panel.plot(
                    mine.to_numpy(),
                    y,
                    _MARKERS[index % len(_MARKERS)],
                    color=ORANGE if drifted else BLUE,
                    markerfacecolor=ORANGE if drifted else "none",
                    markersize=3.2,
                    markeredgewidth=0.7,
                    linestyle="none",
                    label=pair if column == "auroc" else None,
                )
            for at, rule in enumerate(order):
                mean = judged[judged.rule == rule][column].mean()
                panel.plot([mean, mean], [at - 0.33, at + 0.33], color=BLACK, linewidth=1.4)
            panel.set_xlabel(label)
        panels[0].set_yticks(range(len(order)), order)
        panels[0].set_xlim(-0.03, 1.03)
        panels[0].set_ylim(-0.7, len(order) - 0.3)
        figure.legend(loc="outside lower center", ncols=3, fontsize=7)
        figure.suptitle(
            "filled: drifted pairs, hollow: clean; bar: mean over drifted pairs; dotted: chance", fontsize=8
        )
    return figure, panels
