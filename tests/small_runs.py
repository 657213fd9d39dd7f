"""A run that takes seconds, which tests of runs share."""

from __future__ import annotations

from typing import Any


def small(**changes: Any) -> dict[str, Any]:
    """A run's config as a mapping."""
    return {
        "name": "small",
        "pair": "family/generations",
        "task": "addition",
        "random_sets": 4,
        "curve_sets": 3,
        "side_effects": {"questions": 16, "texts": 4, "tokens": 8, "random": 1},
        "split": {"discover": 16, "choose": 24, "test": 48},
        **changes,
    }
