"""Both models read a batch once, in turns; a module's two outputs are consumed where they meet, and nothing is held.

A *slot* is one recorded tensor of a layer: the heads' z (the input of the output projection) or writes (see ``heads``),
the neurons' activations (the input of the MLP's last layer), the attention block's output, the MLP's, or a linear
layer's. On request the source's module is also run on the target's input, as the target's forward passes by; that gives
the *moved* output f^S(x^T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

from mechtransplant.activations import Batch
from mechtransplant.errors import UsageError
from mechtransplant.evaluation.remembered import answering
from mechtransplant.shifts.heads import Written
from mechtransplant.shifts.turns import Alone, Turns
from mechtransplant.weights import lent, parts_of, runs_on

if TYPE_CHECKING:
    import torch

    from mechtransplant.pair import LanguageModel, Pair

SlotKind = Literal["head", "neuron", "attn", "mlp", "linear"]
SLOT_KINDS: tuple[SlotKind, ...] = ("head", "neuron", "attn", "mlp", "linear")


@dataclass(frozen=True)
class Slot:
    """One recorded tensor: its kind, its layer, and the linear layer at whose input or output it is read."""

    kind: SlotKind
    layer: int
    linear: str

    def modules(self, pair: Pair) -> list[str]:
        """The addresses that this tensor holds, in the order of its axis: a layer's heads or neurons, or one module."""
        if self.kind == "neuron":
            return pair.layout.neurons_of(self.layer)
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
        last = layout.mlp_output if kind in ("mlp", "neuron") else layout.attention_output
        found += [Slot(kind, layer, last(layer)) for layer in range(layout.layers)]
    return found


#: a slot's tensor at the counted positions, (counted, width) in float32, or what the heads write there
Recorded = Union["torch.Tensor", Written]
#: (slot, source's, target's, moved one or None)
Consumer = Callable[[Slot, Any, Any, Any], None]


class PairRecorder:
    """Hooks on both models of a pair, for the length of a ``with`` block."""

    def __init__(self, pair: Pair, slots: list[Slot], moved: bool) -> None:
        self.pair, self.slots, self.with_moved = pair, slots, moved
        self.batch: Batch
        self.consume: Consumer
        self.turns: Turns | Alone | None = None
        #: where the source's tensors go, and come from, when it has passes of its own
        self.store: Callable[[Slot, Recorded], None] | None = None
        self.fetch: Callable[[Slot], Recorded] | None = None
        #: which slots a run of a single source module fills
        self.filling: frozenset[Slot] = frozenset()
        self.kept: dict[Slot, Recorded] = {}
        self.moved: dict[Slot, Recorded] = {}
        self._stack = ExitStack()

    def __enter__(self) -> PairRecorder:
        self._check_alike()
        with ExitStack() as stack:
            projections: dict[Any, list[tuple[LanguageModel, Slot, bool]]] = {}
            for slot in self.slots:
                for model, is_source in ((self.pair.source, True), (self.pair.target, False)):
                    linear = self._linear(model, slot)
                    if slot.kind == "head":
                        # in a pair of one model twice it is both models' projection
                        projections.setdefault(linear, []).append((model, slot, is_source))
                    else:
                        stack.callback(self._listen(linear, slot, is_source).remove)
            for linear, whose in projections.items():
                stack.enter_context(self._writing(linear, whose))
            if self.with_moved:
                self._replay_modules(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, batch: Batch, consume: Consumer) -> None:
        """Run both models on a batch, in turns; ``consume`` gets a slot's tensors when both models have passed it.

        The tensors are the models' own: they may change once ``consume`` has returned.
        """
        self.batch, self.consume = batch, consume
        turns = Turns(lambda: self._run(self.pair.source))
        with self._passing(turns):
            failed = True
            try:
                self._run(self.pair.target)
                failed = False
            finally:
                turns.end(failed)

    def read_source(self, batch: Batch, store: Callable[[Slot, Recorded], None]) -> None:
        """Run the source alone; ``store`` gets every slot's tensor."""
        self.batch, self.store = batch, store
        with self._passing(Alone(in_second=True)):
            self._run(self.pair.source)

    def read_target(self, batch: Batch, fetch: Callable[[Slot], Recorded], consume: Consumer) -> None:
        """Run the target alone; ``fetch`` gives what the source had."""
        self.batch, self.fetch, self.consume = batch, fetch, consume
        with self._passing(Alone(in_second=False)):
            self._run(self.pair.target)

    def _run(self, model: LanguageModel) -> None:
        # only hidden states are wanted: one position of logits is the least that can be asked for
        model.hf(**self.batch.hidden_only)

    @contextmanager
    def _passing(self, turns: Turns | Alone) -> Iterator[None]:
        """A block in which the hooks record."""
        self.turns = turns
        try:
            yield
        finally:
            self.turns, self.store, self.fetch, self.filling = None, None, None, frozenset()
            self.kept.clear()
            self.moved.clear()

    def _check_alike(self) -> None:
        """The source's modules get the target's tensors as they are: one device, and one dtype."""
        models = self.pair.source.hf, self.pair.target.hf
        alike: dict[str, list[Any]] = {
            "device": [runs_on(hf) for hf in models],
            "device map": [parts_of(hf) for hf in models],
        }
        if self.with_moved:
            alike["dtype"] = [hf.dtype for hf in models]
        for what, (source, target) in alike.items():
            if source != target:
                raise UsageError(f"the source has {what} {source} and the target {target}: load both alike")

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _listen(self, linear: Any, slot: Slot, is_source: bool) -> Any:
        if slot.kind == "neuron":
            return linear.register_forward_pre_hook(lambda m, inputs: self._see(slot, inputs[0], is_source))
        return linear.register_forward_hook(lambda m, inputs, output: self._see(slot, output, is_source))

    def _see(self, slot: Slot, tensor: torch.Tensor, is_source: bool) -> None:
        if self._counts(slot, is_source):
            self._arrive(slot, self._gathered(tensor))

    @staticmethod
    def _linear(model: LanguageModel, slot: Slot) -> Any:
        return model.hf.get_submodule(model.layout.linears[slot.linear])

    def _writing(self, linear: Any, whose: list[tuple[LanguageModel, Slot, bool]]) -> AbstractContextManager[None]:
        """An output projection that tells of its heads' writes."""
        own, plain = linear.forward, _is_plain(linear)
        model, layer = whose[0][0], whose[0][1].layer

        def write(z: torch.Tensor) -> torch.Tensor:
            if self.turns is None:
                return own(z)  # type: ignore[no-any-return]
            wanted = [slot for _, slot, is_source in whose if self._counts(slot, is_source)]
            # the sum of the writes is the output; where few positions count, theirs alone are built
            all_of_them = plain and 2 * len(self.batch.row) >= self.batch.inputs["input_ids"].numel()
            if all_of_them:
                # also where it is not wanted: every run of the layer rounds alike
                written, output = Written.of(z, self._weights(model, layer, z))
                written = written.gathered(self._chosen)
                output = output if linear.bias is None else output + linear.bias
            elif wanted:
                written, _ = Written.of(self._gathered(z), self._weights(model, layer, z).float())
            for slot in wanted:
                self._arrive(slot, written)
            return output if all_of_them else own(z)

        return answering(linear, write)

    @staticmethod
    def _weights(model: LanguageModel, layer: int, z: torch.Tensor) -> torch.Tensor:
        """A layer's W_O, where z is: asked for every time, since a model that goes away takes its weights along."""
        return model.output_weights(layer).to(z.device)  # type: ignore[no-any-return]

    def _counts(self, slot: Slot, is_source: bool) -> bool:
        """Whether a tensor is wanted. In a pair of one model twice both listeners hear of it: the turn tells which."""
        if self.turns is None:
            return False
        if self.filling and not self.turns.in_second:
            return is_source and slot in self.filling
        return self.turns.in_second == is_source

    def _arrive(self, slot: Slot, tensor: Recorded) -> None:
        """File a tensor, or consume it together with the target's."""
        assert self.turns is not None
        if self.store is not None:
            self.store(slot, tensor)
            return
        if isinstance(self.turns, Turns) and self.turns.in_second:
            while not self._passed(slot):
                self.turns.wait()
            self.consume(slot, tensor, self.kept.pop(slot), self.moved.pop(slot, None))
            return
        (self.moved if self.filling else self.kept)[slot] = tensor
        if not self._passed(slot):
            return
        if self.fetch is not None:
            self.consume(slot, self.fetch(slot), self.kept.pop(slot), self.moved.pop(slot, None))
        elif isinstance(self.turns, Turns):
            self.turns.advance()

    def _passed(self, slot: Slot) -> bool:
        """Whether all that is wanted of the target's pass is there."""
        return slot in self.kept and (slot in self.moved or not self.with_moved)

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """The counted positions, (counted, width) in float32."""
        return self._chosen(tensor.detach()).float()

    def _chosen(self, tensor: torch.Tensor) -> torch.Tensor:
        counted = len(self.batch.row)
        if counted == self.batch.inputs["input_ids"].numel():
            # all of them, in their order: what is consumed at once need not be copied
            return tensor.reshape(counted, -1)
        return self.batch.gather(tensor)

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
                if self.turns is not None and not self.turns.in_second and not self.filling:
                    with self._filling(slots), lent(theirs, self.pair.source.hf):
                        theirs(*inputs, **keywords)

            stack.callback(ours.register_forward_hook(replay, with_kwargs=True).remove)

    def _check_alone(self, slot: Slot, path: str) -> None:
        """Refuse an MLP whose layers lie loose in the block (OPT): there is no module to run by itself."""
        attention = self.pair.layout.linears[self.pair.layout.attention_output(slot.layer)]
        if slot.kind in ("mlp", "neuron") and attention.startswith(path + "."):
            raise UsageError(
                f"{type(self.pair.target.hf).__name__} has no module for its MLPs, so the source's cannot be run on "
                "the target's input: leave out the measures own and inherited, or measure kinds=('head', 'linear')"
            )


def _is_plain(linear: Any) -> bool:
    """Whether a layer is nothing but a product in float32 (and a bias), which may be computed head by head."""
    import torch

    plain = type(linear) is torch.nn.Linear or type(linear).__name__ == "Conv1D"
    # a layer whose forward was replaced is whatever it was replaced by
    return plain and linear.weight.dtype == torch.float32 and "forward" not in linear.__dict__
