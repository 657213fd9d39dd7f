"""What a finished run found: its pair, the graft that it chose, and the outcome on questions that chose nothing."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import Change, Outcome, Truncation
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair, load_pair
from mechtransplant.selection import remembering
from mechtransplant.significance import CurveRank, RankAmong


@dataclass(frozen=True)
class FinishedRun:
    """A run's pair, and its graft and outcome at the largest token budget."""

    pair: Pair
    graft: Graft
    outcome: Outcome
    task: str
    #: what it costs elsewhere, a row a task and text measure; None where the run measured none
    side_effects: Any = None


def finished_run(folder: str | Path) -> FinishedRun:
    """The result of a folder that ``mechtransplant run`` has finished, with its two models loaded.

    Raises UsageError for a folder that holds no finished run, or one of conditional grafts, and for weights that are
    not those of the run.
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
        modules = list(remembering(chosen["modules"], chosen.get("selected_on", ())))
        graft = Graft(modules, chosen.get("strengths", float(chosen["strength"])), **options)
        outcome = _outcome(chosen)
        named, where = config["pair"], {"dtype": str(config["dtype"]), **_where(config, graft)}
        weights = dict(environment["weights"])
        task = f"{environment['task']['name']} (the run's test split, which chose nothing; at most {budget} new tokens)"
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise UsageError(f"{folder} holds no finished run ({missing} is missing): finish it, then export") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, yaml.YAMLError) as error:
        raise UsageError(f"{folder} holds no finished run that can be read ({error!r}): run it again") from error
    if config.get("gate") is not None:
        raise UsageError(
            f"the graft of {folder} is in place for some questions alone (gate), which no one set of weights is: "
            "export a run without a gate"
        )
    pair = load_pair(named, **where) if isinstance(named, str) else load_pair(**named, **where)
    models = {"source": pair.source, "target": pair.target, "base": pair.base}
    now = {role: model.fingerprint for role, model in models.items() if model is not None}
    if weights == {**now, "source": now["target"], "target": now["source"]} and now != weights:
        # the run took the better of the two for its source
        pair = pair.reversed()
    elif now != weights:
        raise UsageError(
            f"the weights that {folder} names are not those that its run measured (environment.json): its outcome does "
            "not hold for them; run it again"
        )
    return FinishedRun(pair, graft, outcome, task, _side_effects(folder, graft))


def _where(config: dict[str, Any], graft: Graft) -> dict[str, Any]:
    """Where the run had its models, as options of ``load_pair``; the CPU where its devices are not here.

    Warns where the graft's numbers are then rounded otherwise.
    """
    import torch

    where = {key: config[key] for key in ("device", "one_at_a_time", "device_map") if config.get(key) is not None}
    spread = where.get("device_map", {})
    devices = ["cuda"] if spread == "auto" else [where.get("device", "cpu"), *spread.values()]
    names = [f"cuda:{device}" if isinstance(device, int) else str(device) for device in devices]
    parts = [(name, *name.partition(":")[::2]) for name in names if name not in ("cpu", "auto")]
    gone = [n for n, kind, at in parts if int(at or 0) >= torch.get_device_module(kind).device_count()]
    if not gone:
        return where
    if not getattr(graft.operator, "reproducible", True):
        warnings.warn(
            f"the run was on {gone[0]}, which is not here: on the CPU {graft.operator.name} rounds a little otherwise, "
            "so the weights are its graft's but for rounding",
            stacklevel=3,
        )
    return {key: value for key, value in where.items() if key == "one_at_a_time"}


def _side_effects(folder: Path, graft: Graft) -> dict[str, dict[str, str]] | None:
    """The graft's rows of ``side_effects.csv``, as the model card shows them."""
    import pandas as pd

    path = folder / "side_effects.csv"
    if not path.exists():
        return None
    rows = pd.read_csv(path)
    first = rows[rows.role == "graft"].rule.iloc[0]
    mine = rows[(rows.role == "graft") & (rows.rule == first) & (rows.k == len(graft))]
    found = {}
    for row in mine.to_dict("records"):
        scale, unit = (1, "nats a token") if row["what"] == "KL" else (100, "%" if row["kind"] == "text" else "points")
        change = f"{scale * row['change']:+.3g} {unit} [{scale * row['low']:.3g}, {scale * row['high']:.3g}]"
        found[str(row["what"])] = {"change [95 %]": change, "n": str(row["n"])}
    return found or None


#: the parts of an outcome that are objects of their own
_PARTS: dict[str, Any] = {
    "log_probability": Change,
    "logit_difference": Change,
    "controls": RankAmong,
    "log_probability_controls": RankAmong,
    "curve": CurveRank,
    "area_rank": RankAmong,
}


def _outcome(content: dict[str, Any]) -> Outcome:
    """An outcome from JSON, where an unbounded end of an interval is null."""
    values: dict[str, Any] = {}
    for f in fields(Outcome):
        # runs from before an outcome had this part
        value = content[f.name] if f.default is MISSING else content.get(f.name, f.default)
        if f.name == "notes":
            value = tuple(value)
        elif f.name == "truncation" and value is not None:
            value = {role: Truncation(**split) for role, split in value.items()}
        values[f.name] = _part(f.name, value)
    return Outcome(**values)


def _part(name: str, value: Any) -> Any:
    if isinstance(value, list):
        # a lower end is unbounded only together with the upper one
        low, high = value
        return (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    if name in _PARTS and isinstance(value, dict):
        return _PARTS[name](**{key: _part(key, inner) for key, inner in value.items()})
    return value
