"""Two models of one shape: ``model`` (one model with its hook points), ``compatibility`` (what matches), ``pair``."""

from mechtransplant.pair.compatibility import Compatibility, compare_models
from mechtransplant.pair.model import LanguageModel, copy_without_hooks, holds_copies
from mechtransplant.pair.pair import Pair, grafts_on, load_pair, make_pair

__all__ = [
    "Compatibility",
    "LanguageModel",
    "Pair",
    "compare_models",
    "copy_without_hooks",
    "grafts_on",
    "holds_copies",
    "load_pair",
    "make_pair",
]
