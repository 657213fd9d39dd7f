"""Configs of the recipes that finished screens of the study chose: configs/study/PAIR-WHAT-SPLIT.yaml.

    python scripts/study_recipes.py

``best`` has the highest log-probability of the gold answers to `choose`, ``gentle`` (on the first split) the highest
among those that raise perplexity by at most 1 %; ``gated`` is the best behind a gate, which shares its cells with it
(``mechtransplant run … --reuse runs/study-PAIR-best-SPLIT``). ``sparse`` and ``sparse-gated`` are the same of the
screen of grafts that change few numbers of many modules; they are compared with as many numbers at random. What only a
run has is added: no random orders along K (there is one K), the limit of 15 %, side effects of random sets on the first
split alone.
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
from mechtransplant.experiment.screen_config import read_screen


class Recipe(NamedTuple):
    """What makes a run of a screen's best recipe: the limit to the rise of perplexity, more of the config, in words."""

    screen: str
    said: str
    limit: float | None = None
    more: Mapping[str, Any] = MappingProxyType({})


HIGHEST = "the recipe of the highest log-probability"
OPEN = "behind a gate that lets this task's questions through"
RECIPES = {
    "best": Recipe("screen", HIGHEST),
    "gated": Recipe("screen", f"{HIGHEST}, {OPEN}", more={"gate": {}}),
    "gentle": Recipe("screen", f"{HIGHEST} that raises perplexity by at most 1 %", 0.01),
    "sparse": Recipe("sparse-screen", f"{HIGHEST} that changes 15 % of the numbers", more={"random_weights": 100}),
    "sparse-gated": Recipe(
        "sparse-screen",
        f"{HIGHEST} that changes 15 % of the numbers, {OPEN}",
        more={"random_weights": 100, "gate": {}},
    ),
}


def written(path: Path, what: str, recipe: Recipe) -> str | None:
    """The config of a recipe from a screen's config, or None where the screen is not finished or finds none."""
    config = read_screen(path)
    screened = ROOT / "runs" / config.name / "screen.csv"
    pair = path.stem.split("-")[0]
    if not screened.exists() or (pair, config.split.seed) not in planned(what):
        return None
    table = pd.read_csv(screened, keep_default_na=False, na_values=[""])
    at = best_recipe(table, recipe.limit)
    if at is None:
        print(f"{path.stem}: no recipe is {what}")
        return None
    content = yaml.safe_load(run_config(config, table.loc[at]))
    content |= {"name": f"study-{pair}-{what}-{config.split.seed}", "parameters": max(config.shares), "curve_sets": 0}
    content |= recipe.more
    if "random_weights" in recipe.more:
        # random numbers want another strength: both are chosen from the screen's, as the screen chose
        content |= {"strengths": list(config.strengths), "choose_by": "log_probability"}
    if config.split.seed:
        # what random sets do elsewhere is measured on the first split
        content["side_effects"] = {"random": 0}
    head = f"# {recipe.said} in {path.relative_to(ROOT)}, on `choose`; no `test` question was asked for it\n"
    return head + str(yaml.safe_dump(content, sort_keys=False))


def main() -> None:
    for what, recipe in RECIPES.items():
        for path in sorted((ROOT / "configs" / "study").glob(f"*-{recipe.screen}-[0-9].yaml")):
            pair, split = path.stem.split("-")[0], path.stem.split("-")[-1]
            if path.stem != f"{pair}-{recipe.screen}-{split}":
                continue
            content = written(path, what, recipe)
            if content is not None:
                (path.parent / f"{pair}-{what}-{split}.yaml").write_text(content, encoding="utf-8")
                print(f"configs/study/{pair}-{what}-{split}.yaml")


if __name__ == "__main__":
    main()
