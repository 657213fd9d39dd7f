"""mechtransplant: find the modules of a language model that carry a skill, graft them into its sibling, and measure.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "UsageError": "errors",
    "load_pair": "pair",
    "list_pairs": "weights",
    "load_task": "tasks",
    "list_tasks": "tasks",
    "register_task": "tasks",
    "Task": "tasks",
    "Example": "tasks",
    "PromptFormat": "tasks",
    "rank_modules": "ranking",
    "list_rules": "ranking",
    "register_rule": "ranking",
    "random_matched": "controls",
    "random_orders": "controls",
    "graft_with_controls": "controls",
    "Graft": "grafting",
    "depth_curve": "grafting",
    "layer_swap": "grafting",
    "ConditionalGraft": "grafting",
    "fit_gate": "grafting",
    "graft_effects": "grafting",
    "Patch": "patching",
    "MeanShift": "patching",
    "mean_shift": "patching",
    "Ablation": "patching",
    "reference_activations": "patching",
    "ablate_heads_and_mlps": "patching",
    "patch_effects": "patching",
    "patch_versus_graft": "patching",
    "list_operators": "grafting",
    "cache_activations": "activations",
    "load_activations": "activations",
    "measure_shifts": "shifts",
    "summarize_shifts": "shifts",
    "shift_vectors": "shifts",
    "shifts_and_vectors": "shifts",
    "average_by_template": "shifts",
    "test_shifts": "significance",
    "power": "significance",
    "prompts_needed": "significance",
    "smallest_effect": "significance",
    "mcnemar_power": "significance",
    "effective_tests": "significance",
    "fit_strengths": "ranking",
    "consistency": "localization",
    "concentration": "localization",
    "lorenz_curve": "localization",
    "topk_stability": "localization",
    "evaluate": "evaluation",
    "compare": "evaluation",
    "measure_side_effects": "side_effects",
    "side_effect_baseline": "side_effects",
    "neutral_texts": "side_effects",
    "load_texts": "side_effects",
    "pareto_front": "side_effects",
    "export_graft": "export",
    "export_adapter": "export",
    "verify_export": "export",
    "run_experiment": "experiment",
    "runs_table": "experiment",
    "recheck": "experiment",
    "bench_planted": "experiment",
    "explore": "explorer",
    "sized": "notebook",
}

#: whole packages, for their other names: mt.figures.volcano, mt.grafting.operators.Ties
_PACKAGES = (
    "errors",
    "evaluation",
    "export",
    "figures",
    "grafting",
    "localization",
    "patching",
    "side_effects",
    "significance",
    "tasks",
)

__all__ = [*_HOME, *_PACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"mechtransplant.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'mechtransplant' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mechtransplant.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
