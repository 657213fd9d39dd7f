"""Which modules to graft, by which rule: ``registry``, and the rules by what they look at."""

from mechtransplant.ranking import (  # noqa: F401 (they register)
    data_free,
    from_shifts,
    gradients,
    mask,
    matched,
    patches,
    strengths,
    swaps,
)
from mechtransplant.ranking.registry import (
    RULES,
    Fitted,
    Rule,
    get_rule,
    list_rules,
    plain_modules,
    rank_modules,
    register_rule,
    rules_frame,
)
from mechtransplant.ranking.sensitivity import WeightChanges, activation_effects, weight_effects
from mechtransplant.ranking.strengths import fit_strengths

__all__ = [
    "RULES",
    "Fitted",
    "Rule",
    "WeightChanges",
    "activation_effects",
    "fit_strengths",
    "get_rule",
    "list_rules",
    "plain_modules",
    "rank_modules",
    "register_rule",
    "rules_frame",
    "weight_effects",
]
