"""Both models read a batch once; every module's two outputs meet, and the next batch may come.

A *slot* is one recorded tensor of a layer: the heads' z (the input of the output projection), the attention block's
output, the MLP's, or a linear layer's. On request the source's module is also run on the target's input, as the
target's forward passes by; that gives the *moved* output f^S(x^T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mechtransplant.activations import Batch
from mechtransplant.errors import UsageError

if TYPE_CHECKING:
    import torch

    from mechtransplant.pair import LanguageModel, Pair

SlotKind = Literal["head", "attn", "mlp", "linear"]
SLOT_KINDS: tuple[SlotKind, ...] = ("head", "attn", "mlp", "linear")


@dataclass(frozen=True)
class Slot:
    """One recorded tensor: its kind, its layer, and the linear layer at whose input or output it is read."""

    kind: SlotKind
    layer: int
    linear: str

    def modules(self, pair: Pair) -> list[str]:
        """The addresses that this tensor holds, in the order of its axis: a layer's heads, or one module."""
        if self.kind == "head":
            return [f"L{self.layer}H{head}" for head in range(pair.layout.heads)]
        return [self.linear if self.kind == "linear" else f"L{self.layer}.{self.kind}"]


def slots_of(pair: Pair, kinds: Iterable[SlotKind]) -> list[Slot]:
    """The slots of some kinds of modules, kind by kind and layer by layer."""
    layout, found = pair.layout, []
    for kind in kinds:
        if kind == "linear":
            found += [Slot("linear", int(a[1:].split(".")[0]), a) for a in layout.linears]
            continue
        last = layout.mlp_output if kind == "mlp" else layout.attention_output
        found += [Slot(kind, layer, last(layer)) for layer in range(layout.layers)]
    return found


#: (slot, source's output, target's output, moved output or None), each of shape (counted, width) in float32
Consumer = Callable[[Slot, "torch.Tensor", "torch.Tensor", "torch.Tensor | None"], None]


class PairRecorder:
    """Hooks on both models of a pair, for the length of a ``with`` block."""

    def __init__(self, pair: Pair, slots: list[Slot], moved: bool) -> None:
        self.pair, self.slots, self.with_moved = pair, slots, moved
        self.batch: Batch
        self.consume: Consumer
        #: which model's forward is running, and which slots a run of a single source module fills
        self.stage: Literal["", "target", "source"] = ""
        self.filling: frozenset[Slot] = frozenset()
        self.kept: dict[Slot, torch.Tensor] = {}
        self.moved: dict[Slot, torch.Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> PairRecorder:
        self._check_alike()
        with ExitStack() as stack:
            for slot in self.slots:
                for model, is_source in ((self.pair.source, True), (self.pair.target, False)):
                    stack.callback(self._listen(model, slot, is_source).remove)
            if self.with_moved:
                self._replay_modules(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, batch: Batch, consume: Consumer) -> None:
        """Run both models on a batch; ``consume`` gets every slot's tensors while the source's forward passes it."""
        self.batch, self.consume = batch, consume
        try:
            for self.stage in ("target", "source"):
                model = self.pair.target if self.stage == "target" else self.pair.source
                # only hidden states are wanted: one position of logits is the least that can be asked for
                model.hf(**batch.inputs, use_cache=False, logits_to_keep=1)
        finally:
            self.stage, self.filling = "", frozenset()
            self.kept.clear()
            self.moved.clear()

    def _check_alike(self) -> None:
        """The source's modules get the target's tensors as they are: one device, and one dtype."""
        source, target = self.pair.source.hf, self.pair.target.hf
        for what in ("device", "dtype") if self.with_moved else ("device",):
            if getattr(source, what) != getattr(target, what):
                raise UsageError(
                    f"the source has {what} {getattr(source, what)} and the target {getattr(target, what)}: load both "
                    "alike"
                )

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _listen(self, model: LanguageModel, slot: Slot, is_source: bool) -> Any:
        linear = model.hf.get_submodule(model.layout.linears[slot.linear])
        if slot.kind == "head":
            return linear.register_forward_pre_hook(lambda module, inputs: self._arrive(slot, inputs[0], is_source))
        return linear.register_forward_hook(lambda module, inputs, output: self._arrive(slot, output, is_source))

    def _arrive(self, slot: Slot, tensor: torch.Tensor, is_source: bool) -> None:
        """File a tensor. In a pair of one model twice both hooks fire: stage and filling tell which counts."""
        if self.filling:
            if is_source and slot in self.filling:
                self.moved[slot] = self._gathered(tensor)
        elif self.stage == "target" and not is_source:
            self.kept[slot] = self._gathered(tensor)
        elif self.stage == "source" and is_source:
            self.consume(slot, self._gathered(tensor), self.kept.pop(slot), self.moved.pop(slot, None))

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.batch.gather(tensor.detach()).float()

    @contextmanager
    def _filling(self, slots: Iterable[Slot]) -> Any:
        self.filling = frozenset(slots)
        try:
            yield
        finally:
            self.filling = frozenset()

    def _replay_modules(self, stack: ExitStack) -> None:
        """Run each source module on what the target's just got: attention blocks, MLPs and linear layers."""
        inside: dict[tuple[str, str], list[Slot]] = {}
        for slot in self.slots:
            path = self.pair.layout.linears[slot.linear]
            if slot.kind != "linear":
                path = path.rsplit(".", 1)[0]
                self._check_alone(slot, path)
            # a linear layer is run by itself even where its block is run too: its input is the target's own
            inside.setdefault((path, "linear" if slot.kind == "linear" else "block"), []).append(slot)
        for (path, _), slots in inside.items():
            ours, theirs = (m.hf.get_submodule(path) for m in (self.pair.target, self.pair.source))

            def replay(
                module: Any,
                inputs: Any,
                keywords: Any,
                output: Any,
                theirs: Any = theirs,
                slots: list[Slot] = slots,
            ) -> None:
                if self.stage == "target" and not self.filling:
                    with self._filling(slots):
                        theirs(*inputs, **keywords)

            stack.callback(ours.register_forward_hook(replay, with_kwargs=True).remove)

    def _check_alone(self, slot: Slot, path: str) -> None:
        """Refuse an MLP whose layers lie loose in the block (OPT): there is no module to run by itself."""
        attention = self.pair.layout.linears[self.pair.layout.attention_output(slot.layer)]
        if slot.kind == "mlp" and attention.startswith(path + "."):
            raise UsageError(
                f"{type(self.pair.target.hf).__name__} has no module for its MLPs, so the source's cannot be run on "
                "the target's input: leave out the measures own and inherited, or measure kinds=('head', 'linear')"
            )
