"""What the study consists of: pairs, splits, and its runs, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.experiment import runs_table

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
#: the study's runs are called study-PAIR-WHAT-SPLIT
PAIRS, SPLITS = ("generations", "instruct"), (0, 1, 2)
#: whose adapter every user trains, so that its runs are of the first split alone
ONCE = ("gemma",)
_FIRST = (0,)
_BOTH = {"generations": _FIRST, "instruct": _FIRST}
#: what → pair → the splits that it is planned on, in the order of tables and figures: the paper's method and one recipe
#: a pair on all three
PLANNED: dict[str, dict[str, tuple[int, ...]]] = {
    "paper": {"generations": SPLITS, "instruct": SPLITS, "gemma": _FIRST},
    # the paper's method beside random sets of the same projections, on a split where it chooses half of the layers
    "projections": {"generations": (1,)},
    "best": {"generations": _FIRST, "instruct": _FIRST, "gemma": _FIRST},
    # beside random sets of the same sizes, in which K stands for V: what ``best`` was compared with at first
    "sizes": {"generations": _FIRST},
    "gated": {"generations": _FIRST, "instruct": _FIRST, "gemma": _FIRST},
    # with at most 5 % of the parameters: in place of ``best`` on all three across generations, since random sets at a
    # strength of their own did as well as it on split 0
    "small": {"generations": SPLITS, "instruct": _FIRST},
    # sets of the same projections in the same thirds share most of so few layers: whether its make-up matters
    "small-sizes": {"generations": _FIRST},
    "small-gated": {"generations": SPLITS, "instruct": _FIRST},
    "sparse": {"generations": _FIRST, "instruct": _FIRST, "gemma": _FIRST},
    "sparse-gated": {"generations": _FIRST, "instruct": _FIRST, "gemma": _FIRST},
    # in place of ``sparse`` on all three between base and tuned, since split 0 had both
    "directions": {"generations": _FIRST, "instruct": SPLITS},
    "directions-gated": {"generations": _FIRST, "instruct": SPLITS},
    "gentle": _BOTH,
    "pruned": {"instruct": _FIRST},
    "pruned-gated": {"instruct": _FIRST},
    "number": {"instruct": _FIRST},
    "heads": _BOTH,
    "mlps": _BOTH,
}


#: those that a screen chose, or a rule that fits strengths
RECIPE_RUNS = tuple(what for what in PLANNED if what not in ("paper", "projections", "number", "heads", "mlps"))


def planned(what: str) -> list[tuple[str, int]]:
    """(pair, split) of the runs of a kind."""
    return [(pair, split) for pair, splits in PLANNED[what].items() for split in splits]


def folders(what: str, pair: str | None = None, runs: Path = ROOT / "runs") -> list[Path]:
    """The finished runs of a kind."""
    named = [runs / f"study-{p}-{what}-{s}" for p, s in planned(what) if pair in (None, p)]
    return [folder for folder in named if (folder / "outcome.json").exists()]


def recipe_of(row: dict[Any, Any]) -> str:
    """A run's recipe in words: rule, kind, operator and strength."""
    strength = "a strength each" if row["rule"] == "pruned" else f"strength {row['strength']:g}"
    gated = ", behind a gate" if row["gate"] else ""
    # of everything the rule says nothing
    which = f"all, {row['kind']}" if row["k"] == row["candidates"] else f"`{row['rule']}`, {row['kind']}"
    return f"{which}, {row['operator']}, {strength}{gated}"


def study_rows(runs: Path = ROOT / "runs") -> pd.DataFrame:
    """One row a finished run of the study (and rule), as ``runs_table`` has them, with a ``label`` for figures."""
    import pandas as pd

    found = [f for pair in (*PAIRS, *ONCE) for what in PLANNED for f in folders(what, pair, runs)]
    if not found:
        return pd.DataFrame()
    table = runs_table(found)
    what = table.run.str.extract(r"study-(\w+?)-([\w-]+)-(\d)")
    size = table.k.astype(str) + " of " + table.candidates.astype(str)
    rule = table["rule"].where(table.k != table.candidates, "all")
    table["label"] = what[0] + " " + what[2] + ", " + what[1] + ": " + rule + ", " + size
    return table
