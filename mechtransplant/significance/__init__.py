"""Tests, corrections, intervals and power, on numpy, scipy and tidy frames alone; nothing here knows a model.

``accuracy`` (paired accuracies), ``paired`` (their score intervals), ``permutation`` (sign-flips and label permutations
of many modules at once), ``corrections``, ``effects`` (effect sizes with bootstrap intervals), ``power``, and ``table``
(:func:`test_shifts`).
"""

from mechtransplant.significance.accuracy import (
    bootstrap_indices,
    mcnemar_exact,
    mcnemar_power,
    percentile_interval,
    rank_p_value,
    wilson_interval,
)
from mechtransplant.significance.corrections import CORRECTIONS, adjust
from mechtransplant.significance.detection import auroc, average_precision, precision_at
from mechtransplant.significance.effects import Effects, one_sample_effects, two_sample_effects
from mechtransplant.significance.paired import (
    accuracy_ratio_interval,
    paired_difference_interval,
    recovery_interval,
)
from mechtransplant.significance.permutation import Permuted, label_permutation, sign_flip
from mechtransplant.significance.power import effective_tests, power, prompts_needed, smallest_effect
from mechtransplant.significance.ranks import SAME_NATS, CurveRank, RankAmong, curve_area, curve_rank, rank_among
from mechtransplant.significance.table import NORMS, SIGNED, TESTS, shift_matrix, test_shifts

__all__ = [
    "CORRECTIONS",
    "NORMS",
    "SAME_NATS",
    "SIGNED",
    "TESTS",
    "CurveRank",
    "Effects",
    "Permuted",
    "RankAmong",
    "accuracy_ratio_interval",
    "adjust",
    "auroc",
    "average_precision",
    "bootstrap_indices",
    "curve_area",
    "curve_rank",
    "effective_tests",
    "label_permutation",
    "mcnemar_exact",
    "mcnemar_power",
    "one_sample_effects",
    "paired_difference_interval",
    "percentile_interval",
    "power",
    "precision_at",
    "prompts_needed",
    "rank_among",
    "rank_p_value",
    "recovery_interval",
    "shift_matrix",
    "sign_flip",
    "smallest_effect",
    "test_shifts",
    "two_sample_effects",
    "wilson_interval",
]
