"""Activation patches across models.

``patch`` (the source's activations), ``shift`` (their mean difference), ``ablation`` (without a module),
``heads_and_mlps`` (ablations of both, matched), ``effects`` (patches beside grafts); ``sites``, ``passes``,
``lockstep`` and ``applied`` are how they act.
"""

from mechtransplant.patching.ablation import Ablation, reference_activations
from mechtransplant.patching.effects import patch_versus_graft
from mechtransplant.patching.heads_and_mlps import ablate_heads_and_mlps
from mechtransplant.patching.patch import HeadPoint, Patch
from mechtransplant.patching.shift import MeanShift, mean_shift
from mechtransplant.patching.sweeps import patch_effects

__all__ = [
    "Ablation",
    "HeadPoint",
    "MeanShift",
    "Patch",
    "ablate_heads_and_mlps",
    "mean_shift",
    "patch_effects",
    "patch_versus_graft",
    "reference_activations",
]
