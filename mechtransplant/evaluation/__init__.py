"""Generation and scoring; TIR, Recovery and intervals."""

from mechtransplant.evaluation.generation import Generation, generate
from mechtransplant.evaluation.gold import GoldOutcomes, gold_outcomes, gold_passes, gold_scores, gold_variants
from mechtransplant.evaluation.outcome import Change, Outcome, Truncation, compare
from mechtransplant.evaluation.scoring import Evaluation, evaluate, evaluate_budgets

__all__ = [
    "Change",
    "Evaluation",
    "Generation",
    "GoldOutcomes",
    "Outcome",
    "Truncation",
    "compare",
    "evaluate",
    "evaluate_budgets",
    "generate",
    "gold_outcomes",
    "gold_passes",
    "gold_scores",
    "gold_variants",
]
