"""What a finished run found: its pair, the graft that it chose, and the outcome on questions that chose nothing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import Outcome
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair, load_pair


@dataclass(frozen=True)
class FinishedRun:
    """A run's pair, and its graft and outcome at the largest token budget."""

    pair: Pair
    graft: Graft
    outcome: Outcome
    task: str


def finished_run(folder: str | Path) -> FinishedRun:
    """The result of a folder that ``mechtransplant run`` has finished, with its two models loaded.

    Raises UsageError for a folder that holds no finished run, and for weights that are not those of the run.
    """
    import yaml

    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"no run at {folder}: give the folder of a finished run, for example runs/demo")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        found = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        budget = max(found, key=int)
        chosen = found[budget]
        # runs of before these could be chosen had the defaults
        options = {"kv": chosen.get("kv", "never"), "operator": chosen.get("operator", "replace")}
        graft = Graft(chosen["modules"], float(chosen["strength"]), **options)
        outcome = _outcome(chosen)
        named, dtype = config["pair"], str(config["dtype"])
        weights = dict(environment["weights"])
        task = f"{environment['task']['name']} (the run's test split, which chose nothing; at most {budget} new tokens)"
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise UsageError(f"{folder} holds no finished run ({missing} is missing): finish it, then export") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(f"{folder} holds no finished run that can be read ({error!r}): run it again") from error
    pair = load_pair(named, dtype=dtype) if isinstance(named, str) else load_pair(**named, dtype=dtype)
    now = {"source": pair.source.fingerprint, "target": pair.target.fingerprint}
    if now == {"source": weights.get("target"), "target": weights.get("source")} and now != weights:
        # the run took the better of the two for its source
        pair = pair.reversed()
    elif now != weights:
        raise UsageError(
            f"the weights that {folder} names are not those that its run measured (environment.json): its outcome does "
            "not hold for them; run it again"
        )
    return FinishedRun(pair, graft, outcome, task)


def _outcome(content: dict[str, Any]) -> Outcome:
    """An outcome from JSON, where an unbounded end of an interval is null."""
    values: dict[str, Any] = {}
    for f in fields(Outcome):
        # runs from before the outcome said its questions
        value = content.get(f.name, "") if f.name in ("task", "role", "questions") else content[f.name]
        if f.name == "notes":
            value = tuple(value)
        elif isinstance(value, list):
            value = tuple(math.inf if end is None else float(end) for end in value)
        values[f.name] = value
    return Outcome(**values)
