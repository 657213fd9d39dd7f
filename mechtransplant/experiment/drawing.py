"""Every figure of a finished folder, drawn from the folder's tables alone, so that anyone can draw it again.

A run, and every other command that draws, writes its tables first and then calls :func:`draw`, so the figures say what
the files say; equal tables give equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mechtransplant import figures
from mechtransplant.errors import UsageError
from mechtransplant.grafting import get_operator

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: a file that only one kind of folder has → the command that makes such folders
KINDS = {
    "outcome.json": "run",
    "shifts.parquet": "shifts",
    "effects.csv": "effects",
    "study.csv": "heads-vs-mlps",
    "summary.csv": "bench planted",
    "screen.csv": "screen",
}


class Drawing(NamedTuple):
    """A figure, its name, and the rows that it shows (None where a table of the folder is all of them)."""

    name: str
    figure: Figure
    data: pd.DataFrame | None = None


def kind_of(folder: Path) -> str | None:
    """The command that finished a folder; None for what none did."""
    return next((kind for name, kind in KINDS.items() if (folder / name).exists()), None)


def draw(folder: str | Path, out: str | Path | None = None) -> list[str]:
    """Draw a finished folder's figures into ``out`` (by default its own ``figures``), and return their names.

    Each is a PNG, a PDF and an SVG file that holds the folder's fingerprint, with its rows as CSV beside it.

    Raises UsageError for what is no finished folder.
    """
    where = Path(folder) / "figures" if out is None else Path(out)
    if where.exists() and not where.is_dir():
        raise UsageError(f"{where} is a file: give --out the name of a folder")
    names = []
    for name, figure, data in drawings(folder):
        figures.save_figure(figure, where, name, data, run=fingerprint_of(Path(folder)))
        names.append(name)
    return names


def drawings(folder: str | Path) -> Iterator[Drawing]:
    """A finished folder's figures, one after another; raises UsageError for what is no finished folder."""
    folder = Path(folder)
    kind = kind_of(folder) if folder.is_dir() else None
    if kind is None:
        raise UsageError(f"{folder} holds no finished run: give a folder that mechtransplant run (or shifts, …) wrote")
    try:
        yield from _DRAWN[kind](folder)
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is not finished: it lacks {Path(str(error.filename)).name}") from error


def fingerprint_of(folder: Path) -> str:
    """Sixteen hexadecimal digits of what a folder's numbers depend on besides versions: config, weights, questions."""
    content = {**_json(folder / "environment.json"), "config": _config(folder)}
    # when it ran, and a name that was not always noted, change no number
    for key in ("starts", "pair"):
        content.pop(key, None)
    # a benchmark's pairs and rules may still be joined by others
    rows = folder / "results.csv"
    content["rows"] = hashlib.sha256(rows.read_bytes()).hexdigest() if rows.exists() else None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _of_run(folder: Path) -> Iterator[Drawing]:
    import pandas as pd

    from mechtransplant.experiment.config import read_config
    from mechtransplant.experiment.jobs import WEIGHTS
    from mechtransplant.experiment.random_weights import drawn_beside
    from mechtransplant.experiment.rankings import read_ranking
    from mechtransplant.experiment.summary_effects import label_of
    from mechtransplant.side_effects import pareto_front

    config, title = read_config(folder / "config.yaml"), _pair_of(folder)
    results = pd.read_parquet(folder / "results.parquet")
    chosen = {int(b): found for b, found in _json(folder / "outcome.json").items()}
    budget, headline = int(results.budget.max()), config.rules[0]
    k = len(chosen[budget]["modules"])
    ranking = read_ranking(folder, config, headline, k)
    candidates = len(ranking)
    # verdicts question by question are no figure's
    results = results.drop(columns=["correct", "digest", "beside"], errors="ignore")
    test = results[results.split == "test"]
    at, own = test[test.budget == budget], results["rule"].isin(["", headline])
    strength = chosen[budget]["strength"]
    roles = at.role.isin(["target", "source"]) | (
        at.role.isin(["graft", "all"]) & (at.strength == strength) & (at.k == k)
    )
    sets = (at["rule"] == headline) & (at.k == k) & ~at["set"].astype(str).str.startswith("order")
    sets &= at.role.isin(["random", WEIGHTS])
    # one K is no curve: its random sets are drawn below
    if at[(at.role == "graft") & (at["rule"] == headline)].k.nunique() > 1 or not sets.any():
        # sets of a K that another token budget chose are no sets of this one's
        elsewhere = (at.role == "random") & at["set"].astype(str).str.startswith("set") & (at.k != k)
        curve = at[own[at.index] & ~elsewhere]
        figure, _ = figures.k_curve(curve, "test", budget, candidates, headline, title)
        yield Drawing("k_curve", figure, curve)
    if sets.any():
        rows = at[(roles & own[at.index]) | sets]
        what = drawn_beside(config.operator).what if (rows.role == WEIGHTS).any() else "changes"
        drawn = f"draws of as many {what}"
        by = get_operator(config.operator).name
        whole = "graft of everything" if by == "replace" else f"graft of all modules by {by}"
        figure, _ = figures.against_chance(rows, headline, k, strength, title=title, drawn=drawn, whole=whole)
        yield Drawing("against_chance", figure, rows)
    if len(config.rules) > 1:
        figure, _ = figures.rule_curves(at, budget, candidates, list(config.rules), title=title)
        yield Drawing("rule_curves", figure, at)
    if len(chosen) > 1:
        marked = {b: len(found["modules"]) for b, found in chosen.items()}
        figure, _ = figures.budget_grid(test, headline, strength=strength, chosen=marked, title=title)
        grafts = test[own[test.index] & ~test.role.isin(["random", WEIGHTS])]
        yield Drawing("budget_grid", figure, grafts)
    if results[(results.role == "graft") & (results["rule"] == headline)].strength.nunique() > 1:
        operator = config.operator if isinstance(config.operator, str) else str(config.operator["name"])
        figure, _ = figures.strength_curve(results, headline, title=title, operator=operator)
        shown = own & (results.split == "choose") & ~results.role.isin(["random", WEIGHTS])
        yield Drawing("strength_curve", figure, results[shown])
    if (folder / "plane.csv").exists():
        plane = pd.read_csv(folder / "plane.csv")
        named = plane.assign(label=[label_of(row) for row in plane.to_dict("records")])
        if "harm" in named:
            yield Drawing("gain_against_harm", figures.gain_against_harm(named, title=title)[0], named)
        # of a graft that overflows it is not known
        named = named.dropna(subset=["kl"]) if {"harm", "kl"} <= set(named.columns) else named[:0]
        if len(named):
            grafts = pareto_front(named[named.role != "random"], harm="kl")
            both = pd.concat([grafts, named[named.role == "random"]], ignore_index=True)
            yield Drawing("gain_against_kl", figures.gain_against_harm(both, harm="kl", title=title)[0], both)
    if config.kinds == ("linear",):
        yield Drawing("score_heatmap", figures.score_heatmap(ranking, k, title, f"score by\n{headline}")[0], ranking)


def _of_shifts(folder: Path) -> Iterator[Drawing]:
    import pandas as pd

    from mechtransplant.localization import lorenz_curve

    config, name = _config(folder), _pair_of(folder)
    shifts, table = pd.read_parquet(folder / "shifts.parquet"), pd.read_csv(folder / "table.csv")
    if {"head", "mlp"} & set(config["kinds"]):
        against = table.test == "control"
        for measure in dict.fromkeys(table[~against].measure):
            rows = table[~against & (table.measure == measure)]
            title = f"{name}: {rows.test.iloc[0]}"
            yield Drawing(f"heatmap_{measure}", figures.shift_heatmap(rows, title=title)[0], rows)
        for measure in dict.fromkeys(table[against].measure):
            rows = table[against & (table.measure == measure)]
            title = f"{name}: task against control"
            yield Drawing(f"heatmap_{measure}_control", figures.shift_heatmap(rows, title=title)[0], rows)
    magnitude = table[(table.measure == "magnitude") & (table.test == "sign-flip")]
    yield Drawing("volcano", figures.volcano(magnitude, title=name)[0], magnitude)
    alike = pd.read_csv(folder / "consistency.csv")
    yield Drawing("consistency", figures.consistency_plot(alike, title=name)[0], alike)
    # models that differ outside the layers alone have none
    if (shifts[shifts.measure == "own"].value > 0).any():
        curve = lorenz_curve(shifts, "own", seed=config["seed"])
        yield Drawing("lorenz", figures.lorenz(curve, f"{name}: own shift")[0], curve)
    both = shifts[shifts.measure.isin(["own", "inherited"])]
    means = both.groupby(["module", "measure"], sort=False, observed=True)["value"].mean().reset_index()
    figure, _ = figures.own_against_inherited(means, _planted_in(config["pair"]), title=name)
    yield Drawing("own_against_inherited", figure, means)


def _of_effects(folder: Path) -> Iterator[Drawing]:
    import pandas as pd

    table, title = pd.read_csv(folder / "effects.csv"), f"{_pair_of(folder)}, n = "
    planted = _planted_in(_config(folder)["pair"])
    figure, _ = figures.patch_versus_graft_plot(table, planted, title=f"{title}{int(table.n.iloc[0])}")
    yield Drawing("patch_versus_graft", figure, table)


def _of_heads_and_mlps(folder: Path) -> Iterator[Drawing]:
    import pandas as pd

    table = pd.read_csv(folder / "study.csv")
    # free-form answers of a model without an end token have no log-probability
    outcome: Any = "log_probability" if table.log_probability_change.notna().all() else "accuracy"
    drawn: dict[str, dict[str, Any]] = {
        "heads_against_mlps": {"outcome": "accuracy"},
        f"heads_against_mlps_{outcome}": {"outcome": outcome},
    }
    if (table.depth != "all").any():
        drawn["heads_against_mlps_by_depth"] = {"outcome": outcome, "by": "depth"}
    for name, options in drawn.items():
        yield Drawing(name, figures.heads_against_mlps_bars(table, **options, title=_pair_of(folder))[0], table)


def _of_planted(folder: Path) -> Iterator[Drawing]:
    import pandas as pd

    rows = pd.read_csv(folder / "results.csv")
    yield Drawing("planted_benchmark", figures.planted_benchmark(rows)[0], rows)


def _of_screen(folder: Path) -> Iterator[Drawing]:
    import pandas as pd

    rows = pd.read_csv(folder / "screen.csv")
    if rows.log_probability.notna().any():
        yield Drawing("recipe_curves", figures.recipe_curves(rows, title=_pair_of(folder))[0], rows)


_DRAWN: Mapping[str, Any] = {
    "run": _of_run,
    "shifts": _of_shifts,
    "effects": _of_effects,
    "heads-vs-mlps": _of_heads_and_mlps,
    "bench planted": _of_planted,
    "screen": _of_screen,
}


def _config(folder: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _pair_of(folder: Path) -> str:
    """The pair's name, as it was turned; folders from before it was noted have the config's."""
    noted = _json(folder / "environment.json").get("pair")
    pair = _config(folder)["pair"]
    return str(noted or (pair if isinstance(pair, str) else f"{pair['source']} → {pair['target']}"))


def _planted_in(pair: Any) -> tuple[str, ...]:
    """The modules that are planted in a pair of this project."""
    from mechtransplant.errors import UnknownNameError
    from mechtransplant.weights import get_pair

    try:
        return get_pair(pair).planted
    except UnknownNameError:
        return ()
