"""A graft as a mergekit recipe, where mergekit can say it: whole tensors, and equations that it has.

The recipe names every tensor that moves by a filter (mergekit takes a filter for a part of a tensor's name) and gives
it the graft's strength; every other tensor has weight 1 for the target and 0 for the rest, which leaves its numbers as
they are. At strength 1 the result is the export number by number (mergekit writes −0.0 as 0.0), else within rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mechtransplant.export.tensors import dtype_name
from mechtransplant.grafting import Graft
from mechtransplant.modules import Region
from mechtransplant.pair import Pair
from mechtransplant.weights import HUB_NAME

RECIPE = "mergekit.yaml"
#: the part of a name that mergekit's own names have too: it calls GPT-2's blocks ``h.0``, not ``transformer.h.0``
_FROM_BLOCK = re.compile(r"(?:layers|h|blocks)\.\d+\..*$")


def recipe(pair: Pair, graft: Graft, regions: dict[Region, float], saved: Iterable[str]) -> tuple[str | None, str]:
    """The recipe's text and "", or None and why there is none; ``saved`` are the names of all saved tensors."""
    strengths, reason = _strengths(pair, graft, regions)
    if not reason and pair.target_parameters:
        strengths = {name: s for name, s in strengths.items() if s != 0}
        filters, reason = _filters(strengths, list(saved))
    if reason:
        return None, reason
    import yaml

    models = {role: _reference(role, getattr(pair, role).name) for role in ("target", "source")}
    content: dict[str, Any]
    if graft.operator.name == "slerp":
        content = {
            "merge_method": "slerp",
            "base_model": models["target"],
            "models": [{"model": models["target"]}, {"model": models["source"]}],
            "parameters": {"t": _setting(filters, lambda s: s, 0.0)},
        }
    elif graft.operator.name == "ties":
        operator: Any = graft.operator
        settings = {
            "weight": _setting(filters, lambda s: s, 0.0),
            "density": _setting(filters, lambda s: operator.density, 1.0),
        }
        content = {
            "merge_method": "ties",
            "base_model": models["target"],
            "models": [{"model": models["target"]}, {"model": models["source"], "parameters": settings}],
            "parameters": {"normalize": False},
        }
    else:
        weights: dict[str, Any] = {
            "target": _setting(filters, lambda s: 1 - s, 1.0),
            "source": _setting(filters, lambda s: s, 0.0),
        }
        if graft.operator.name == "task_arithmetic" and pair.base is not None:
            # t + λ (s − b) as a sum of three, because mergekit's own would round every tensor of the model
            models["base"] = _reference("base", pair.base.name)
            weights["target"] = 1.0
            weights["base"] = _setting(filters, lambda s: -s, 0.0)
        content = {
            "merge_method": "linear",
            "base_model": models["target"],
            "models": [{"model": models[role], "parameters": {"weight": w}} for role, w in weights.items()],
            "parameters": {"normalize": False},
        }
    content["dtype"] = dtype_name(next(iter(pair.target_parameters.values())))
    return "\n".join(_comments(models)) + "\n" + yaml.safe_dump(content, sort_keys=False), ""


def _strengths(pair: Pair, graft: Graft, regions: dict[Region, float]) -> tuple[dict[str, float], str]:
    """Parameter → strength, or the reason why mergekit cannot say the graft."""
    operator = graft.operator
    if operator.name == "slerp":
        if getattr(operator, "threshold", None) != type(operator)().threshold:  # type: ignore[attr-defined]
            return {}, "mergekit's slerp has its own threshold between arc and line"
    elif operator.name == "ties":
        if pair.base is not None or getattr(operator, "normalize", None):
            return {}, "mergekit's ties with an ancestor would round every tensor of the model"
    elif operator.name not in ("replace", "linear", "task_arithmetic"):
        how = "not known to" if operator.name == "low_rank" else "computed or drawn differently by"
        return {}, f"the operator {operator.name!r} is {how} mergekit"
    parts: dict[str, list[tuple[Region, float]]] = {}
    for region, strength in regions.items():
        parts.setdefault(region.parameter, []).append((region, strength))
    found = {}
    for name, members in parts.items():
        first = members[0][0]
        tensor = pair.target_parameters[name]
        if first.axis is not None:
            covered = sum(r.stop - r.start for r, _ in members) == tensor.shape[first.axis]
            same = len({s for _, s in members}) == 1 and operator.name not in ("slerp", "ties")
            if not (covered and same):
                return {}, f"{first} is part of a tensor, and mergekit merges whole ones"
        found[name] = members[0][1]
    return found, ""


def _filters(strengths: dict[str, float], saved: list[str]) -> tuple[dict[str, float], str]:
    """Filter → strength: the shortest sure part of each tensor's name, weight and bias in one where both move alike."""
    found: dict[str, float] = {}
    for name, strength in strengths.items():
        match = _FROM_BLOCK.search(name)
        text = match[0] if match else name
        module = text.rpartition(".")[0] + "."
        inside = [n for n in saved if module in n]
        alike = all(strengths.get(n) == strength for n in inside)
        text = module if alike else text
        if any(strengths.get(n) != strength for n in saved if text in n) or not any(text in n for n in saved):
            return {}, f"no part of {name} names that tensor alone, as mergekit's filters need"
        found[text] = strength
    return found, ""


def _setting(filters: dict[str, float], value: Any, otherwise: float) -> list[dict[str, Any]]:
    """mergekit's list of conditions, the first that fits decides."""
    return [*({"filter": f, "value": value(s)} for f, s in filters.items()), {"value": otherwise}]


def _reference(role: str, spec: str) -> str:
    """What mergekit can load: a name on the hub, else a placeholder."""
    on_hub = HUB_NAME.fullmatch(spec) and not Path(spec).exists()
    return spec if on_hub else role.upper()


def _comments(models: dict[str, str]) -> list[str]:
    placeholders = [model for role, model in models.items() if model == role.upper()]
    lines = ["# This graft as a mergekit recipe: mergekit-yaml mergekit.yaml OUT"]
    if placeholders:
        what = " and ".join(placeholders)
        lines.append(f"# {what}: replace by Hugging Face folders of the models that manifest.json names under pair")
    return lines
