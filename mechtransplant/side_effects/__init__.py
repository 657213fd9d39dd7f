"""What a graft does elsewhere: accuracy on other tasks, perplexity and KL to the target on neutral text.

``neutral`` (the text), ``divergence`` (two models on one text), ``measure`` (:func:`measure_side_effects`), ``pareto``
(grafts that no other beats in both gain and harm). Equations, signs and intervals: docs/side_effects.md.
"""

from mechtransplant.side_effects.divergence import Divergence, text_divergence
from mechtransplant.side_effects.measure import Baseline, SideEffects, measure_side_effects, side_effect_baseline
from mechtransplant.side_effects.neutral import NeutralText, load_texts, neutral_texts
from mechtransplant.side_effects.pareto import pareto_front

__all__ = [
    "Baseline",
    "Divergence",
    "NeutralText",
    "SideEffects",
    "load_texts",
    "measure_side_effects",
    "neutral_texts",
    "pareto_front",
    "side_effect_baseline",
    "text_divergence",
]
