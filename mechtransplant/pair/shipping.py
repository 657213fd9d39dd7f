"""A loaded model as plain arrays, for a process on another machine that has none of its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mechtransplant.pair.model import LanguageModel


@dataclass(frozen=True)
class ShippedModel:
    """A model's class, config, tokenizer and tensors; arrays of one kind of number that numpy has for every dtype.

    ``tensors`` maps the names of parameters and buffers (tied parameters once) to (dtype's name, array).
    """

    name: str
    kind: type
    config: Any
    generation_config: Any
    tokenizer: Any
    tensors: dict[str, tuple[str, np.ndarray]]


def ship(model: LanguageModel) -> ShippedModel:
    """The model as it is now; arrays share its memory where it is in the CPU's."""
    hf = model.hf
    named = {**dict(hf.named_parameters()), **dict(hf.named_buffers())}
    arrays = {name: (str(t.dtype).removeprefix("torch."), _array(t)) for name, t in named.items()}
    return ShippedModel(model.name, type(hf), hf.config, hf.generation_config, model.tokenizer, arrays)


def unship(shipped: ShippedModel, device: str = "cpu") -> LanguageModel:
    """The model again, with tensors of its own."""
    import torch
    from transformers.initialization import no_init_weights

    from mechtransplant.pair.model import LanguageModel

    with no_init_weights():
        hf: Any = shipped.kind(shipped.config)
    if dict(hf.named_parameters()).keys() - shipped.tensors.keys():
        # without its initialisation a model has not yet tied what is one tensor
        hf.tie_weights()
    named = {**dict(hf.named_parameters()), **dict(hf.named_buffers())}
    absent = sorted(dict(hf.named_parameters()).keys() - shipped.tensors.keys())
    if absent:
        raise UsageError(f"{shipped.name} was sent without {absent[0]}, which its config asks for: load it anew")
    for name, (dtype, array) in shipped.tensors.items():
        # what arrives may be memory that processes share, and grafts write in place
        named[name].data = torch.from_numpy(array.copy()).view(getattr(torch, dtype))
    hf.generation_config = shipped.generation_config
    return LanguageModel(shipped.name, hf.to(device).eval().requires_grad_(False), shipped.tokenizer)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits as whole numbers of the same size (numpy has no bfloat16), in its shape."""
    import torch

    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = tensor.detach().cpu().contiguous()
    return plain.view(sizes[plain.element_size()]).numpy()
