"""One look for every figure, and how figures are made and saved: nothing is shown, and nothing is registered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind readers can tell apart; each series also has its own line or marker
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
PURPLE, BLACK, SKY = "#CC79A7", "#222222", "#56B4E9"
COLUMN, PAGE = 3.3, 6.8

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    # letters as shapes: a reader need not have the font
    "svg.fonttype": "path",
    "svg.hashsalt": "mechtransplant",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "legend.columnspacing": 1.2,
}


@contextmanager
def style() -> Iterator[Any]:
    """The project's matplotlib style and a backend that needs no screen, for the length of a ``with`` block."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield matplotlib


@cache
def _displayed_figure() -> Any:
    """matplotlib's Figure, which notebooks draw where it ends a cell, whether or not pyplot was ever imported."""
    from matplotlib.figure import Figure

    class DisplayedFigure(Figure):
        """A figure that Jupyter shows as a picture."""

        def _repr_png_(self) -> bytes:
            drawn = BytesIO()
            with style():
                self.savefig(drawn, format="png", dpi=144)
            return drawn.getvalue()

    return DisplayedFigure


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """(figure, axes) of a size in inches; with several columns or rows an array of axes that share their y axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # not pyplot: nothing is registered, shown, or kept alive
    figure = _displayed_figure()(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharey=columns * rows > 1)


def save_figure(figure: Figure, folder: str | Path, name: str, data: pd.DataFrame | None = None, run: str = "") -> None:
    """Write PNG (300 dpi), PDF and SVG, without a date (equal figures are equal files), and the data as CSV.

    ``run``: what the figure belongs to, for example a run's fingerprint; it stands in the files' metadata.

    Raises UsageError for anything but a figure (figure functions return a figure and its axes).
    """
    if not hasattr(figure, "savefig"):
        raise UsageError(f"expected a figure, got {type(figure).__name__}: figure, axes = volcano(…), then the figure")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = f"mechtransplant run {run}" if run else None
    with style():
        figure.savefig(
            folder / f"{name}.png", dpi=300, metadata={"Software": None, **({"Source": said} if said else {})}
        )
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Subject": said})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Source": said})
    if data is not None:
        data.to_csv(folder / f"{name}.csv", index=False)
