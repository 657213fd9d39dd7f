"""Generation and scoring; TIR, Recovery and intervals."""

from mechtransplant.evaluation.generation import Generation, generate
from mechtransplant.evaluation.outcome import Outcome, compare
from mechtransplant.evaluation.scoring import Evaluation, evaluate, evaluate_budgets, gold_scores

__all__ = ["Evaluation", "Generation", "Outcome", "compare", "evaluate", "evaluate_budgets", "generate", "gold_scores"]
