"""Shifts of heads, MLPs, attention blocks and linear layers: every measure of the statistical contract, streamed.

Sign: source minus target. A value is a mean over a prompt's chosen positions; both models read the same tokens. With
a^S = f^S(x^S) the source's output, a^T = f^T(x^T) the target's, and f^S(x^T) the source's module on the target's input
(the moved output), at one position:

==========  ============================================================  ========
magnitude   ‖a^S‖₁/d − ‖a^T‖₁/d                                           signed
distance    ‖a^S − a^T‖ / N, where N = ½(‖a^S‖ + ‖a^T‖)                   ≥ 0
own         ‖f^S(x^T) − a^T‖ / N: what the module's own weights change    ≥ 0
inherited   ‖a^S − f^S(x^T)‖ / N: what comes from upstream                ≥ 0
lae         |‖a^S‖₁ − ‖a^T‖₁| / d, at every position: the seed paper's  ≥ 0
lae_rel.    the same over ½(‖a^S‖₁ + ‖a^T‖₁)/d (`lae_relative`)         ≥ 0
alignment   cosine of a prompt's shift vector with the mean of the others  −1 … 1
projection  a prompt's shift vector on a direction fixed by other prompts  signed
==========  ============================================================  ========

One N for all three, so that distance ≤ own + inherited holds as it stands; where N is 0, so is the measure.

A head's output is z @ W_O of its own columns, without the layer's bias. An attention block's or MLP's output is that
of its last linear layer: where a norm follows (Gemma, OLMo 2), before that norm, because the norm mixes all heads. A
module's input is what enters it, so norm scales before it count as inherited. The source's attention block is run on
the target's input with the target's mask and rotary angles; a head's own shift therefore includes the K and V of its
group.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from mechtransplant.activations import Batch, Positions, Text, plan_reading, written_texts
from mechtransplant.errors import UnknownNameError, UsageError, check_count, check_seed
from mechtransplant.evaluation.batches import PaddingSide
from mechtransplant.selection import QUESTIONS
from mechtransplant.shifts.frames import DIRECT, FROM_VECTORS, MEASURES, shift_frame
from mechtransplant.shifts.heads import HeadWrites, Written
from mechtransplant.shifts.recorder import SLOT_KINDS, PairRecorder, Slot, SlotKind, slots_of
from mechtransplant.shifts.vectors import ShiftVectors
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mechtransplant.pair import Pair


def measure_shifts(
    pair: Pair,
    task: Task,
    kinds: str | Iterable[str] = ("head", "mlp"),
    measures: str | Iterable[str] = ("magnitude", "distance", "own"),
    positions: Positions = "all",
    *,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Every module's shift on every prompt, in one pass over the prompts; both models read a batch once.

    Memory holds one batch, the values, and nothing that grows with positions; "alignment" and "projection" keep their
    vectors in a temporary file.

    Args:
        kinds: "head", "mlp", "attn", "linear", in the order of the result.
        measures: see the module's docstring.
        positions: "all" (of the prompt), "last", "answer" or "decoding" (see ``activations.POSITIONS``).
        text: for "decoding": whose text both models read, "target", "source" or "gold".
        seed: for "projection": which half of the prompts fixes the direction.

    Returns:
        a tidy frame: module, kind, layer, head, prompt (the question's number in the task), measure, value.

    Raises:
        UnknownNameError: unknown kinds, measures or positions. UsageError: a measure that needs two prompts.
    """
    options = (positions, text, max_new_tokens, batch_size, padding_side, seed, progress)
    return _measured(pair, task, kinds, measures, False, *options)[0]


def shifts_and_vectors(
    pair: Pair,
    task: Task,
    kinds: str | Iterable[str] = ("head", "mlp"),
    measures: str | Iterable[str] = MEASURES,
    positions: Positions = "all",
    *,
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    padding_side: PaddingSide = "left",
    seed: int = 0,
    progress: bool = False,
) -> tuple[pd.DataFrame, ShiftVectors]:
    """(:func:`measure_shifts`, :func:`shift_vectors`) of the same prompts in one pass; arguments, errors as there."""
    options = (positions, text, max_new_tokens, batch_size, padding_side, seed, progress)
    frame, vectors = _measured(pair, task, kinds, measures, True, *options)
    assert vectors is not None
    return frame, vectors


def _measured(
    pair: Pair,
    task: Task,
    kinds: str | Iterable[str],
    measures: str | Iterable[str],
    keep_vectors: bool,
    positions: Positions,
    text: Text,
    max_new_tokens: int | None,
    batch_size: int,
    padding_side: PaddingSide,
    seed: int,
    progress: bool,
) -> tuple[pd.DataFrame, ShiftVectors | None]:
    import pandas as pd

    check_pair(pair, task)
    check_seed(seed)
    check_count("batch_size", batch_size)
    wanted = _names(measures, "measure", MEASURES)
    with_vectors = [m for m in wanted if m in FROM_VECTORS]
    if with_vectors and len(task) < 2:
        raise UsageError(f"{with_vectors[0]} compares prompts with each other: give at least two, got {len(task)}")
    direct = tuple(m for m in wanted if m in DIRECT)
    collector = Collector(pair, len(task), kinds, direct, keep_vectors or bool(with_vectors))
    collect(pair, task, collector, positions, text, max_new_tokens, batch_size, padding_side, progress)
    frames = []
    for measure in wanted:
        if measure in DIRECT:
            frames.append(collector.frame(measure))
        else:
            assert collector.vectors is not None
            frames.append(collector.vectors.frame(measure, seed))
    whole = pd.concat(frames, ignore_index=True)
    whole.attrs[QUESTIONS] = list(task.keys)
    return whole, collector.vectors


def check_pair(pair: object, task: object) -> None:
    """Raise UsageError for anything that is no pair or no task (names of them are not enough)."""
    if not (hasattr(pair, "source") and hasattr(pair, "target")):
        raise UsageError(f"expected a pair, got {type(pair).__name__}: pass load_pair(…)")
    if not isinstance(task, Task):
        raise UsageError(f"expected a task, got {type(task).__name__}: pass load_task(…), or one of its splits")


def _names(given: str | Iterable[str], what: str, known: tuple[str, ...]) -> list[str]:
    if given is None or not isinstance(given, Iterable):
        raise UsageError(f"expected a {what} or several, got {given!r}: some of {', '.join(known)}")
    names = list(dict.fromkeys([given] if isinstance(given, str) else given))
    for name in names:
        if name not in known:
            raise UnknownNameError(what, name, known)
    if not names:
        raise UsageError(f"no {what} was named: expected some of {', '.join(known)}")
    return names


def collect(
    pair: Pair,
    task: Task,
    collector: Collector,
    positions: Positions,
    text: Text,
    max_new_tokens: int | None,
    batch_size: int,
    padding_side: PaddingSide,
    progress: bool,
) -> None:
    """Read the task with both models, batch by batch, into the collector."""
    import torch

    texts = None
    if positions == "decoding":
        texts = written_texts(pair.source, pair.target, task, text, max_new_tokens, batch_size, progress)
    reading = plan_reading(pair.target, task, positions, texts=texts)
    with torch.no_grad(), PairRecorder(pair, collector.slots, collector.needs_moved) as recorder:
        for batch in reading.batches(pair.target.hf, batch_size, padding_side, progress, "measure shifts"):
            recorder.read(batch, collector.consumer(batch))


class Collector:
    """Turns recorded tensors into values per module and prompt, and shift vectors where they are wanted.

    ``values`` maps measure → array of shape (modules, prompts).
    """

    by_magnitude: ClassVar = {"magnitude", "lae", "lae_relative"}

    def __init__(
        self, pair: Pair, prompts: int, kinds: str | Iterable[str], measures: tuple[str, ...], with_vectors: bool
    ) -> None:
        self.pair, self.prompts, self.measures = pair, prompts, measures
        self.slots = slots_of(pair, cast("list[SlotKind]", _names(kinds, "kind of module", SLOT_KINDS)))
        self.modules = [m for slot in self.slots for m in slot.modules(pair)]
        self.rows = {m: i for i, m in enumerate(self.modules)}
        #: of the residual stream, which heads write to
        self.width = int(pair.target.hf.config.get_text_config().hidden_size)
        self.needs_moved = bool({"own", "inherited"} & set(measures))
        self.writes = {s: HeadWrites.of(pair, s.layer) for s in self.slots if s.kind == "head"}
        self.values = {m: np.zeros((len(self.modules), prompts)) for m in measures}
        self.vectors = ShiftVectors.empty(self._widths(), prompts) if with_vectors else None

    def _widths(self) -> dict[str, int]:
        widths = {}
        for slot in self.slots:
            if slot.kind == "head":
                width = self.writes[slot].change.shape[-1]
            else:
                linear: Any = self.pair.target.hf.get_submodule(self.pair.layout.linears[slot.linear])
                width = linear.nf if type(linear).__name__ == "Conv1D" else linear.out_features
            widths.update(dict.fromkeys(slot.modules(self.pair), int(width)))
        return widths

    def consumer(self, batch: Batch) -> Any:
        """A function that takes in a slot's tensors of one batch."""

        def consume(slot: Slot, source: Any, target: Any, moved: Any) -> None:
            first = self.rows[slot.modules(self.pair)[0]]
            terms = self._plain_terms if slot.kind != "head" else partial(self._head_terms, slot)
            values, shift = terms(source, target, moved)
            for name, value in values.items():
                # (counted, modules) → (prompts, modules); sums over positions in float64, which not every device has
                mean = batch.mean(value.cpu().double())
                self.values[name][first : first + mean.shape[1], batch.prompts] = mean.T.numpy()
            if self.vectors is not None and shift is not None:
                self.vectors.write(self.modules[first], batch.prompts, batch.mean(shift).flatten(1).cpu().numpy())

        return consume

    def _plain_terms(
        self, source: torch.Tensor, target: torch.Tensor, moved: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Measures of one module from its outputs, each (counted, width): values (counted, 1), and the shift."""
        import torch

        def norm(vectors: torch.Tensor) -> torch.Tensor:
            return torch.linalg.vector_norm(vectors, dim=-1)[:, None]

        shift = source - target
        norms = {"‖source‖": norm(source), "‖target‖": norm(target), "distance": norm(shift)}
        if self.by_magnitude & set(self.measures):
            norms |= {"‖source‖₁": source.abs().sum(-1)[:, None], "‖target‖₁": target.abs().sum(-1)[:, None]}
        if moved is not None:
            norms |= {"own": norm(moved - target), "inherited": norm(source - moved)}
        return self._values(norms, source.shape[-1]), shift[:, None]

    def _head_terms(
        self, slot: Slot, source: Written, target: Written, moved: Written | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Measures of a layer's heads: values (counted, heads)."""

        writes, heads = self.writes[slot], self.pair.layout.heads
        zs = [None if w is None else w.z.float().reshape(len(w.z), heads, -1) for w in (source, target, moved)]
        norms = {"‖source‖": source.norms, "‖target‖": target.norms, "‖source‖₁": source.sums, "‖target‖₁": target.sums}
        if {"distance", "own", "inherited"} & set(self.measures):
            norms |= writes.norms(*cast("list[torch.Tensor]", zs))
        shift = None
        if self.vectors is not None:
            shift = writes.difference(*cast("list[torch.Tensor]", zs[:2]))
        return self._values(norms, self.width), shift

    def _values(self, norms: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
        """The measures, each (counted, modules), from norms of outputs of ``width`` numbers, and of differences."""
        found: dict[str, torch.Tensor] = {}
        if self.by_magnitude & set(self.measures):
            source, target = norms["‖source‖₁"] / width, norms["‖target‖₁"] / width
            gap, size = source - target, (source + target) / 2
            found |= {"magnitude": gap, "lae": gap.abs(), "lae_relative": (gap.abs() / size).masked_fill(size == 0, 0)}
        # one mean norm for all three, so that distance ≤ own + inherited; 0 where both outputs are
        scale = (norms["‖source‖"] + norms["‖target‖"]) / 2
        for name in ("distance", "own", "inherited"):
            if name in norms:
                found[name] = (norms[name] / scale).masked_fill(scale == 0, 0)
        return {name: value for name, value in found.items() if name in self.measures}

    def frame(self, measure: str) -> pd.DataFrame:
        """One measure as a tidy frame."""
        values: NDArray[np.float64] = self.values[measure]
        broken = ~np.isfinite(values).all(1)
        if broken.any():
            raise UsageError(
                f"{self.modules[int(np.argmax(broken))]} has activations that are NaN or infinite: its weights are "
                f"broken, or {self.pair.target.hf.dtype} overflows (use dtype float32)"
            )
        return shift_frame(self.modules, measure, values)


def average_by_template(shifts: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The shifts with templates as the unit instead of prompts: means over the prompts that share one.

    ``prompt`` then numbers the templates, in the order of their names. Raises UsageError where the task has fewer
    than two, or the frame's prompts are not the task's.
    """
    lacking = [c for c in ("module", "prompt", "measure", "value") if c not in shifts.columns]
    if lacking:
        raise UsageError(f"the shifts lack the columns {', '.join(lacking)}: pass a frame from measure_shifts")
    compared = sorted({"alignment", "projection"} & set(shifts.measure))
    if compared:
        raise UsageError(
            f"{compared[0]} compares prompts with each other, and those of one template would be on both sides: "
            "average the other measures"
        )
    names = sorted({e.template for e in task})
    if len(names) < 2:
        raise UsageError(f"task {task.name!r} has {len(names)} template: prompts are then the unit")
    strange = ~shifts.prompt.isin(range(len(task)))
    if strange.any():
        raise UsageError(
            f"the shifts have prompt {shifts.prompt[strange].iloc[0]!r} and the task has prompts 0 to {len(task) - 1}: "
            "give the task that was measured"
        )
    number = np.array([names.index(e.template) for e in task])
    columns = [c for c in ("module", "kind", "layer", "head", "prompt", "measure") if c in shifts.columns]
    numbered = shifts.assign(prompt=number[shifts.prompt.to_numpy(dtype=int)])
    by_template = numbered.groupby(columns, sort=False, dropna=False, observed=True)
    return by_template["value"].mean().reset_index()
