"""Moving activations beside moving weights, module by module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.labels import name_points
from mechtransplant.figures.shifts import MARKERS, NAMES
from mechtransplant.figures.style import BLUE, COLUMN, GREY, ORANGE, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def patch_versus_graft_plot(
    table: pd.DataFrame, marked: Iterable[str] = (), names: int = 6, title: str = ""
) -> tuple[Figure, Any]:
    """Effect of a module's graft (x) against that of its patch (y), in nats, with 95 % intervals; heads and MLPs.

    On the diagonal moving what a module says equals moving its weights; above it the signal passes through, computed
    earlier; right of it the weights act on what the target gives them.

    Args:
        table: from :func:`patch_versus_graft`.
        marked: modules in another colour, for example a planted set.
        names: how many modules with the largest effects of either kind are named.
    """
    ends = [f"{what}_{end}" for what in ("patch", "graft") for end in ("effect", "low", "high")]
    lacking = [c for c in ("module", "kind", *ends) if c not in getattr(table, "columns", [])]
    if lacking:
        raise UsageError(f"the frame lacks the columns {', '.join(lacking)}: pass patch_versus_graft(…)")
    if not len(table):
        raise UsageError("the frame has no rows: there is nothing to draw")
    frame = table.reset_index(drop=True)
    given = [marked] if isinstance(marked, str) else list(marked)
    strange = sorted(set(given) - set(frame.module))
    if strange:
        raise UsageError(f"marked names {strange[0]}, which the table does not have: mark modules that were moved")
    chosen = frame.module.isin(given).to_numpy()
    with style():
        figure, axes = new_figure(COLUMN, 2.9)
        x, y = frame.graft_effect.to_numpy(), frame.patch_effect.to_numpy()
        for axis in (axes.axhline, axes.axvline):
            axis(0, color=GREY, linewidth=0.5)
        axes.axline((0, 0), slope=1, color=GREY, linewidth=0.6, linestyle=":")
        for kind in dict.fromkeys(frame.kind):
            for special, colour in ((False, BLUE), (True, ORANGE)):
                rows = ((frame.kind == kind) & (chosen == special)).to_numpy()
                if not rows.any():
                    continue
                label = NAMES[kind] + (", marked" if special else "")
                spread = {
                    "xerr": np.abs(frame.loc[rows, ["graft_low", "graft_high"]].to_numpy().T - x[rows]),
                    "yerr": np.abs(frame.loc[rows, ["patch_low", "patch_high"]].to_numpy().T - y[rows]),
                }
                axes.errorbar(
                    x[rows], y[rows], **spread, fmt=MARKERS[kind], color=colour, markersize=3, linewidth=0.4, alpha=0.8,
                    label=label,
                )  # fmt: skip
        axes.set_xlabel("graft: weights moved, Δ log p(answer), nats")
        axes.set_ylabel("patch: activations moved (nats)")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=2)
        # marked ones first: they have the choice of places
        sizes = [np.abs(v) / max(float(np.abs(v).max()), 1e-30) for v in (x, y)]
        largest = [int(i) for i in np.argsort(-np.maximum(*sizes), kind="stable")]
        planted = [i for i in largest if chosen[i]]
        name_points(axes, frame, x, y, [*planted, *[i for i in largest[:names] if not chosen[i]]])
    return figure, axes
