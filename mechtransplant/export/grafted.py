"""The target with a graft in it, as a model of its own that shares every tensor that the graft leaves alone."""

from __future__ import annotations

from typing import Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation.batches import make_ready
from mechtransplant.grafting import Graft
from mechtransplant.grafting.applied import written
from mechtransplant.grafting.graft import checked
from mechtransplant.modules import Region
from mechtransplant.pair import LanguageModel, Pair, copy_without_hooks


def written_tensors(pair: Pair, graft: Graft) -> tuple[dict[Region, float], dict[str, Any]]:
    """The graft's regions, and the parameters that they lie in as the graft leaves them: name → a new tensor.

    Raises UsageError where a graft is in place already: what is exported would then not be what it is said to be.
    """
    if not isinstance(graft, Graft):
        raise UsageError(f"expected a mechtransplant.Graft, got {type(graft).__name__}")
    if pair.applied:
        raise UsageError("a graft is in place on this pair's target: leave its `with` block first, then export")
    pair.check_plain("export")
    # random choices and rounding are the device's own: written where it was measured
    make_ready(pair.target)
    regions = checked(graft, pair)
    changed: dict[str, Any] = {}
    for region, strength in regions.items():
        if strength != 0:
            name = region.parameter
            if name not in changed:
                changed[name] = pair.target_parameters[name].detach().clone()
            region.of(changed[name]).copy_(written(graft.operator, pair, region, strength))
    return regions, changed


def with_tensors(model: LanguageModel, changed: dict[str, Any], name: str) -> LanguageModel:
    """A model with its own modules, some tensors of its own, and every other one shared with ``model``.

    It costs the memory of ``changed`` alone, and nothing done to it reaches ``model``.
    """
    import torch

    parameters = dict(model.hf.named_parameters())
    twin = copy_without_hooks(model.hf, share_parameters=True)
    new = {id(parameters[n]): torch.nn.Parameter(tensor, requires_grad=False) for n, tensor in changed.items()}
    for module in twin.modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            # by identity: a tied tensor is replaced wherever it stands
            if id(parameter) in new:
                setattr(module, attribute, new[id(parameter)])
    return LanguageModel(name, twin, model.tokenizer)
