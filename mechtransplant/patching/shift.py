"""Mean-shift patches: the mean difference between source and target is added, and no source is needed any more."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.activations import Batch, Positions, Reading, plan_reading
from mechtransplant.errors import UsageError, finite_number
from mechtransplant.evaluation.batches import make_ready
from mechtransplant.patching.applied import AppliedPatch
from mechtransplant.patching.lockstep import Lockstep
from mechtransplant.patching.passes import Pass, Where, check_where
from mechtransplant.patching.sites import Body, Module, Site, modules_of
from mechtransplant.selection import SelectedModule, Selection
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from mechtransplant.pair import LanguageModel, Pair


#: a whole block's name stands for the residual stream after it
_BLOCK = re.compile(r"^L\d+$")


@dataclass(frozen=True)
class MeanShift:
    """Vectors that are added to what modules write: output ← output + strength · vector, at some positions.

    ``vectors`` maps address → (d_model,); a head's is the mean of z_source @ W_O,source − z_target @ W_O,target.
    """

    vectors: Mapping[str, Tensor]
    positions: Where = "all"
    strength: float = 1.0
    #: what it is the mean of, in words
    measured: str = ""

    def __post_init__(self) -> None:
        check_where(self.positions)
        if not isinstance(self.vectors, Mapping):
            raise UsageError(f"a mean shift maps address → vector, got {type(self.vectors).__name__}: see mean_shift")
        object.__setattr__(self, "strength", finite_number("a mean shift's strength", self.strength))
        if not isinstance(self.positions, str):
            object.__setattr__(self, "positions", tuple(self.positions))
        named: dict[str, Any] = {f"{m}.resid_post" if _BLOCK.match(m) else m: v for m, v in self.vectors.items()}
        object.__setattr__(self, "vectors", named)

    def __repr__(self) -> str:
        names = ", ".join(self.modules[:6]) + (", …" if len(self.modules) > 6 else "")
        of = f"; {self.measured}" if self.measured else ""
        return f"MeanShift({len(self.modules)} modules: {names}{of}; added at {self.positions} × {self.strength:g})"

    @property
    def modules(self) -> tuple[str, ...]:
        """The addresses."""
        return tuple(self.vectors)

    def only(
        self, modules: Iterable[str], *, positions: Where | None = None, strength: float | None = None
    ) -> MeanShift:
        """The same vectors for some of the modules, or at other positions, or another strength."""
        given = [modules] if isinstance(modules, str) else list(modules)
        names = [f"{m}.resid_post" if _BLOCK.match(m) else m for m in given]
        absent = [m for m in names if m not in self.vectors]
        if absent:
            raise UsageError(f"there is no mean shift of {absent[0]}: measure it with mean_shift(…, modules=…)")
        ours = {m: m for m in self.vectors}
        return replace(
            self,
            vectors={ours[m]: self.vectors[m] for m in names},
            positions=self.positions if positions is None else positions,
            strength=self.strength if strength is None else strength,
        )

    def applied(self, model: LanguageModel | Pair) -> AppliedPatch:
        """A model (a pair's target) with the vectors added, for the length of a ``with`` block."""
        target: Any = getattr(model, "target", model)
        width = target.hf.config.get_text_config().hidden_size
        for name, vector in self.vectors.items():
            if tuple(vector.shape) != (width,):
                raise UsageError(f"the vector of {name} has shape {tuple(vector.shape)}, not ({width},): other model?")
        return AppliedPatch(_Adding(self, modules_of(target.layout, self.vectors)), target)

    def save(self, path: str | Path) -> None:
        """Write the vectors to a safetensors file, with positions and strength."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        said = json.dumps({"positions": self.positions, "strength": self.strength, "measured": self.measured})
        temporary = path.parent / f".{path.name}.tmp"
        try:
            # copies: vectors may be views of one tensor, or one vector under two names
            vectors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in self.vectors.items()}
            save_file(vectors, temporary, {"mean_shift": said})
            # atomic: a reader sees a whole file, the old one or the new
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"cannot write {path} ({error}): choose another path") from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    @classmethod
    def load(cls, path: str | Path) -> MeanShift:
        """Read what :meth:`save` wrote; raises UsageError for any other file."""
        import safetensors

        try:
            with safetensors.safe_open(path, "pt") as file:
                said = json.loads((file.metadata() or {})["mean_shift"])
                vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise UsageError(f"{path} holds no mean shift ({error}): give a file that MeanShift.save wrote") from error
        where: Any = said["positions"]
        return cls(vectors, where, said["strength"], str(said.get("measured", "")))


class _Adding:
    """A mean shift on one model."""

    def __init__(self, patch: MeanShift, modules: list[Module]) -> None:
        self.patch, self.positions = patch, patch.positions
        # what is added to a block's output changes no head
        self.heads_changed = self.heads_exchanged = frozenset[tuple[int, int]]()
        self.at: dict[Site, list[str]] = {}
        for module in modules:
            # a head's write is part of what the attention block writes, a neuron's of what the MLP does
            site = module.site
            if module.part is not None:
                site = Site("mlp" if module.head is None else "attn", module.site.layer)
            self.at.setdefault(site, []).append(module.address)

    def sites(self, model: LanguageModel) -> list[Site]:
        return list(self.at)

    def new(self, site: Site, tensor: Tensor, now: Pass, source: Lockstep | None) -> Tensor:
        total = sum(self.patch.vectors[name].to(tensor) for name in self.at[site])
        return tensor + self.patch.strength * total


def mean_shift(
    pair: Pair,
    task: Task,
    modules: Iterable[str],
    positions: Positions = "all",
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> MeanShift:
    """The mean difference source − target of what modules write, over a prompt's positions and then over prompts.

    Arguments are those of :func:`cache_activations`; give prompts on which you choose, not those on which you report.
    """
    reading = plan_reading(pair.target, task, positions, max_new_tokens, batch_size, progress=progress)
    places = modules_of(pair.layout, modules)
    sites = list(dict.fromkeys(m.site for m in places))
    theirs, ours = (_means(model, reading, sites, batch_size, progress) for model in (pair.source, pair.target))
    # the prompts that gave the vectors report no effect of them
    selection = Selection(task.keys)
    vectors: dict[str, Tensor] = {}
    for module in places:
        name = SelectedModule(module.address, selection)
        if module.part is None:
            vectors[name] = theirs[module.site] - ours[module.site]
        else:
            vectors[name] = _write(pair.source, module, theirs) - _write(pair.target, module, ours)
    measured = f"mean of {positions} positions of {len(task)} {task.name} prompts, {pair.name}"
    return MeanShift(vectors, measured=measured)


def _write(model: LanguageModel, module: Module, means: dict[Site, Tensor]) -> Tensor:
    """A head's or neuron's mean write: the mean of z, times W_O, or of the activation, times its column."""
    part, mean = module.part, means[module.site]
    if module.head is None:
        return mean[part] * model.neuron_weights(module.site.layer)[part].to(mean)
    return mean[part] @ model.output_weights(module.site.layer)[part].to(mean)


def _means(
    model: LanguageModel, reading: Reading, sites: list[Site], batch_size: int, progress: bool
) -> dict[Site, Tensor]:
    """The mean activation of every site, in float32: over a prompt's counted positions, then over prompts."""
    import torch

    totals: dict[Site, Tensor] = {}
    current: list[Batch] = []
    body = Body(model)
    make_ready(model)

    def listener(site: Site) -> Any:
        def add(tensor: Tensor) -> None:
            inner = tensor.shape[-2:] if site.place == "z" else tensor.shape[-1:]
            rows = current[-1].gather(tensor.detach()).float().reshape(-1, *inner)
            sums = current[-1].mean(rows).sum(0).cpu()
            totals[site] = totals.get(site, torch.zeros_like(sums)) + sums

        return add

    ends = [body.listen(site, listener(site)) for site in sites]
    try:
        with torch.no_grad():
            for batch in reading.batches(model.hf, batch_size, "left", progress, "mean activations"):
                current.append(batch)
                model.hf(**batch.hidden_only)
    finally:
        for end in ends:
            end()
    return {site: total / len(reading) for site, total in totals.items()}
