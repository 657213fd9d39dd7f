"""Layers below a graft answer with what the target's own passes wrote, once that has become cheaper than running them.

To remember a split takes one evaluation more, so it is done when grafts have left as much alone as one costs: a process
with few such cells pays nothing, and one with many pays at most twice what it had to. Where an answer is written, the
pass over the prompt begins so, and the steps run whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from mechtransplant.evaluation import evaluate_budgets
from mechtransplant.evaluation.batches import encode, length_sorted
from mechtransplant.evaluation.remembered import Memory, remembering
from mechtransplant.evaluation.scoring import is_short
from mechtransplant.experiment.setup import Setup
from mechtransplant.modules import parse_address
from mechtransplant.tasks import Task

#: bytes of the target's layers' outputs on a split that a process keeps; where there are more, every layer runs
LIMIT = 1 << 29


class LowerLayers:
    """The target's passes over the split that is being asked."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        #: split → evaluations' worth of layers that ran in vain
        self.missed: dict[str, float] = {}
        self.passes: dict[str, Memory] = {}

    def under(self, split: Task, modules: Sequence[str]) -> tuple[Memory, int]:
        """(passes, the lowest layer that a graft of the modules changes): to be called before the graft is in place."""
        nothing = Memory(usable=False)
        lowest = min((parse_address(m).layer for m in modules), default=0)
        target = self.setup.pair.target
        # embeddings and the last norm are in no layer (−1); one at a time, memory is scarce
        if lowest <= 0 or self.setup.config.one_at_a_time:
            return nothing, 0
        role = str(split.role)
        if role not in self.passes:
            self.missed[role] = self.missed.get(role, 0.0) + self._read(split) * lowest / target.layout.layers
            if self.missed[role] < 1:
                return nothing, 0
            # the other split's first: not both at once
            self.passes.clear()
            self.passes[role] = self._remember(split) if self._bytes(split) <= LIMIT else nothing
        return self.passes[role], lowest

    def forget(self) -> None:
        """Give the memory back."""
        self.passes.clear()

    def _remember(self, split: Task) -> Memory:
        config, target = self.setup.config, self.setup.pair.target
        with remembering(target, LIMIT) as memory:
            evaluate_budgets(target, split, self.setup.budgets, config.batch_size, method="auto")
        return memory

    def _read(self, split: Task) -> float:
        """The share of an evaluation's tokens that are read, not written."""
        target = self.setup.pair.target
        if is_short(target, split):
            return 1.0
        encoded = encode(split, target.tokenizer)
        tokens = sum(len(p) - len(encoded.prefix) for p in encoded.prompts) / len(encoded.prompts)
        return tokens / (tokens + max(self.setup.budgets))

    def _bytes(self, split: Task) -> int:
        target = self.setup.pair.target
        encoded, layout = encode(split, target.tokenizer), target.layout
        width = target.hf.config.get_text_config().hidden_size
        gold = [len(p) + len(c) for p, c in zip(encoded.prompts, encoded.completions, strict=True)]
        parts = [(gold, width)]
        if not is_short(target, split):
            # besides the gold answer's pass the prompt's, whose keys and values a text that is written needs
            parts.append(([len(p) for p in encoded.prompts], width + 2 * layout.kv_heads * layout.d_head))
        numbers = 0
        for lengths, each in parts:
            batches = length_sorted(lengths, self.setup.config.batch_size)
            numbers += each * sum(len(rows) * (lengths[rows[0]] - len(encoded.prefix)) for rows in batches)
        return int(numbers * target.hf.dtype.itemsize * layout.layers)
