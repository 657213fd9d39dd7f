"""A model over several devices, by accelerate: each part computes where its weights are, and activations travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechtransplant.errors import UsageError, one_line

DeviceMap = str | Mapping[str, Any]
#: of a device's free memory, what weights may take: activations and caches need the rest
SHARE = 0.8


def spread(hf: Any, device_map: DeviceMap, models: int = 1) -> Any:
    """Put the parts of a model where a device map says, "auto" for an even spread over all CUDA devices.

    Args:
        device_map: name of a part ("model.layers.3") → device; every parameter is in one. "cpu" is a device that
            computes, unlike in transformers, where such a part's weights are copied to a GPU for every pass: grafts
            write to weights that are there.
        models: how many of this size are to fit, for "auto".

    Raises:
        UsageError: a map that leaves parameters out or names no device, and "auto" where they do not fit.
    """
    import accelerate

    placed = _even(hf, models) if device_map == "auto" else device_map
    if not isinstance(placed, Mapping) or not placed:
        raise UsageError(f"device_map is 'auto' or maps parts of the model to devices, got {device_map!r}")
    if "disk" in placed.values():
        raise UsageError("device_map: weights on the disk cannot be grafted; use GPUs and cpu, or one_at_a_time")
    _check_tied(hf, placed)
    try:
        # the whole's inputs are where the embeddings are
        words = next(n for n, m in hf.named_modules() if m is hf.get_input_embeddings())
        main = next((placed[part] for part in sorted(placed, reverse=True) if f"{words}.".startswith(f"{part}.")), None)
        main = placed.get("") if main is None else main
        if main != "cpu" and "cpu" in placed.values():
            raise UsageError(f"a device_map that names cpu has {words} there, where the inputs begin: move it to cpu")
        hf = accelerate.dispatch_model(hf, dict(placed), main_device=main)
    except (ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise UsageError(f"this device_map cannot be used: {one_line(error)}") from error
    count_positions(hf)
    return hf


def count_positions(hf: Any) -> None:
    """Positions whose logits are wanted are said as a number: an index would have to be where the last layer is."""
    hf.register_forward_pre_hook(_counted, with_kwargs=True)


def _check_tied(hf: Any, placed: Mapping[str, Any]) -> None:
    """Refuse a map that puts parameters which are one tensor on two devices: it can be on one."""
    from accelerate.utils import find_tied_parameters

    def part(name: str) -> str:
        return max((p for p in placed if p == "" or f"{name}.".startswith(f"{p}.")), key=len, default="")

    for group in find_tied_parameters(hf):
        parts = sorted({part(name) for name in group})
        if len({str(placed.get(p)) for p in parts}) > 1:
            raise UsageError(f"device_map: {' and '.join(parts)} share a tensor: give them one device")


def parts_of(hf: Any) -> Mapping[str, Any] | None:
    """Where the parts of a model are, if it is on several devices."""
    placed = getattr(hf, "hf_device_map", None)
    return placed if placed and len(set(placed.values())) > 1 else None


def _even(hf: Any, models: int) -> dict[str, Any]:
    """As much on every CUDA device."""
    import accelerate
    import torch

    if not torch.cuda.is_available():
        raise UsageError("device_map='auto' spreads a model over CUDA devices, and there are none here: leave it out")
    count = torch.cuda.device_count()
    room = {i: int(SHARE * torch.cuda.mem_get_info(i)[0] / models) for i in range(count)}
    size = sum(p.numel() * p.element_size() for p in hf.parameters())
    if size <= sum(room.values()):
        # a little more than an even part: layers are not taken apart
        largest = max(sum(p.numel() * p.element_size() for p in m.parameters()) for m in hf.modules() if m is not hf)
        biggest = size // count + min(largest, size // 4)
        tight = {i: min(free, biggest) for i, free in room.items()}
        for limits in (tight, room):
            found = accelerate.infer_auto_device_map(hf, limits, no_split_module_classes=list(hf._no_split_modules))
            if not {"cpu", "disk"} & set(found.values()):
                return dict(found)
    raise UsageError(
        f"{models} models of {size / 2**30:.1f} GiB do not fit on {count} CUDA devices with room for "
        f"{sum(room.values()) * models / 2**30:.1f} GiB: use bfloat16, one_at_a_time, or a map that names cpu too"
    )


def _counted(hf: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A suffix of the positions as a number, any other choice as it is."""
    import torch

    wanted = keywords.get("logits_to_keep")
    if not isinstance(wanted, torch.Tensor):
        return None
    length = keywords.get("input_ids", inputs[0] if inputs else wanted).shape[-1]
    first = length - len(wanted)
    if not len(wanted) or wanted.tolist() != list(range(first, length)):
        return None
    return inputs, {**keywords, "logits_to_keep": len(wanted)}
