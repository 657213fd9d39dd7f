"""Names beside points, none over another where there is a free place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

#: where a name may stand beside its point, in points: the first place that is free is taken
_PLACES = [(3, 3), (3, -8), (-3, 3), (-3, -8), (3, 10), (3, -15), (-3, 10), (-3, -15)]
_PLACES += [(3, 18), (3, -23), (-3, 18), (-3, -23)]


def name_points(axes: Any, rows: pd.DataFrame, x: Any, y: Any, which: Iterable[int]) -> None:
    """Write the names beside some points, none over another where there is a free place; call it last."""
    figure = axes.figure
    # places depend on the layout, which is settled when a figure is drawn
    figure.draw_without_rendering()
    taken: list[Any] = []
    points = axes.transData.transform(np.column_stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)]))
    for at in which:
        name = rows.module.iloc[at]
        best = None
        for dx, dy in _PLACES:
            text = axes.annotate(
                name,
                (np.asarray(x)[at], np.asarray(y)[at]),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=7,
            )
            box = text.get_window_extent(figure.canvas.get_renderer())
            covers = sum(box.overlaps(other) for other in taken)
            # a point under a name is bad, a name under a name worse
            covers += 0.5 * sum(box.contains(*point) for point in points)
            # and a name outside, over the axis labels, worst
            covers += 2 * (box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1 or not axes.bbox.containsy(box.y0))
            if best is None or covers < best[0]:
                if best is not None:
                    best[1].remove()
                best = (covers, text, box)
            else:
                text.remove()
            if covers == 0:
                break
        assert best is not None
        taken.append(best[2])
