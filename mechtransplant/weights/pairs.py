"""The named pairs in the repo's ``models/pairs.yaml``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from mechtransplant.errors import UnknownNameError, WeightsError


@dataclass(frozen=True)
class PairEntry:
    """A named pair: the specs of its two models and the task that it is meant for.

    ``planted`` are the modules that carry the task's skill where that is known by construction; ``tasks`` names what
    the pair's models can do, ``task`` included: side effects are measured there.
    """

    name: str
    description: str
    source: str
    target: str
    task: str
    planted: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


def models_folder() -> Path:
    """The folder of the repo's models: MECHTRANSPLANT_MODELS, else beside the package, else inside an installed one."""
    package = Path(__file__).resolve().parent.parent
    given = os.environ.get("MECHTRANSPLANT_MODELS")
    places = [Path(given)] if given else [package.parent / "models", package / "_models"]
    for place in places:
        if (place / "pairs.yaml").is_file() or (given and place.is_dir()):
            return place
    raise WeightsError(
        f"no models folder at {' or '.join(map(str, places))}: set MECHTRANSPLANT_MODELS to the repo's models/"
    )


def _pairs() -> dict[str, PairEntry]:
    import yaml

    at = models_folder() / "pairs.yaml"
    try:
        content = yaml.safe_load(at.read_text(encoding="utf-8"))
        entries = {name: PairEntry(name=name, **fields) for name, fields in content.items()}
        return {
            name: replace(entry, planted=tuple(entry.planted), tasks=tuple(entry.tasks))
            for name, entry in entries.items()
        }
    except FileNotFoundError as error:
        raise WeightsError(f"no list of pairs at {at}: give source and target instead of a pair's name") from error
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise WeightsError(f"{at}: expected name → description, source, target, task ({error})") from error


def list_pairs() -> dict[str, str]:
    """Every named pair with one line of description."""
    return {name: entry.description for name, entry in _pairs().items()}


def get_pair(name: str) -> PairEntry:
    """The pair of that name; raises UnknownNameError."""
    pairs = _pairs()
    if name not in pairs:
        raise UnknownNameError("pair", name, pairs, "Or give source and target.")
    return pairs[name]
