"""What grafts did: accuracy against K, and the scores that ranked the modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.style import BLACK, BLUE, COLUMN, GREEN, GREY, ORANGE, PAGE, PURPLE, new_figure, style
from mechtransplant.modules import module_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def k_curve(
    results: pd.DataFrame,
    split: str = "choose",
    budget: int | None = None,
    candidates: int | None = None,
    rule: str | None = None,
    title: str = "",
) -> tuple[Figure, Any]:
    """Accuracy against the number of grafted modules, with random sets and both baselines.

    The band is of random orders, as many sets at every K, where there are some, since a range grows with the number of
    sets; sets matched to one K are a bar beside it. Triangle and diamond: the lowest-ranked modules, as many, and all.

    Args:
        results: columns split, role (target, source, graft, random, bottom, all), k, strength, budget, accuracy, low,
            high, n, and set ("order…": of a random order along K) where random sets of both kinds are there.
        candidates: the number of all modules; adds an axis of shares.
        rule: whose grafts and random sets, where the results (column rule) hold several.
        title: said above the number of questions, for example the pair's name.
    """
    rows = results[(results.split == split) & (results.budget == (budget or results.budget.max()))]
    if rule is not None:
        rows = rows[rows.rule.isin(["", rule])]
    graft = rows[rows.role == "graft"]
    with style():
        figure, axes = new_figure(COLUMN, 2.5)
        for role, colour, dashes in (("source", GREEN, "--"), ("target", GREY, ":")):
            value = float(rows[rows.role == role].accuracy.iloc[0])
            axes.axhline(100 * value, color=colour, linestyle=dashes, label=f"{role}, {100 * value:.1f} %")
        # one band, at the first strength of the sweep: bands on top of each other cannot be told apart
        random = rows[(rows.role == "random") & (rows.strength == graft.strength.iloc[0])]
        along, alone = _orders(random)
        if len(along):
            bands = along.groupby("k").accuracy
            ks = np.array(list(bands.groups))
            axes.fill_between(
                ks,
                100 * bands.min(),
                100 * bands.max(),
                color=GREY,
                alpha=0.2,
                linewidth=0,
                label=f"random, range of {_counts(bands.size())}",
            )
            axes.plot(ks, 100 * bands.median(), color=GREY, linewidth=0.8, label="random, median")
        for at, (k, found) in enumerate(alone.groupby("k").accuracy):
            middle = 100 * found.median()
            axes.errorbar(
                [1.06 * float(str(k))],
                [middle],
                [[middle - 100 * found.min()], [100 * found.max() - middle]],
                color=BLACK,
                marker="_",
                markersize=4,
                elinewidth=1.2,
                label=None if at else f"matched, range of {_counts(alone.groupby('k').size())}",
            )
        for index, strength in enumerate(sorted(graft.strength.unique())):
            line = graft[graft.strength == strength].sort_values("k")
            errors = 100 * np.array([line.accuracy - line.low, line.high - line.accuracy])
            label = "graft" if rule is None else f"graft by {rule}"
            label += "" if graft.strength.nunique() == 1 else f", strength {strength:g}"
            axes.errorbar(
                line.k,
                100 * line.accuracy,
                errors,
                color=BLUE,
                marker="os^Dv"[index % 5],
                capsize=2,
                elinewidth=0.6,
                alpha=1 / (1 + 0.3 * index),
                label=label,
            )
        everything = rows[(rows.role == "all") & (rows.strength == graft.strength.iloc[0])]
        for part, marker, name in ((rows[rows.role == "bottom"], "v", "lowest-ranked"), (everything, "D", "all")):
            if len(part):
                axes.plot(part.k, 100 * part.accuracy, marker, color=ORANGE, linestyle="none", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        ticks = _apart(sorted({*graft.k, *everything.k}))
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.set_xlabel("grafted modules K" + (f" (of {candidates})" if candidates else ""))
        axes.set_ylabel("accuracy, %")
        questions = f"{int(rows.n.iloc[0])} {split} questions, 95 % intervals"
        axes.set_title(f"{title}\n{questions}" if title else questions)
        axes.set_ylim(-3, 103)
        labels = axes.get_legend_handles_labels()[1]
        half = -(-len(labels) // 2)
        widths = [max(map(len, part), default=0) for part in (labels[:half], labels[half:])]
        columns = 2 if max(widths) <= LEGEND and sum(widths) <= BOTH else 1
        figure.set_figheight(2.1 + 0.15 * -(-len(labels) // columns))
        figure.legend(loc="outside lower center", ncols=columns)
    return figure, axes


def _orders(random: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(random sets along K, as many at every K, those of one K)."""
    if "set" in random:
        # sets with strengths fitted to them, or chosen for them, are other controls
        random = random[~random["set"].astype(str).str.startswith(("refitted", "tuned"))]
    ordered = random.k.notna()
    if "set" in random and random["set"].astype(str).str.startswith("order").any():
        ordered = random["set"].astype(str).str.startswith("order")
    along, alone = random[ordered], random[~ordered]
    # one K makes no band
    return (along, alone) if along.k.nunique() > 1 else (along.iloc[:0], random)


def _counts(sizes: Any) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return str(high) if low == high else f"{low}–{high}"


def _apart(sizes: Sequence[int]) -> list[int]:
    """Those of the sizes whose labels do not touch on a logarithmic axis, the largest first."""
    least = 0.09 * np.log2(sizes[-1] / sizes[0]) if len(sizes) > 1 else 0.0
    kept = list(sizes[-1:])
    for size in reversed(sizes[:-1]):
        if np.log2(kept[0] / size) >= least:
            kept.insert(0, size)
    return kept


#: letters of a legend's longest label, of which two stand side by side in a column's width
LEGEND = 28
#: and so many letters in both
BOTH = 44
#: how many curves stay legible in one panel, and what tells them apart in grey
PANEL = 5
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))


def rule_curves(
    results: pd.DataFrame,
    budget: int,
    candidates: int,
    rules: Sequence[str],
    outcome: str = "accuracy",
    title: str = "",
) -> tuple[Figure, Any]:
    """K-curves of several rules on ``test``, a few a panel, each panel with the band of the random orders of all rules.

    Args:
        results: as for :func:`k_curve`, with the column rule, and for ``outcome="log_probability"`` that column (nats).
    """
    rows = results[(results.split == "test") & (results.budget == budget)]
    scale, unit = (100, "accuracy, %") if outcome == "accuracy" else (1, "log p(gold answer), nats")
    along, _ = _orders(rows[rows.role == "random"])
    random = along.groupby("k")[outcome]
    groups = [list(rules[i : i + PANEL]) for i in range(0, len(rules), PANEL)]
    lines = -(-len(groups) // 2)
    ticks = _apart(sorted(rows[rows.role == "graft"].k.unique()))
    with style():
        figure, grid = new_figure(PAGE, 0.6 + 0.15 * bool(title) + 1.6 * lines, columns=min(2, len(groups)), rows=lines)
        panels = list(np.atleast_1d(grid).flat)
        for panel in panels[len(groups) :]:
            panel.remove()
        del panels[len(groups) :]
        for panel, names in zip(panels, groups, strict=True):
            for role, dashes in (("source", "--"), ("target", ":")):
                panel.axhline(scale * float(rows[rows.role == role][outcome].iloc[0]), color=GREY, linestyle=dashes)
            if len(random):
                ks = np.array(list(random.groups))
                panel.fill_between(
                    ks,
                    scale * random.min(),
                    scale * random.max(),
                    color=GREY,
                    alpha=0.2,
                    linewidth=0,
                    label="random orders",
                )
            for index, name in enumerate(names):
                line = rows[(rows.role == "graft") & (rows.rule == name)].sort_values("k")
                line = line.drop_duplicates("k")
                panel.plot(
                    line.k,
                    scale * line[outcome],
                    color=(BLUE, ORANGE, GREEN, PURPLE, BLACK)[index],
                    marker="os^Dv"[index],
                    markersize=3,
                    linewidth=0.9,
                    linestyle=DASHES[index],
                    label=name,
                )
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(k) for k in ticks])
            panel.minorticks_off()
            panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
        for panel in panels[-2:]:
            panel.set_xlabel(f"grafted modules K (of {candidates})")
        for panel in panels[::2]:
            panel.set_ylabel(unit)
        said = f"{int(rows.n.iloc[0])} test questions; dashed: source, dotted: target"
        if len(random):
            whose = list(dict.fromkeys(along.rule))
            named = " and ".join(whose) if len(whose) < 3 else f"{len(whose)} rules"
            said += f"\nband: random orders matched to {named}, range"
        figure.suptitle(f"{title}\n{said}" if title else said)
    return figure, panels


def score_heatmap(ranking: pd.DataFrame, chosen: int = 0, title: str = "", label: str = "score") -> tuple[Figure, Any]:
    """Scores of linear layers, layer on y and layer type on x; the ``chosen`` highest-ranked cells are marked.

    Args:
        ranking: columns module, layer, score, rank. Scores are ≥ 0, so the scale is sequential and starts at 0.
        label: of the colour bar: the score's name and unit.

    Raises:
        UsageError: neurons, which are too many for a map.
    """
    if module_frame(ranking.module).kind.eq("neuron").any():
        raise UsageError("a score map has a cell for each module, and neurons are thousands: draw heads or layers")
    frame = ranking.assign(part=[m.split(".", 1)[1] if "." in m else m.split("H")[-1] for m in ranking.module])
    order = [
        p for p in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") if p in set(frame.part)
    ]
    order += [p for p in dict.fromkeys(frame.sort_values(["layer", "module"]).part) if p not in order]
    grid = frame.pivot_table(index="layer", columns="part", values="score")[order]
    with style():
        layers = len(grid)
        figure, axes = new_figure(COLUMN, max(1.8, 0.9 + 0.13 * layers))
        mesh = axes.pcolormesh(grid.to_numpy(), cmap="cividis", vmin=min(0, float(frame.score.min())))
        marked = frame[frame["rank"] <= chosen]
        for part, layer in zip(marked.part, marked.layer, strict=True):
            axes.plot(
                order.index(part) + 0.5,
                list(grid.index).index(layer) + 0.5,
                marker="o",
                color="white",
                markeredgecolor="black",
                markeredgewidth=0.5,
                markersize=3.5,
                linestyle="none",
            )
        axes.set_xticks(np.arange(len(order)) + 0.5, [p.removesuffix("_proj") for p in order])
        step = max(1, layers // 10)
        axes.set_yticks(np.arange(0, layers, step) + 0.5, [str(v) for v in grid.index[::step]])
        axes.set_ylabel("layer")
        axes.set_xlabel("linear layer" + (f" (dots: the {chosen} chosen)" if chosen else ""))
        axes.set_title(title)
        figure.colorbar(mesh, ax=axes, label=label)
    return figure, axes
