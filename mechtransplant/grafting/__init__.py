"""Weight grafts: ``graft`` (which modules, how strongly), ``operators`` and ``low_rank`` (by which equation),
``applied`` (in place), ``conditional`` (for some passes or questions), ``gate`` (for questions like a task's),
``effects`` (of each alone)."""

from mechtransplant.grafting.applied import Applied
from mechtransplant.grafting.conditional import ConditionalGraft
from mechtransplant.grafting.effects import graft_effects
from mechtransplant.grafting.gate import Gate, fit_gate
from mechtransplant.grafting.graft import KV, Graft, addresses_of, depth_curve, layer_swap
from mechtransplant.grafting.low_rank import LowRank
from mechtransplant.grafting.operators import OPERATORS, Operator, get_operator, list_operators

__all__ = [
    "KV",
    "OPERATORS",
    "Applied",
    "ConditionalGraft",
    "Gate",
    "Graft",
    "LowRank",
    "Operator",
    "addresses_of",
    "depth_curve",
    "fit_gate",
    "get_operator",
    "graft_effects",
    "layer_swap",
    "list_operators",
]
