"""How a run's questions reach its models: token ids, end tokens, and the settings that no weight holds.

Two starts, or a run and one that it takes cells from, may have the same weights and questions, and a chat template or a
rotary base that somebody edited in between: their numbers are of different prompts, or of different models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import FolderError
from mechtransplant.evaluation.batches import encode
from mechtransplant.evaluation.generation import end_tokens
from mechtransplant.pair.compatibility import SETTINGS

if TYPE_CHECKING:
    from pathlib import Path

    from mechtransplant.pair import Pair
    from mechtransplant.tasks import Task


#: settings that notes lack from before they were noted; ``head_dim`` is no setting of a compatible pair, which has one
_LATER = ("head_dim", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")


def tokens_of(pair: Pair, splits: Iterable[Task]) -> dict[str, str]:
    """Split → sixteen hexadecimal digits of the token ids of its prompts and gold answers."""
    found = {}
    for split in splits:
        encoded = encode(split, pair.target.tokenizer)
        ids = json.dumps([encoded.prompts, encoded.completions]).encode()
        found[str(split.role)] = hashlib.sha256(ids).hexdigest()[:16]
    return found


def settings_of(pair: Pair) -> dict[str, Any]:
    """Role → what of the model's configuration decides its numbers besides its weights, as JSON reads it again."""
    settings = {}
    for role, model in (("source", pair.source), ("target", pair.target)):
        config = model.hf.config.get_text_config()
        known = {key: getattr(config, key, None) for key in dict.fromkeys((*SETTINGS, *_LATER))}
        settings[role] = {key: value for key, value in known.items() if value is not None}
        settings[role]["end_tokens"] = end_tokens(model)
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


def same_settings(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two notes are of the same models; what one of them was written too early to say is not compared."""
    said = [set().union(*note.values()) for note in (one, other)]
    unknown = set(_LATER) - (said[0] & said[1])
    mine, theirs = (
        {role: {key: value for key, value in model.items() if key not in unknown} for role, model in note.items()}
        for note in (one, other)
    )
    return mine == theirs


def same_asked(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs asked the same models the same prompts; see :func:`same_settings`."""
    return one["tokens"] == other["tokens"] and same_settings(one["settings"], other["settings"])


def check_asked(
    pair: Pair, tokens: dict[str, str], splits: Iterable[Task], began: dict[str, Any], folder: Path | None
) -> None:
    """Refuse cells of a run whose models or prompts were others; one from before this was noted is taken as it is."""
    theirs = began.get("asked")
    if theirs is None:
        return
    mine, other = settings_of(pair), theirs["settings"]
    # in either order: of two models the better one may be the source
    if not (same_settings(mine, other) or same_settings(mine, {"source": other["target"], "target": other["source"]})):
        raise FolderError(
            f"--reuse {folder}: its models have other settings or end tokens (see its environment.json), so its cells "
            "are of other models: leave --reuse out"
        )
    for split in splits:
        role = str(split.role)
        same = began.get("splits", {}).get(role, {}).get("fingerprint") == split.fingerprint
        if same and theirs["tokens"].get(role) != tokens[role]:
            raise FolderError(
                f"--reuse {folder}: its {role} questions became other tokens (another chat template or tokenizer), so "
                "its cells are of other prompts: leave --reuse out"
            )
