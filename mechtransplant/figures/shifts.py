"""What differs between two models: where, how surely, how consistently, how localised, and whose change it is.

Sign: source minus target. Heads are circles and MLPs squares; significant modules are filled or marked. ``title`` is
what a figure is of, for example the pair's name; it stands above what the figure says of itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.figures.labels import name_points
from mechtransplant.figures.style import BLUE, COLUMN, GREY, ORANGE, new_figure, style
from mechtransplant.modules import module_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LABELS = {"effect_size": "Cohen's d", "effect": "mean shift"}
MARKERS = {"head": "o", "mlp": "s", "attn": "^", "linear": "D", "block": "v", "neuron": "."}
NAMES = {
    "head": "heads",
    "mlp": "MLPs",
    "attn": "attention blocks",
    "linear": "linear layers",
    "block": "blocks",
    "neuron": "neurons",
}


def _addressed(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The frame with kind, layer and head of every module; raises UsageError for missing columns, several measures."""
    lacking = [c for c in ("module", *columns) if c not in getattr(frame, "columns", [])]
    if lacking:
        raise UsageError(f"the frame lacks the columns {', '.join(lacking)}: see the figure's arguments")
    if "measure" in frame.columns and frame.measure.nunique() > 1:
        found = ", ".join(dict.fromkeys(frame.measure))
        raise UsageError(f"the frame has the measures {found}: draw one at a time (table[table.measure == …])")
    addresses = module_frame(frame.module)
    return frame.reset_index(drop=True).assign(kind=addresses.kind, layer=addresses.layer, head=addresses["head"])


def shift_heatmap(
    table: pd.DataFrame, value: str = "effect_size", alpha: float = 0.05, title: str = "", label: str = ""
) -> tuple[Figure, Any]:
    """Layer × head heat map with the MLP as an extra column; significant cells are marked, the others not hidden.

    Args:
        table: from :func:`test_shifts`, one measure of heads (and MLPs); or any frame with ``module`` and ``value``.
        value: the column to draw. Signed values get a diverging scale around 0, others one that starts at 0.
        alpha: cells with ``p_adjusted`` ≤ alpha get a mark: a triangle up or down by the sign, else a dot.

    Raises:
        UsageError: no heads and no MLPs, several measures, or no such column.
    """
    frame = _addressed(table, value)
    frame = frame[frame.kind.isin(["head", "mlp"])]
    if frame.empty:
        raise UsageError("a heat map shows heads and MLPs: measure kinds=('head', 'mlp')")
    layers, heads = int(frame.layer.max()) + 1, int(frame["head"].max()) + 1
    has_mlp = bool((frame.kind == "mlp").any())
    # a gap sets the MLP apart from the heads
    gap = 0.4 if heads and has_mlp else 0.0
    # what is tested can have either sign, also where it happens to have one: panels of one run stay comparable
    tested = value in ("effect", "effect_size") and "test" in frame.columns
    signed = tested or bool((frame[value] < 0).any())
    bound, clipped = _bound(np.abs(frame[value].to_numpy(dtype=float)))
    frame = frame.assign(**{value: frame[value].clip(-bound, bound)})
    with style() as matplotlib:
        figure, axes = new_figure(COLUMN, max(2.1, 1.0 + 0.12 * layers))
        colours = matplotlib.colormaps["RdBu_r" if signed else "cividis"]
        norm = matplotlib.colors.Normalize(-bound if signed else 0, bound)
        parts = [(frame[frame.kind == "head"], range(heads), 0.0)]
        if has_mlp:
            parts.append((frame[frame.kind == "mlp"], range(1), heads + gap))
        for rows, columns, left in parts:
            grid = np.full((layers, len(columns)), np.nan)
            grid[rows.layer, rows["head"].clip(lower=0)] = rows[value]
            if len(columns):
                axes.pcolormesh(
                    np.arange(len(columns) + 1) + left, np.arange(layers + 1), grid, cmap=colours, norm=norm
                )
            if "p_adjusted" in rows.columns:
                sure = rows[rows.p_adjusted <= alpha]
                # both ends of a diverging scale are dark in grey
                for marker, chosen in _marks(sure[value], signed):
                    axes.plot(
                        sure["head"][chosen].clip(lower=0) + left + 0.5,
                        sure.layer[chosen] + 0.5,
                        linestyle="none",
                        marker=marker,
                        markersize=2.9 if signed else 2.6,
                        color="white",
                        markeredgecolor="black",
                        markeredgewidth=0.5,
                    )
        step = max(1, heads // 12)
        ticks = [h + 0.5 for h in range(0, heads, step)] + ([heads + gap + 0.5] if has_mlp else [])
        axes.set_xticks(ticks, [str(h) for h in range(0, heads, step)] + (["MLP"] if has_mlp else []))
        every = max(1, layers // 10)
        axes.set_yticks(np.arange(0, layers, every) + 0.5, [str(v) for v in range(0, layers, every)])
        axes.set_xlim(0, heads + gap + has_mlp)
        shape = "△ above 0, ▽ below" if signed else "dots"
        marks = f" ({shape}: adjusted p ≤ {alpha:g})" if "p_adjusted" in frame.columns else ""
        axes.set_xlabel(f"head{marks}")
        axes.set_ylabel("layer")
        axes.set_title(title)
        measure = f"{frame.measure.iloc[0]}" if "measure" in frame.columns else ""
        against = "test" in frame.columns and frame.test.iloc[0] in ("control", "matched")
        measure += (", task − control" if against else ", source − target") if signed and measure else ""
        said = label or "\n".join(filter(None, [measure, LABELS.get(value, value)]))
        extend = ("both" if signed else "max") if clipped else "neither"
        figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=axes, label=said, extend=extend)
    return figure, axes


def _marks(values: pd.Series, signed: bool) -> list[tuple[str, Any]]:
    """(marker, which cells have it)."""
    if not signed:
        return [("o", values.notna())]
    return [("^", values > 0), ("v", values < 0), ("o", values == 0)]


def _titled(title: str, said: str) -> str:
    """What a figure is of, above what it says of itself."""
    return f"{title}\n{said}" if title else said


def _bound(sizes: np.ndarray) -> tuple[float, bool]:
    """(the end of a colour scale, whether cells lie beyond it): a few modules many times as large do not set it.

    A module without any spread has an infinite effect size; one that shifts alike on every prompt a huge one.
    """
    finite = sizes[np.isfinite(sizes)]
    if not len(finite) or finite.max() == 0:
        return 1.0, bool(np.isinf(sizes).any())
    # the largest of all but one in fifty, and all but one of fewer
    usual = float(np.sort(finite)[-(1 + max(1, len(finite) // 50)) :][0])
    bound = usual if 0 < usual < finite.max() / 2 else float(finite.max())
    return bound, bool((sizes > bound).any())


def _scatter(axes: Any, rows: pd.DataFrame, x: Any, y: Any, strong: Any) -> None:
    """Points by kind (marker) and by whether they are ``strong`` (filled)."""
    for kind, marker in MARKERS.items():
        here = (rows.kind == kind).to_numpy()
        if not here.any():
            continue
        for chosen, face, edge in ((here & ~strong, "none", GREY), (here & strong, BLUE, BLUE)):
            axes.plot(
                np.asarray(x)[chosen],
                np.asarray(y)[chosen],
                linestyle="none",
                marker=marker,
                markersize=3.5,
                markerfacecolor=face,
                markeredgecolor=edge,
                markeredgewidth=0.7,
            )
        # in the legend once, as the kind
        axes.plot(
            [],
            [],
            linestyle="none",
            marker=marker,
            markersize=3.5,
            color="none",
            markeredgecolor="black",
            markeredgewidth=0.7,
            label=NAMES[kind],
        )


def volcano(table: pd.DataFrame, alpha: float = 0.05, names: int = 6, title: str = "") -> tuple[Figure, Any]:
    """Effect size against −log₁₀ of the adjusted p-value; filled: adjusted p ≤ alpha.

    Args:
        table: from :func:`test_shifts`, one measure.
        names: how many modules with the smallest p-values (then the largest effects) are named.
    """
    frame = _addressed(table, "effect_size", "p_adjusted")
    # what is off the scale stands at its end
    bound, clipped = _bound(np.abs(frame.effect_size.to_numpy(dtype=float)))
    frame = frame.assign(effect_size=frame.effect_size.clip(-1.05 * bound, 1.05 * bound))
    with style():
        figure, axes = new_figure(COLUMN, 2.6)
        # a p-value that underflows stands at the end of what numbers can say
        y = -np.log10(frame.p_adjusted.clip(lower=np.finfo(float).tiny))
        sure = (frame.p_adjusted <= alpha).to_numpy()
        _scatter(axes, frame, frame.effect_size, y, sure)
        axes.axhline(-np.log10(alpha), color=ORANGE, linewidth=0.8, linestyle="--", label=f"adjusted p = {alpha:g}")
        axes.axvline(0, color=GREY, linewidth=0.5)
        made = int(frame.permutations.max()) if "permutations" in frame.columns else 0
        if made and float(y.max()) >= np.log10(made + 1) - 1e-9:
            floor = "smallest possible p"
            axes.axhline(np.log10(made + 1), color=GREY, linewidth=0.6, linestyle=":", label=floor)
        order = np.lexsort((-np.abs(frame.effect_size), frame.p_adjusted))
        against = "test" in frame.columns and frame.test.iloc[0] in ("control", "matched")
        signs = "task − control" if against else "over prompts, source − target"
        axes.set_xlabel(f"Cohen's d {signs}" + (f"\n(at the edge: beyond ±{bound:.2g})" if clipped else ""))
        axes.set_ylabel("−log₁₀ adjusted p")
        # room for names above the highest points
        axes.set_ylim(-0.05, 1.15 * max(float(y.max()), -np.log10(alpha)))
        measure = f"{frame.measure.iloc[0]}: " if "measure" in frame.columns else ""
        said = f"{measure}{int(sure.sum())} of {len(frame)} modules, n = {int(frame.n.max())} prompts"
        axes.set_title(_titled(title, said))
        figure.legend(loc="outside lower center", ncols=2)
        name_points(axes, frame, frame.effect_size, y, [i for i in order[:names] if sure[i]])
    return figure, axes


def consistency_plot(consistency: pd.DataFrame, names: int = 4, title: str = "") -> tuple[Figure, Any]:
    """Consistency over prompts against the size of the shift, with intervals and the null's mean.

    Alignment where the frame has it, else the share of the more frequent sign; filled: p ≤ 0.05 (not adjusted).

    Args:
        consistency: from :func:`localization.consistency`.
    """
    what = "alignment" if "alignment" in consistency.columns else "sign"
    share = "alignment" if what == "alignment" else "sign_share"
    frame = _addressed(consistency, "size", share, f"{what}_p")
    frame = frame[frame[share].notna()].reset_index(drop=True)
    if frame.empty:
        raise UsageError("no module shifts: there is no consistency to draw")
    with style():
        figure, axes = new_figure(COLUMN, 2.6)
        x = frame["size"].abs()
        errors = [frame[share] - frame[f"{what}_low"], frame[f"{what}_high"] - frame[share]]
        axes.errorbar(x, frame[share], np.clip(errors, 0, None), fmt="none", ecolor=GREY, elinewidth=0.4, alpha=0.6)
        _scatter(axes, frame, x, frame[share], (frame[f"{what}_p"] <= 0.05).to_numpy())
        null = float(frame[f"{what}_null"].mean())
        chance = "mean under random signs"
        axes.axhline(null, color=ORANGE, linewidth=0.8, linestyle="--", label=chance)
        if (x > 0).any():
            axes.set_xscale("log")
        measure = f" {frame.measure.iloc[0]}" if "measure" in frame.columns else ""
        axes.set_xlabel(f"size of the shift, |mean{measure}|")
        axes.set_ylabel("alignment with other prompts" if what == "alignment" else "share of the more frequent sign")
        said = f"n = {int(frame.n.max())} prompts; filled: p ≤ 0.05, not adjusted"
        axes.set_title(_titled(title, said))
        figure.legend(loc="outside lower center", ncols=3)
        name_points(axes, frame, x, frame[share], np.argsort(-x.to_numpy())[:names])
    return figure, axes


def lorenz(curve: pd.DataFrame, title: str = "") -> tuple[Figure, Any]:
    """Share of the whole shift that the largest modules hold together, with the null's band and equality.

    Args:
        curve: from :func:`localization.lorenz_curve`.
    """
    lacking = [c for c in ("rank", "cumulative", "null", "null_low", "null_high") if c not in curve.columns]
    if lacking:
        raise UsageError(f"the frame lacks the columns {', '.join(lacking)}: pass lorenz_curve(…)")
    with style():
        figure, axes = new_figure(COLUMN, 2.5)
        modules = len(curve)
        x = np.concatenate([[0], curve["rank"]]) / modules * 100

        def from_zero(name: str) -> Any:
            return 100 * np.concatenate([[0], curve[name]])

        axes.fill_between(
            x,
            from_zero("null_low"),
            from_zero("null_high"),
            color=ORANGE,
            alpha=0.25,
            linewidth=0,
            label="permuted within prompts",
        )
        axes.plot(x, from_zero("null"), color=ORANGE, linewidth=0.8, linestyle="--", label="their mean")
        axes.plot(x, from_zero("cumulative"), color=BLUE, label="measured")
        axes.plot([0, 100], [0, 100], color=GREY, linewidth=0.6, linestyle=":", label="equal shares")
        axes.set_xlabel(f"modules, largest first, % (of {modules})")
        axes.set_ylabel("share of the shift, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 102)
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=2)
    return figure, axes


def own_against_inherited(
    shifts: pd.DataFrame, marked: Iterable[str] = (), names: int = 6, title: str = ""
) -> tuple[Figure, Any]:
    """Mean own against mean inherited shift of every module; above the diagonal a module changes by its own weights.

    Args:
        shifts: from :func:`measure_shifts` with the measures own and inherited.
        marked: modules to fill, for example a planted set; by default those that are more own than inherited.
        names: how many modules with the largest own shift are named.
    """
    lacking = [c for c in ("module", "measure", "value") if c not in getattr(shifts, "columns", [])]
    if lacking:
        raise UsageError(f"the frame lacks the columns {', '.join(lacking)}: pass measure_shifts(…)")
    means_of = {
        m: shifts[shifts.measure == m].groupby("module", sort=False, observed=True) for m in ("own", "inherited")
    }
    found = {m: groups["value"].mean() for m, groups in means_of.items()}
    if any(v.empty for v in found.values()):
        raise UsageError("measure both: measure_shifts(pair, task, measures=('own', 'inherited'))")
    means = found["own"].to_frame("own").assign(inherited=found["inherited"]).rename_axis("module").reset_index()
    frame = _addressed(means)
    given = [marked] if isinstance(marked, str) else list(marked)
    strange = sorted(set(given) - set(frame.module))
    if strange:
        raise UsageError(f"marked names {strange[0]}, which the shifts do not have: mark modules that were measured")
    strong = (frame.module.isin(given) if given else frame.own > frame.inherited).to_numpy()
    with style():
        figure, axes = new_figure(COLUMN, 2.9)
        _scatter(axes, frame, frame.inherited, frame.own, strong)
        top = 1.05 * float(np.nanmax(frame[["own", "inherited"]].to_numpy())) or 1.0
        axes.plot([0, top], [0, top], color=GREY, linewidth=0.6, linestyle=":")
        axes.set_xlim(-0.02 * top, top)
        axes.set_ylim(-0.02 * top, top)
        axes.set_xlabel("inherited: from changed inputs, of the norm")
        axes.set_ylabel("own: what its weights change, of the norm")
        axes.set_title(_titled(title, "filled: " + ("marked modules" if given else "more own than inherited")))
        figure.legend(loc="outside lower center", ncols=3)
        name_points(axes, frame, frame.inherited, frame.own, np.argsort(-frame.own.to_numpy())[:names])
    return figure, axes
