"""How consistent shifts are over prompts, and how concentrated in few modules; each with an interval and a null.

*Consistent*: a module shifts the same way on every prompt (``consistent``). *Localised*: few modules hold most of the
shift (``concentrated``), and the same ones whichever prompts were drawn (``stable``). Everything takes tidy shift
frames; prompts are the unit that is resampled.
"""

from mechtransplant.localization.concentrated import (
    concentration,
    effective_number,
    gini,
    lorenz_curve,
    shares,
    top_share,
)
from mechtransplant.localization.consistent import Vectors, consistency, flipped_alignments
from mechtransplant.localization.resampling import refuse_overlap
from mechtransplant.localization.stable import FEWEST_TO_HALVE, Stability, topk_stability

__all__ = [
    "FEWEST_TO_HALVE",
    "Stability",
    "Vectors",
    "concentration",
    "consistency",
    "effective_number",
    "flipped_alignments",
    "gini",
    "lorenz_curve",
    "refuse_overlap",
    "shares",
    "top_share",
    "topk_stability",
]
