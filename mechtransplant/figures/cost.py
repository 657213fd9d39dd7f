"""What the whole pipeline costs, by the size of the models and the number of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mechtransplant.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, PAGE, PURPLE, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LOOKS = (
    (BLUE, "o", "-"),
    (GREEN, "s", "--"),
    (ORANGE, "^", "-."),
    (PURPLE, "D", ":"),
    (BLACK, "v", "-"),
    (GREY, "P", "--"),
)


def cost_plot(rows: pd.DataFrame) -> tuple[Figure, Any]:
    """Seconds of all stages against prompts, and memory of every model beside and above its weights.

    Args:
        rows: columns shape, layers, parameters, prompts, device, held_mib (two models' weights), peak_mib, total
            (seconds), as ``benchmarks/cost.py`` writes them.
    """
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    with style():
        figure, first = new_figure(PAGE, 2.9)
        first.remove()
        panels = figure.subplots(1, 2)
        time, memory = panels
        groups = list(rows.groupby(["shape", "device"], sort=False))
        names = []
        for at, ((shape, device), found) in enumerate(groups):
            line = found.sort_values("prompts")
            colour, marker, dashes = LOOKS[at % len(LOOKS)]
            name = f"{shape}, {device}"
            time.plot(line.prompts, line.total, color=colour, marker=marker, linestyle=dashes, label=name)
            names.append(f"{shape}, {line.parameters.iloc[0] / 1e6:,.0f} M × 2\n{device}")
            gib = line.held_mib.max() / 1024, line.peak_mib.max() / 1024
            memory.barh(at, gib[0], color=colour, alpha=0.45, height=0.6)
            memory.barh(
                at,
                gib[1] - gib[0],
                left=gib[0],
                color="white",
                edgecolor=BLACK,
                linewidth=0.6,
                hatch="//////",
                height=0.6,
            )
            memory.annotate(f"{gib[1]:.1f}", (gib[1], at), (3, 0), textcoords="offset points", va="center", fontsize=7)
        time.set_xscale("log", base=2)
        time.set_yscale("log")
        sizes = sorted(rows.prompts.unique())
        time.set_xticks(sizes, [f"{n:,}" for n in sizes])
        time.minorticks_off()
        time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        time.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        time.set_xlabel("prompts")
        time.set_ylabel("seconds, all stages")
        memory.set_yticks(range(len(groups)), names)
        memory.invert_yaxis()
        memory.set_xlabel("memory, GiB")
        memory.set_title("both models; hatched: the work")
        memory.margins(x=0.15)
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, panels
