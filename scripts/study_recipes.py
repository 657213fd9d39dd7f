"""Configs of the recipes that finished screens of the study chose: configs/study/PAIR-{best,gated,gentle}-SPLIT.yaml.

    python scripts/study_recipes.py

``best`` has the highest log-probability of the gold answers to `choose`, ``gentle`` (on the first split) the highest
among those that raise perplexity by at most 1 %; ``gated`` is the best behind a gate, which shares its cells with it
(``mechtransplant run … --reuse runs/study-PAIR-best-SPLIT``). What only a run has is added: no random orders along K
(there is one K), the limit of 15 %, side effects of random sets on the first split alone.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import yaml
from study_runs import ROOT, planned

from mechtransplant.experiment.screen import best_recipe, run_config
from mechtransplant.experiment.screen_config import read_screen

HIGHEST = "the recipe of the highest log-probability"
#: what → (limit to the rise of perplexity, more of the config, in words)
RECIPES: dict[str, tuple[float | None, dict[str, Any], str]] = {
    "best": (None, {}, HIGHEST),
    "gated": (None, {"gate": {}}, f"{HIGHEST}, behind a gate that lets this task's questions through"),
    "gentle": (0.01, {}, f"{HIGHEST} that raises perplexity by at most 1 %"),
}


def main() -> None:
    for path in sorted((ROOT / "configs" / "study").glob("*-screen-*.yaml")):
        config = read_screen(path)
        screened = ROOT / "runs" / config.name / "screen.csv"
        if not screened.exists():
            continue
        table = pd.read_csv(screened, keep_default_na=False, na_values=[""])
        for what, (limit, more, said) in RECIPES.items():
            pair = path.stem.split("-")[0]
            if (pair, config.split.seed) not in planned(what):
                continue
            at = best_recipe(table, limit)
            if at is None:
                print(f"{path.stem}: no recipe is {what}")
                continue
            stem = path.stem.replace("screen", what)
            content = yaml.safe_load(run_config(config, table.loc[at]))
            content |= {"name": f"study-{stem}", "parameters": max(config.shares), "curve_sets": 0, **more}
            if config.split.seed:
                # what random sets do elsewhere is measured on the first split
                content["side_effects"] = {"random": 0}
            head = f"# {said} in {path.relative_to(ROOT)}, on `choose`; no `test` question was asked for it\n"
            (path.parent / f"{stem}.yaml").write_text(head + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            print(f"configs/study/{stem}.yaml")


if __name__ == "__main__":
    main()
