"""Configs of the recipes that finished screens of the study chose: configs/study/PAIR-WHAT-SPLIT.yaml.

    python scripts/study_recipes.py

``best`` has the highest log-probability of the gold answers to `choose` in a split's screens (of neurons too, where
there is one), ``gentle`` (on the first split) the highest among those that raise perplexity by at most 1 %; ``gated``
is the best behind a gate, which shares its cells with it (``mechtransplant run … --reuse
runs/study-PAIR-best-SPLIT``). ``small`` and ``small-gated`` are the best with at most 5 % of the parameters, and their
random sets may go further than the screen did; ``small-sizes`` has sets of the same sizes, not projections. ``sparse``
and ``sparse-gated`` are the same of the screen of grafts that change few numbers of many modules, and are compared with
as many numbers at random; ``directions`` of the screen of low-rank grafts, beside random directions. What only a run
has is added: no random orders along K (there is one K), the limit, and on the first split alone side effects of random
sets, and random sets at the strength of the screen's that suits them best (of ``small`` on every split).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
import yaml
from study_runs import ROOT, planned

from mechtransplant.experiment.screen import best_recipe, run_config
from mechtransplant.experiment.screen_config import ScreenConfig, read_screen

CONFIGS = ROOT / "configs" / "study"


class Recipe(NamedTuple):
    """What makes a run of the best recipe of some screens: limits to its harm and size, more of the config."""

    screens: tuple[str, ...]
    said: str
    limit: float | None = None
    more: Mapping[str, Any] = MappingProxyType({})
    share: float | None = None


WHOLE, SPARSE, DIRECTIONS = ("screen", "neuron-screen"), ("sparse-screen",), ("directions-screen",)
# sets of the same sizes have K where the recipe has V, which is another question
SAME = MappingProxyType({"random_match": "projection"})
HIGHEST = "the recipe of the highest log-probability"
# with 15 % random sets at a strength of their own reach the source too: a rule shows what it knows with less
FEW, FURTHER = 0.05, {"random_strengths": [1.0, 1.5, 2.0, 3.0]}
OPEN = "behind a gate that lets this task's questions through"
RECIPES = {
    "best": Recipe(WHOLE, HIGHEST, more=SAME),
    "gated": Recipe(WHOLE, f"{HIGHEST}, {OPEN}", more={**SAME, "gate": {}}),
    "gentle": Recipe(WHOLE, f"{HIGHEST} that raises perplexity by at most 1 %", 0.01, SAME),
    "small": Recipe(WHOLE, f"{HIGHEST} with at most 5 % of the parameters", more={**SAME, **FURTHER}, share=FEW),
    "small-sizes": Recipe(
        WHOLE,
        f"{HIGHEST} with at most 5 % of the parameters, beside random sets of the same sizes",
        more=FURTHER,
        share=FEW,
    ),
    "small-gated": Recipe(
        WHOLE,
        f"{HIGHEST} with at most 5 % of the parameters, {OPEN}",
        more={**SAME, **FURTHER, "gate": {}},
        share=FEW,
    ),
    "sparse": Recipe(SPARSE, f"{HIGHEST} that changes 15 % of the numbers", more={"random_weights": 100}),
    "sparse-gated": Recipe(
        SPARSE,
        f"{HIGHEST} that changes 15 % of the numbers, {OPEN}",
        more={"random_weights": 100, "gate": {}},
    ),
    "directions": Recipe(DIRECTIONS, f"{HIGHEST} along few directions", more={"random_weights": 100}),
    "directions-gated": Recipe(
        DIRECTIONS, f"{HIGHEST} along few directions, {OPEN}", more={"random_weights": 100, "gate": {}}
    ),
}


def written(pair: str, split: int, what: str, recipe: Recipe) -> str | None:
    """The config of a recipe, or None where one of its screens is not finished or none finds any."""
    found: list[tuple[float, Path, ScreenConfig, pd.Series[Any]]] = []
    for screen in recipe.screens:
        path = CONFIGS / f"{pair}-{screen}-{split}.yaml"
        if not path.exists():
            continue
        screened = ROOT / "runs" / f"study-{path.stem}" / "screen.csv"
        # finished, and with all that the config asks for by now
        if not screened.exists() or read_screen(screened.parent / "config.yaml") != read_screen(path):
            return None
        table = pd.read_csv(screened, keep_default_na=False, na_values=[""])
        if recipe.share is not None:
            table = table[table.parameters <= recipe.share + 1e-9]
        at = best_recipe(table, recipe.limit)
        if at is not None:
            found.append((float(table.log_probability[at]), path, read_screen(path), table.loc[at]))
    if not found:
        print(f"{pair}, split {split}: no recipe is {what}")
        return None
    _, path, config, best = max(found, key=lambda one: one[0])
    content = yaml.safe_load(run_config(config, best))
    content |= {
        "name": f"study-{pair}-{what}-{split}",
        "parameters": recipe.share or max(config.shares),
        "curve_sets": 0,
    }
    content |= recipe.more
    if "random_weights" in recipe.more:
        # random numbers want another strength: both are chosen from the screen's, as the screen chose
        content |= {"strengths": list(config.strengths), "choose_by": "log_probability"}
    elif split == 0 or "random_strengths" in recipe.more:
        # and so may random modules, chosen as the screen chose too
        content.setdefault("random_strengths", list(config.strengths))
        content["choose_by"] = "log_probability"
    if split:
        # what random sets do elsewhere is measured on the first split
        content["side_effects"] = {"random": 0}
    head = f"# {recipe.said} in {path.relative_to(ROOT)}, on `choose`; no `test` question was asked for it\n"
    return head + str(yaml.safe_dump(content, sort_keys=False))


def main() -> None:
    for what, recipe in RECIPES.items():
        for pair, split in planned(what):
            content = written(pair, split, what, recipe)
            if content is not None:
                (CONFIGS / f"{pair}-{what}-{split}.yaml").write_text(content, encoding="utf-8")
                print(f"configs/study/{pair}-{what}-{split}.yaml")


if __name__ == "__main__":
    main()
