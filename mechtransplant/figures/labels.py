"""Names beside points: each where it covers least, and with a line to its point where it stands apart from it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mechtransplant.figures.style import BLACK

if TYPE_CHECKING:
    import pandas as pd

#: sides on which a name may stand, and how far from its point, in points: the nearest are tried first
_SIDES = [(1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)]
_FAR = (3.0, 9.0, 16.0, 24.0, 34.0, 46.0)
#: from here on a line leads from the name to its point
_APART = 8.0
#: so many pixels nearer to its own point than to any other, a name is surely its
_CLEAR = 4.0


class _Box(NamedTuple):
    """A rectangle in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    def covers(self, other: _Box) -> bool:
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1


def name_points(axes: Any, rows: pd.DataFrame, x: Any, y: Any, which: Iterable[int]) -> None:
    """Write the names beside some points, none over another where there is a free place; call it last."""
    figure = axes.figure
    # places depend on the layout, which is settled when a figure is drawn
    figure.draw_without_rendering()
    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    points = axes.transData.transform(np.column_stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)]))
    known = np.isfinite(points).all(1)
    inside = _Box(axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1)
    taken: list[_Box] = []
    for at in (at for at in which if known[at]):
        name = str(rows.module.iloc[at])
        measured = axes.text(0, 0, name, fontsize=7)
        extent = measured.get_window_extent(renderer)
        measured.remove()
        places = [_place(points[at], extent.width, extent.height, side, far * pixels) for far, side in _TRIED]
        costs = [
            _cost(box, far, taken, points[known], inside, points[at])
            for box, (far, _) in zip(places, _TRIED, strict=True)
        ]
        best = int(np.argmin(costs))
        (far, (right, up)), box = _TRIED[best], places[best]
        line = {"arrowstyle": "-", "color": BLACK, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 1.5}
        # from the corner or side that is nearest to the point
        line["relpos"] = ((1 - right) / 2, (1 - up) / 2)
        axes.annotate(
            name,
            (np.asarray(x)[at], np.asarray(y)[at]),
            xytext=((box.x0 - points[at][0]) / pixels, (box.y0 - points[at][1]) / pixels),
            textcoords="offset points",
            fontsize=7,
            arrowprops=line if far >= _APART or _may_be_anothers(box, points[known], points[at], 0) else None,
            # lines under a name do not strike it out
            bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.1},
        )
        taken.append(box)


_TRIED = list(product(_FAR, _SIDES))


def _place(point: Any, width: float, height: float, side: tuple[int, int], far: float) -> _Box:
    """Where a name of that size stands on a side of its point."""
    right, up = side
    # corners stand as far away as sides do
    step = far / (2**0.5 if right and up and far > 4 else 1)
    x0 = point[0] + right * step - (width if right < 0 else width / 2 if right == 0 else 0)
    y0 = point[1] + up * step - (height if up < 0 else height / 2 if up == 0 else 0)
    return _Box(x0, y0, x0 + width, y0 + height)


def _may_be_anothers(box: _Box, points: Any, point: Any, margin: float) -> bool:
    """Whether another point is as near to a name as its own, or nearly so: a reader may take the name for its."""
    across = np.maximum(np.maximum(box.x0 - points[:, 0], points[:, 0] - box.x1), 0)
    along = np.maximum(np.maximum(box.y0 - points[:, 1], points[:, 1] - box.y1), 0)
    away = np.hypot(across, along)
    own = (points == point).all(1)
    return bool((away[~own] < away[own].min() + margin).any())


def _crosses(box: _Box, point: Any, other: _Box) -> bool:
    """Whether the way from a name to its point leads over another name."""
    start = np.clip(point, (box.x0, box.y0), (box.x1, box.y1))
    on_the_way = start + np.linspace(0, 1, 25)[:, None] * (np.asarray(point) - start)
    inside = (on_the_way > (other.x0, other.y0)) & (on_the_way < (other.x1, other.y1))
    return bool(inside.all(1).any())


def _cost(box: _Box, far: float, taken: list[_Box], points: Any, inside: _Box, point: Any) -> float:
    """What speaks against a place for a point's name.

    A name over another is worst, then one outside of the axes, then a way over another name, then points under it,
    then another point that is nearer, then the way to its own.
    """
    over = sum(box.covers(other) for other in taken)
    crossed = sum(_crosses(box, point, other) for other in taken)
    strange = _may_be_anothers(box, points, point, _CLEAR)
    outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
    under = (points[:, 0] > box.x0 - 2) & (points[:, 0] < box.x1 + 2) & (points[:, 1] > box.y0 - 2)
    hidden = int((under & (points[:, 1] < box.y1 + 2)).sum())
    return 100.0 * over + 20.0 * outside + 3.0 * crossed + 1.0 * hidden + 0.5 * strange + 0.04 * far
