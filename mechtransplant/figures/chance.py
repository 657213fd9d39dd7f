"""A graft among what chance gives: the distribution of its random sets, or of as many changes drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError
from mechtransplant.figures.style import BLUE, GREEN, GREY, ORANGE, PAGE, PURPLE, SKY, new_figure, style
from mechtransplant.significance import SAME_NATS, rank_among

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: how names of sets begin → (what they are, colour, hatch)
_KINDS = {
    "set": ("random sets", GREY, ""),
    "tuned": ("random sets, strength {strength:g}", SKY, "////"),
    "refitted": ("random sets, strengths fitted", PURPLE, "...."),
    "weights": ("{drawn}, strength {strength:.3g}", ORANGE, ""),
}
_NEEDED = ("split", "budget", "role", "rule", "set", "k", "strength", "accuracy", "n")
#: outcome → (how its rank is introduced, its axis, its scale, what is no further apart is a tie)
_OUTCOMES = {
    "accuracy": ("", "accuracy, %", 100.0, 0.0),
    "log_probability": ("by log-probability ", "log-probability of the gold answer, nats", 1.0, SAME_NATS),
}
BINS = 24
WEIGHTS = "random_weights"


def against_chance(
    results: pd.DataFrame,
    rule: str,
    k: int,
    strength: float = 1.0,
    split: str = "test",
    budget: int | None = None,
    title: str = "",
    drawn: str = "draws of as many changes",
    whole: str = "graft of everything",
) -> tuple[Figure, Any]:
    """How many random sets (histograms) reach how much, and where the graft (line) stands among them.

    By accuracy and, where there is one, the gold answer's mean log-probability (nats). The legend says how many of each
    kind the graft beats and p = (1 + those that reach it) / (1 + n), which is one-sided and at least 1 / (1 + n).

    Args:
        results: as a run's ``results.parquet`` has them: columns split, budget, role, rule, set ("set-3", "tuned-3",
            "refitted-3", "weights-3"), k, strength, accuracy, log_probability.
        rule: whose graft. k, strength: which of its grafts. split: one that selected nothing. drawn: what random
            weights are, in words. whole: what a graft of all candidates is called, which no rule selects.

    Raises:
        UsageError: results without that graft, its two models, or any random set of it, or that lack a column; a split
            that served to select.
    """
    import pandas as pd

    missing = [name for name in _NEEDED if name not in getattr(results, "columns", [])]
    if missing:
        raise UsageError(f"the frame lacks {', '.join(missing)}: pass a run's results")
    if split in ("discover", "choose"):
        # there the graft is the best of several, and controls are tried at several strengths
        raise UsageError(f"the {split!r} split served to select: draw the test split")
    rows = results[(results.split == split) & (results.budget == (budget or results.budget.max()))]
    graft = rows[(rows.role == "graft") & (rows["rule"] == rule) & (rows.k == k) & (rows.strength == strength)]
    if graft.empty:
        # everything that there is, grafted, is a row of no rule
        graft = rows[(rows.role == "all") & (rows.k == k) & (rows.strength == strength)]
    kinds = list(_kinds(rows, rule, k, strength, drawn))
    ends = {role: rows[rows.role == role] for role in ("source", "target")}
    lacking = [role for role, found in ends.items() if found.empty]
    lacking += [f"graft of {rule} with K = {k} at strength {strength:g}"] * graft.empty
    lacking += ["random set of that size"] * (not kinds)
    if lacking:
        raise UsageError(
            f"the results hold no {lacking[0]} on {split}: give the rule, K and strength of a run's report"
        )
    # free-form answers have no log-probability
    measured = pd.concat([graft, *ends.values(), *(part for _, _, _, part in kinds)])
    shown = [name for name in _OUTCOMES if name in measured and measured[name].notna().all()]
    selected = not ((rows.role == "all") & (rows.k == k)).any()
    lines = [(graft.iloc[0], f"graft by {rule}" if selected else whole, BLUE, "-")]
    for role, colour, dashes in (("source", GREEN, "--"), ("target", GREY, ":")):
        lines.append((ends[role].iloc[0], role, colour, dashes))
    with style():
        figure, found = new_figure(PAGE, 2.0 + 0.16 * (len(kinds) + len(lines)), columns=len(shown))
        panels = np.atleast_1d(found)
        for axes, outcome in zip(panels, shown, strict=True):
            _, label, scale, _ = _OUTCOMES[outcome]
            values = [scale * part[outcome].to_numpy(dtype=float) for _, _, _, part in kinds]
            places = [scale * float(row[outcome]) for row, _, _, _ in lines]
            # the target is often far away, and widens no axis
            near = np.concatenate([*values, places[:2]])
            bins = _bins(near, 100 / float(graft.n.iloc[0]) if outcome == "accuracy" else None)
            for (name, colour, hatch, _), heights in zip(kinds, values, strict=True):
                axes.hist(
                    heights, bins, color=colour, alpha=0.45, hatch=hatch, edgecolor=colour, linewidth=0.4, label=name
                )
            for (_, name, colour, dashes), at in zip(lines, places, strict=True):
                # what has no place on the axis stands in the legend alone
                inside = bins[0] <= at <= bins[-1]
                axes.axvline(at if inside else np.nan, color=colour, linestyle=dashes, label=name)
            axes.set_xlim(bins[0], bins[-1])
            # labels of log-probabilities are long
            axes.locator_params("x", nbins=5)
            axes.set_xlabel(label)
        panels[0].set_ylabel("draws" if all(WEIGHTS in set(part.role) for *_, part in kinds) else "sets")
        handles = panels[0].get_legend_handles_labels()[0]
        said = [_beaten(name, graft.iloc[0], part, shown) for name, _, _, part in kinds]
        for (row, name, _, _), handle in zip(lines, handles[len(kinds) :], strict=True):
            off = ", off the axis" if np.isnan(handle.get_xdata()[0]) else ""
            said.append(f"{name}: {_values(row, shown)}{off}")
        figure.legend(handles, said, loc="outside lower center")
        n = f"K = {k} at strength {strength:g}, {int(graft.n.iloc[0])} {split} questions"
        figure.suptitle(f"{title}\n{n}" if title else n)
    return figure, found


def _bins(values: NDArray[np.float64], step: float | None) -> NDArray[np.float64]:
    """Edges of at most ``BINS`` + 2 bins around all values; of counted ones, ``step`` apart, halfway between two."""
    low, high = values.min(), values.max()
    if step is None:
        margin = 0.06 * (high - low) or 1.0
        return np.linspace(low - margin, high + margin, BINS + 1)
    # as many possible values in every bin, or a gap would be of the bins' making; ties are in the graft's own bin
    first, last = round(low / step), round(high / step)
    width = -(-(last - first + 1) // BINS)
    return step * (np.arange(first - width, last + 2 * width + 1, width) - 0.5)


def _beaten(name: str, graft: Any, part: pd.DataFrame, shown: list[str]) -> str:
    """A kind of random sets, and how many of them a graft beats, by every outcome."""
    ranks = {
        outcome: rank_among(float(graft[outcome]), part[outcome].to_numpy(dtype=float), _OUTCOMES[outcome][3])
        for outcome in shown
    }
    said = [f"{_OUTCOMES[outcome][0]}{rank.beaten} (p = {rank.p_value:.2g})" for outcome, rank in ranks.items()]
    return f"{len(part)} {name}: beats {', '.join(said)}"


def _values(row: Any, shown: list[str]) -> str:
    said = {"accuracy": f"{100 * row['accuracy']:.1f} %"}
    if "log_probability" in shown:
        said["log_probability"] = f"{row['log_probability']:.2f} nats".replace("-", "\N{MINUS SIGN}")
    return ", ".join(said.values())


def _kinds(
    rows: pd.DataFrame, rule: str, k: int, strength: float, drawn: str
) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """(what they are, colour, hatch, their rows) of every kind of random sets of one graft."""
    own = rows[(rows["rule"] == rule) & (rows.k == k) & rows.role.isin(["random", WEIGHTS])]
    names = own["set"].astype(str).str.split("-").str[0]
    for kind, (said, colour, hatch) in _KINDS.items():
        part = own[names == kind]
        if kind in ("set", "refitted"):
            part = part[part.strength == strength]
        elif kind == "tuned":
            # where the graft's own strength suits them best, they are the random sets again
            part = part[part.strength != strength]
        if len(part):
            yield said.format(strength=part.strength.iloc[0], drawn=drawn), colour, hatch, part
