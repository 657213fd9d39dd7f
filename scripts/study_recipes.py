"""The configs of the recipes that finished screens of the study chose: configs/study/PAIR-{best,gentle}-SPLIT.yaml.

    python scripts/study_recipes.py

``best`` has the highest log-probability of the gold answers to `choose`, ``gentle`` the highest among those that raise
perplexity by at most 1 %. What only a run has is added: no random orders along K (there is one K), the limit of 15 %,
side effects of random sets on the first split alone.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

from mechtransplant.experiment.screen import best_recipe, run_config
from mechtransplant.experiment.screen_config import read_screen

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "best": (None, "the recipe of the highest log-probability"),
    "gentle": (0.01, "the recipe of the highest log-probability that raises perplexity by at most 1 %"),
}


def main() -> None:
    for path in sorted((ROOT / "configs" / "study").glob("*-screen-*.yaml")):
        config = read_screen(path)
        screened = ROOT / "runs" / config.name / "screen.csv"
        if not screened.exists():
            continue
        table = pd.read_csv(screened, keep_default_na=False, na_values=[""])
        for what, (limit, said) in LIMITS.items():
            at = best_recipe(table, limit)
            if at is None:
                print(f"{path.stem}: no recipe is {what}")
                continue
            stem = path.stem.replace("screen", what)
            content = yaml.safe_load(run_config(config, table.loc[at]))
            content |= {"name": f"study-{stem}", "parameters": max(config.shares), "curve_sets": 0}
            if config.split.seed:
                # what random sets do elsewhere is measured on the first split
                content["side_effects"] = {"random": 0}
            head = f"# {said} in {path.relative_to(ROOT)}, on `choose`; no `test` question was asked for it\n"
            (path.parent / f"{stem}.yaml").write_text(head + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            print(f"configs/study/{stem}.yaml")


if __name__ == "__main__":
    main()
