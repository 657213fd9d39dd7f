"""Two models of one shape, a source that gives modules and a target that receives them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mechtransplant.display import html_table
from mechtransplant.errors import CompatibilityError, UsageError
from mechtransplant.modules import Kind, Layout, Region
from mechtransplant.pair.compatibility import Compatibility, compare_models
from mechtransplant.pair.model import LanguageModel, Parameters
from mechtransplant.weights import DeviceMap

#: what is in place belongs to the weights, not to a pair: two pairs may share a target
_IN_PLACE: weakref.WeakKeyDictionary[Any, tuple[list[Any], list[Any]]] = weakref.WeakKeyDictionary()


def _in_place(hf: Any) -> tuple[list[Any], list[Any]]:
    return _IN_PLACE.setdefault(hf, ([], []))


def grafts_on(hf: Any) -> list[Any]:
    """What grafts of any pair have written into a model now, oldest first."""
    return _in_place(hf)[0]


@dataclass
class Pair:
    """A source that gives modules and a target that receives them."""

    source: LanguageModel
    target: LanguageModel
    compatibility: Compatibility
    name: str = ""
    default_task: str | None = None
    #: the modules that carry the task's skill, where a pair was made so that they are known
    planted: tuple[str, ...] = ()
    #: the common ancestor of both, where one was named: merge operators take changes from it
    base: LanguageModel | None = None
    #: names of the tasks that the models can do, the pair's own included: where side effects are measured
    tasks: tuple[str, ...] = ()
    #: role and name of a parameter → its state when it was seen to be finite (see ``grafting``)
    known_finite: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The layout that both models share."""
        return self.target.layout

    @property
    def source_parameters(self) -> Mapping[str, Any]:
        """The source's parameters by name."""
        return Parameters(self.source.hf)

    @property
    def target_parameters(self) -> Mapping[str, Any]:
        """The target's parameters by name: the tensors that grafts write."""
        return Parameters(self.target.hf)

    @property
    def base_parameters(self) -> Mapping[str, Any]:
        """The ancestor's parameters by name; empty without one."""
        return {} if self.base is None else Parameters(self.base.hf)

    @property
    def applied(self) -> list[Any]:
        """What grafts of any pair have written into the target now, oldest first."""
        return grafts_on(self.target.hf)

    @property
    def conditional(self) -> list[Iterable[Region]]:
        """What conditional grafts in place now may write into the target."""
        return _in_place(self.target.hf)[1]

    def modules(self, kind: Kind | Iterable[Kind]) -> list[str]:
        """Every address of a kind, or of several: "linear", "head", "neuron", "mlp", "attn", "block", "part", "norm" or
        "embedding"."""
        kinds = [kind] if isinstance(kind, str) else kind
        return list(dict.fromkeys(m for each in kinds for m in self.layout.of_kind(each)))

    def check_free(self, regions: Iterable[Region]) -> None:
        """Raise UsageError if a conditional graft in place writes the same parameters."""
        wanted = {region.parameter for region in regions}
        for held in self.conditional:
            both = sorted(wanted & {region.parameter for region in held})
            if both:
                raise UsageError(
                    f"a conditional graft is in place and switches {both[0]}: enter its block inside of the other "
                    "graft's, or graft modules that share no parameter"
                )

    def check_plain(self, what: str) -> None:
        """Raise UsageError if a graft is in place: ``what`` would not be of the target that it seems to be of."""
        if self.conditional:
            raise UsageError(
                f"a conditional graft is in place on this pair's target: leave its block first, then {what}"
            )

    def reversed(self) -> Pair:
        """The same two models with their parts exchanged."""
        swapped = compare_models(self.target, self.source).turned_from(self.compatibility)
        name = f"{self.name} reversed"
        return Pair(self.target, self.source, swapped, name, self.default_task, self.planted, self.base, self.tasks)

    def __repr__(self) -> str:
        return f"Pair({self.name!r}, source={self.source!r}, target={self.target!r})"

    def _repr_html_(self) -> str:
        source, target = self.source.described(), self.target.described()
        counts = ", ".join(f"{len(self.modules(kind))} {name}" for kind, name in _COUNTED.items())
        notes = [f"Can be grafted: {counts}.", *(f"Stays the target's: {what}." for what in self.compatibility.stays)]
        notes += [f"Planted: {', '.join(self.planted)}."] if self.planted else []
        rows = [(what, source[what], target[what]) for what in target]
        return html_table(rows, ("", "source", "target"), f"Pair {self.name}", notes)


#: kinds of modules that a pair counts, in words
_COUNTED: dict[Kind, str] = {"head": "heads", "mlp": "MLPs", "linear": "linear layers"}


def load_pair(
    name: str | None = None,
    *,
    source: str | None = None,
    target: str | None = None,
    base: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    one_at_a_time: bool = False,
    device_map: DeviceMap | None = None,
) -> Pair:
    """Two models by the pair's name, or by the specs of its source and its target (see ``weights``).

    ``load_pair("family/generations")``, ``load_pair(source="org/model-it", target="org/model")``. ``base`` is the spec
    of their common ancestor, for merge operators that take changes from one.

    Args:
        dtype: float32, bfloat16 or float16.
        device: a torch device; "auto": the first CUDA device where there is one, else the CPU.
        one_at_a_time: for two models that do not fit into memory together: the weights of the one that does not run lie
            in a file of the temporary folder (see ``weights.residence``). Results are the same to the bit.
        device_map: for models that do not fit on one device: "auto" spreads both over all CUDA devices, a mapping says
            which part is where (see ``weights.spread``); an ancestor stays in the CPU's memory.

    Raises:
        UnknownNameError: no pair of that name.
        WeightsError: weights that cannot be had.
        CompatibilityError: models between which nothing can be grafted, with the reasons.
    """
    from mechtransplant.weights import Residence, admit, get_pair, load_model

    task = None
    planted: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    if name is not None:
        if source or target:
            raise UsageError("give a pair's name, or source and target, not both")
        entry = get_pair(name)
        source, target, task, planted = entry.source, entry.target, entry.task, entry.planted
        tasks = entry.tasks
    if not source or not target:
        raise UsageError("a pair needs a name (see `mechtransplant pairs list`), or both a source and a target")
    if one_at_a_time and device_map is not None:
        raise UsageError("one_at_a_time keeps a model on one device: leave device_map out, or one_at_a_time")
    residence = Residence() if one_at_a_time else None

    def load(spec: str, where: DeviceMap | None) -> LanguageModel:
        model = LanguageModel(spec, *load_model(spec, dtype, device, device_map=where, models=2))
        if residence is not None:
            admit(model.hf, residence)
        return model

    theirs = load(source, device_map)
    # a module's two versions meet on one device
    ours = load(target, device_map if device_map is None else theirs.hf.hf_device_map)
    pair = make_pair(theirs, ours, name or f"{source} → {target}", task)
    pair.planted, pair.tasks = planted, tasks
    if base is not None:
        ancestor = load(base, None)
        unlike = compare_models(ancestor, ours).forbidden
        if unlike:
            raise CompatibilityError(f"{base} is no ancestor of {target}: {unlike[0]}. Give a model of the same shape")
        pair.base = ancestor
    return pair


def make_pair(source: LanguageModel, target: LanguageModel, name: str = "", default_task: str | None = None) -> Pair:
    """A pair from two loaded models; raises CompatibilityError when nothing can be grafted between them."""
    report = compare_models(source, target)
    if report.forbidden:
        reasons = "; ".join(report.forbidden[:3]) + (
            f"; and {len(report.forbidden) - 3} more" if len(report.forbidden) > 3 else ""
        )
        raise CompatibilityError(
            f"nothing can be grafted from {source.name} into {target.name}: {reasons}. Use two models of one "
            "architecture, size and tokenizer"
        )
    # both models must see the same text; a base model often lacks the template that its sibling has
    if not getattr(target.tokenizer, "chat_template", None) and getattr(source.tokenizer, "chat_template", None):
        # a copy: the tokenizer may serve other models
        target.tokenizer = copy.deepcopy(target.tokenizer)
        target.tokenizer.chat_template = source.tokenizer.chat_template
    source.tokenizer = target.tokenizer
    return Pair(source, target, report, name, default_task)
