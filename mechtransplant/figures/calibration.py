"""What the tests promise and keep: error rates under the null, and what is found where the answer is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.figures.style import BLUE, GREEN, GREY, ORANGE, PAGE, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LOOKS = {"gaussian": (BLUE, "o", "-"), "heavy": (GREEN, "s", "--"), "skewed": (ORANGE, "^", ":")}


def calibration_plot(rates: pd.DataFrame, correction: str = "max-t") -> tuple[Figure, Any]:
    """Family-wise error at 0.05 against the number of prompts, one panel a test, with the 99 % binomial band.

    Args:
        rates: columns test, shape, prompts, rate, correction, value, low, high, valid (``benchmarks/calibration.py``);
            a test on shapes for which it is not valid is drawn hollow.
    """
    rows = rates[(rates.rate == "family-wise error") & (rates.correction == correction)]
    tests = list(dict.fromkeys(rows.test))
    with style():
        figure, first = new_figure(PAGE, 2.3)
        first.remove()
        panels = figure.subplots(1, len(tests), sharey=True)
        for axes, test in zip(panels, tests, strict=True):
            here = rows[rows.test == test]
            axes.axhspan(
                float(here.low.iloc[0]),
                float(here.high.iloc[0]),
                color=GREY,
                alpha=0.2,
                linewidth=0,
                label="99 % binomial interval of 0.05" if test == tests[0] else None,
            )
            axes.axhline(0.05, color=GREY, linewidth=0.6)
            for shape, (colour, marker, dashes) in LOOKS.items():
                line = here[here["shape"] == shape].sort_values("prompts")
                valid = bool(line.valid.all())
                axes.plot(
                    line.prompts,
                    line.value,
                    color=colour,
                    marker=marker,
                    linestyle=dashes,
                    markersize=3.5,
                    markerfacecolor=colour if valid else "white",
                    label=shape if test == tests[0] else None,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(here.prompts.unique()), [str(p) for p in sorted(here.prompts.unique())])
            axes.minorticks_off()
            axes.set_title(test)
            axes.set_xlabel("prompts")
        panels[0].set_ylabel("family-wise error at 0.05")
        panels[0].set_ylim(bottom=0)
        hollow = "" if rows.valid.all() else "hollow: the test is not valid for this shape"
        figure.legend(loc="outside lower center", ncols=4, title=hollow)
    return figure, panels


def power_plot(found: pd.DataFrame) -> tuple[Figure, Any]:
    """Share of planted modules found and share of findings that are planted, one panel a pair.

    Args:
        found: columns pair, n, measure, test, planted_found, found_planted (``benchmarks/power.py``).
    """
    rows = found[found.test != "none"]
    pairs = list(dict.fromkeys(rows.pair))
    labels = [f"{m}, {t}" for m, t in dict.fromkeys(zip(rows.measure, rows.test, strict=True))]
    with style():
        figure, first = new_figure(PAGE, 4.4)
        first.remove()
        panels = figure.subplots(2, -(-len(pairs) // 2), sharex=True, sharey=True)
        for axes, pair in zip(np.ravel(panels), pairs, strict=False):
            here = rows[rows.pair == pair].assign(label=lambda r: r.measure + ", " + r.test)
            for n, alpha in zip(sorted(here.n.unique()), (0.3, 0.6, 1.0), strict=False):
                at = here[here.n == n].set_index("label").reindex(labels)
                y = np.arange(len(labels))[::-1]
                axes.plot(100 * at.planted_found, y + 0.15, "o", color=BLUE, alpha=alpha, markersize=4)
                axes.plot(100 * at.found_planted, y - 0.15, "s", color=ORANGE, alpha=alpha, markersize=3.5)
            base = 100 * float((here.planted / here.modules).iloc[0])
            axes.axvline(base, color=GREY, linewidth=0.6, linestyle="--")
            axes.set_yticks(np.arange(len(labels))[::-1], labels)
            axes.set_xlim(-4, 104)
            axes.set_title(pair.removeprefix("family/"))
        for axes in panels[-1]:
            axes.set_xlabel("%")
        handles = [
            np.ravel(panels)[0].plot([], [], marker, color=colour, label=label)[0]
            for marker, colour, label in (
                ("o", BLUE, "planted modules found"),
                ("s", ORANGE, "findings that are planted"),
                ("--", GREY, "planted share of all modules"),
            )
        ]
        sizes = ", ".join(map(str, sorted(rows.n.unique())))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, title=f"n = {sizes} prompts, pale to full")
    return figure, panels


#: what was weighed against the chosen method, told apart by marker and line
RIVALS = {
    "percentile bootstrap": (ORANGE, "o", "-"),
    "BCa bootstrap": (ORANGE, "^", "--"),
    "bootstrap, 1/4 added": (ORANGE, "s", ":"),
    "Dirichlet, prior 1/8": (GREEN, "D", "-"),
    "MOVER-Wilson": (GREEN, "v", "--"),
    "Fieller, t": (GREY, "x", "-"),
    "score": (GREY, "P", ":"),
}


def _rival(method: str) -> dict[str, Any]:
    colour, marker, dashes = RIVALS[method]
    return {"color": colour, "marker": marker, "linestyle": dashes, "linewidth": 0.8, "markersize": 3}


def interval_coverage(frame: pd.DataFrame) -> tuple[Figure, Any]:
    """How often 95 % intervals hold the truth against n, one column a quantity: the settings' mean, and the lowest.

    Args:
        frame: columns quantity, method, n, chosen, coverage (the settings' mean), worst (of the settings) and band (the
            lower end of one setting's 99 % binomial interval), as ``benchmarks/coverage.py`` writes them.
    """
    quantities = list(dict.fromkeys(frame.quantity))
    band = float(frame.band.max())
    with style():
        figure, first = new_figure(PAGE, 3.9)
        first.remove()
        panels = figure.subplots(2, len(quantities), sharex=True, sharey="row", squeeze=False)
        for column, quantity in enumerate(quantities):
            here = frame[frame.quantity == quantity]
            for axes, statistic in zip(panels[:, column], ("coverage", "worst"), strict=True):
                axes.axhspan(band, 2 * 0.95 - band, color=GREY, alpha=0.2, linewidth=0)
                axes.axhline(0.95, color=GREY, linewidth=0.6)
                for method, rows in here.groupby("method", sort=False):
                    line = rows.sort_values("n")
                    if rows.chosen.all():
                        look: dict[str, Any] = {"color": BLUE, "marker": "o", "linewidth": 2, "markersize": 4.5}
                        look["zorder"] = 3
                    else:
                        look = _rival(str(method))
                    axes.plot(line.n, line[statistic], **look)
                axes.set_xscale("log", base=2)
                sizes = sorted(here.n.unique())
                axes.set_xticks(sizes, [str(n) for n in sizes])
                axes.minorticks_off()
            panels[0, column].set_title(quantity)
            panels[1, column].set_xlabel("questions")
        panels[0, 0].set_ylabel("coverage, mean of settings")
        panels[1, 0].set_ylabel("coverage, lowest setting")
        handles = [panels[0, 0].plot([], [], color=BLUE, marker="o", linewidth=2, label="chosen (score)")[0]]
        for name in RIVALS:
            label = "score, uncorrected" if name == "score" else name
            handles += panels[0, 0].plot([], [], **_rival(name), label=label)
        label = "99 % binomial interval of 0.95"
        handles.append(panels[0, 0].fill_between([], [], [], color=GREY, alpha=0.2, linewidth=0, label=label))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure, panels
