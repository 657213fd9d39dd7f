"""One forward pass, as a patch sees it: which tokens it reads, whether it is the prompt's, which positions count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mechtransplant.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Where = Literal["all", "prompt", "decoding", "last", "answer"] | Sequence[int]
#: name → the positions at which a patch acts
WHERE: dict[str, str] = {
    "all": "every token, of the prompt and of what is written",
    "prompt": "every token of the prompt",
    "decoding": "every token that is written",
    "last": "the prompt's last token",
    "answer": "what predicts the answer: the prompt's last token, and every token that is written",
}


def check_where(positions: Where) -> None:
    """Raise UsageError unless these are positions: a name of ``WHERE``, or whole numbers."""
    if isinstance(positions, str):
        if positions not in WHERE:
            raise UnknownNameError("positions", positions, WHERE, "Or a list of the prompt's token numbers.")
        return
    if not isinstance(positions, Sequence) or not positions or not all(type(p) is int for p in positions):
        raise UsageError(f"positions are {', '.join(WHERE)}, or a list of whole numbers, got {positions!r}")


@dataclass
class Pass:
    """A forward pass: token ``ids`` (batch, pos), which of them are ``real`` (not padding), and their ``index`` among
    the real tokens of their row, from 0. ``prompt`` is true for the first pass of a text."""

    ids: Tensor
    real: Tensor
    index: Tensor
    prompt: bool
    past: Any
    keywords: dict[str, Any]

    def chosen(self, positions: Where) -> Tensor:
        """Where a patch acts, shape (batch, pos); raises UsageError for a position that a prompt does not have."""
        import torch

        if isinstance(positions, str):
            if positions == "all":
                return self.real
            if positions == "decoding" or (positions == "answer" and not self.prompt):
                return self.real & (not self.prompt)
            if positions == "prompt":
                return self.real & self.prompt
        if not self.prompt:
            return torch.zeros_like(self.real)
        lengths = self.real.sum(1, keepdim=True)
        found = torch.zeros_like(self.real)
        for position in (-1,) if isinstance(positions, str) else positions:
            if not -int(lengths.min()) <= position < int(lengths.min()):
                raise UsageError(
                    f"a prompt of {int(lengths.min())} tokens has no position {position}: choose positions that every "
                    "prompt has"
                )
            found |= self.index == (position if position >= 0 else lengths + position)
        return found & self.real


def read_pass(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Pass:
    """The pass that a model is about to run, from its arguments."""
    import torch

    ids = keywords.get("input_ids", inputs[0] if inputs else None)
    if ids is None:
        raise UsageError("a patched model reads token ids: pass input_ids, not inputs_embeds")
    past = keywords.get("past_key_values")
    before = 0 if past is None else int(past.get_seq_length())
    mask = keywords.get("attention_mask")
    if mask is None:
        mask = torch.ones(ids.shape[0], before + ids.shape[1], dtype=torch.long, device=ids.device)
    if past is not None and mask.dim() == 4:
        raise UsageError("a patched model needs a dynamic key-value cache: leave out cache_implementation='static'")
    if mask.dim() != 2 or mask.shape[1] != before + ids.shape[1]:
        wanted = f"(batch, {before + ids.shape[1]})"
        raise UsageError(f"a patched model needs an attention mask of shape {wanted}, got {tuple(mask.shape)}")
    real, index = mask.bool(), mask.long().cumsum(1) - 1
    return Pass(ids, real[:, before:], index[:, before:], before == 0, past, keywords)
