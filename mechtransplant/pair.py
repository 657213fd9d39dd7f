"""Two models of one shape: load them, report what matches, and give hook points over the same parameters.

The clean Hugging Face model is the truth. ``LanguageModel.bridge`` is a TransformerLens bridge, raw, on a twin that
shares the parameters: a write to either is seen by both, and ``hf`` keeps plain Hugging Face speed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import CompatibilityError, UsageError
from mechtransplant.modules import Kind, Layout, Region, layout_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class LanguageModel:
    """A causal model with its tokenizer: ``hf`` (clean), ``bridge`` (hook points), ``name``, ``fingerprint``."""

    name: str
    hf: Any
    tokenizer: Any
    #: called with the bridge when it is made: what acts on the model by then acts on the bridge too
    when_bridged: list[Callable[[Any], None]] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def bridge(self) -> Any:
        """A raw TransformerBridge over the same parameters; made when first asked for (about 4 s of imports)."""
        from transformer_lens.model_bridge import TransformerBridge

        # booting replaces submodules, so it gets a twin that shares every parameter
        twin = copy_without_hooks(self.hf, share_parameters=True)
        folder = getattr(self.hf.config, "_name_or_path", "") or self.name
        # a model that was built from a config does not say what it is, and the bridge asks
        twin.config.architectures = twin.config.architectures or [type(self.hf).__name__]
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=twin, tokenizer=self.tokenizer, device=str(self.hf.device)
        )
        for act in self.when_bridged:
            act(bridge)
        return bridge

    def weights_changed(self) -> None:
        """Forget a bridge that holds copies: the next use makes one of the weights as they are then."""
        if "bridge" in self.__dict__ and holds_copies(self.hf, self.bridge):
            del self.__dict__["bridge"]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of all parameters as they are now (a graft in place changes it)."""
        from mechtransplant.weights import fingerprint

        return fingerprint(self.hf)

    @cached_property
    def layout(self) -> Layout:
        """Where the model's modules are."""
        return layout_of(self.hf)

    def output_weights(self, layer: int) -> Any:
        """W_O of every head of a layer, shape (head, d_head, d_model): a head's write is z @ W_O[head]."""
        linear = self.hf.get_submodule(self.layout.linears[self.layout.attention_output(layer)])
        weight = linear.weight.detach()
        # GPT-2's Conv1D keeps its weight the other way round
        heads, d_head = self.layout.heads, self.layout.d_head
        if weight.shape[0 if self.layout.attention_output(layer) in self.layout.transposed else 1] != heads * d_head:
            raise UsageError(f"the output projection of L{layer} does not read {heads} heads of {d_head} numbers each")
        inward = weight if self.layout.attention_output(layer) in self.layout.transposed else weight.T
        return inward.reshape(self.layout.heads, self.layout.d_head, -1)

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.hf.parameters()) / 1e6
        return f"LanguageModel({self.name!r}, {type(self.hf).__name__}, {millions:.1f} M parameters)"


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def copy_without_hooks(hf: Any, share_parameters: bool = False) -> Any:
    """A copy of a Hugging Face model without what acts on it now: a copied hook would act on nobody's behalf."""
    kept = [(module, name, getattr(module, name)) for module in hf.modules() for name in _HOOKS]
    try:
        for module, name, hooks in kept:
            setattr(module, name, type(hooks)())
        return copy.deepcopy(hf, memo={id(p): p for p in hf.parameters()} if share_parameters else None)
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)


def holds_copies(hf: Any, bridge: Any) -> bool:
    """Whether a bridge has weights of its own (GPT-NeoX's Q, K and V are copied), which do not follow a graft."""
    shared = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    return any(p.untyped_storage().data_ptr() not in shared for p in bridge.original_model.parameters())


@dataclass(frozen=True)
class Compatibility:
    """What matches between two models, what stays the target's in any graft, and what forbids one.

    ``checks`` has columns ``what, source, target, verdict`` (same / stays the target's / forbids); ``shapes`` has one
    row a linear layer: ``module, source, target, match, relative_change`` (‖ΔW‖ / ‖W_target‖, Frobenius).
    """

    checks: pd.DataFrame
    shapes: pd.DataFrame

    @property
    def forbidden(self) -> list[str]:
        """The reasons that forbid a graft, in words; empty when one is possible."""
        rows = self.checks[self.checks.verdict == "forbids"]
        return [f"{row.what} (source {row.source}, target {row.target})" for row in rows.itertuples()]

    @property
    def stays(self) -> list[str]:
        """Settings and tensors that differ and no graft moves: the target's stay, unless the verdict says otherwise."""
        rows = self.checks[~self.checks.verdict.isin(["same", "forbids"])]
        return [
            f"{row.what} (source {row.source}, target {row.target})"
            + ("" if row.verdict == "stays the target's" else f": {row.verdict}")
            for row in rows.itertuples()
        ]

    def __str__(self) -> str:
        lines = [
            f"{row.what:34} {row.source!s:>26} {row.target!s:>26}  {row.verdict}" for row in self.checks.itertuples()
        ]
        changed = int((self.shapes.relative_change > 0).sum())
        lines.append(
            f"{len(self.shapes)} linear layers of equal name and shape, {changed} of them with different weights"
        )
        return "\n".join(lines)


class Parameters(Mapping[str, Any]):
    """A model's parameters by name, looked up when they are asked for: a model may be given new ones."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf

    def __getitem__(self, name: str) -> Any:
        try:
            return self.hf.get_parameter(name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.hf.named_parameters())

    def __len__(self) -> int:
        return sum(1 for _ in self)


#: what is in place belongs to the weights, not to a pair: two pairs may share a target
_IN_PLACE: weakref.WeakKeyDictionary[Any, tuple[list[Any], list[Any]]] = weakref.WeakKeyDictionary()


def _in_place(hf: Any) -> tuple[list[Any], list[Any]]:
    return _IN_PLACE.setdefault(hf, ([], []))


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
    #: the state of a parameter that was seen to be finite (see ``grafting``)
    known_finite: dict[str, Any] = field(default_factory=dict)

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
        return _in_place(self.target.hf)[0]

    @property
    def conditional(self) -> list[Iterable[Region]]:
        """What conditional grafts in place now may write into the target."""
        return _in_place(self.target.hf)[1]

    def modules(self, kind: Kind) -> list[str]:
        """Every address of a kind: "linear", "head", "mlp", "attn", "block", "part", "norm" or "embedding"."""
        return self.layout.of_kind(kind)

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
        swapped = compare_models(self.target, self.source)
        name = f"{self.name} reversed"
        return Pair(self.target, self.source, swapped, name, self.default_task, self.planted, self.base)

    def __repr__(self) -> str:
        return f"Pair({self.name!r}, source={self.source!r}, target={self.target!r})"


def load_pair(
    name: str | None = None,
    *,
    source: str | None = None,
    target: str | None = None,
    base: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> Pair:
    """Two models by the pair's name, or by the specs of its source and its target (see ``weights``).

    ``load_pair("family/generations")``, ``load_pair(source="org/model-it", target="org/model")``. ``base`` is the spec
    of their common ancestor, for merge operators that take changes from one.

    Raises:
        UnknownNameError: no pair of that name. WeightsError: weights that cannot be had. CompatibilityError: models
        between which nothing can be grafted, with the reasons.
    """
    from mechtransplant.weights import get_pair, load_model

    task = None
    planted: tuple[str, ...] = ()
    if name is not None:
        if source or target:
            raise UsageError("give a pair's name, or source and target, not both")
        entry = get_pair(name)
        source, target, task, planted = entry.source, entry.target, entry.task, entry.planted
    if not source or not target:
        raise UsageError("a pair needs a name (see `mechtransplant pairs list`), or both a source and a target")
    theirs = LanguageModel(source, *load_model(source, dtype=dtype, device=device))
    ours = LanguageModel(target, *load_model(target, dtype=dtype, device=device))
    pair = make_pair(theirs, ours, name or f"{source} → {target}", task)
    pair.planted = planted
    if base is not None:
        ancestor = LanguageModel(base, *load_model(base, dtype=dtype, device=device))
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


#: configuration that decides whether tensors fit together at all
_STRUCTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)
#: configuration that a graft does not move
_SETTINGS = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "attention_bias",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def compare_models(source: LanguageModel, target: LanguageModel) -> Compatibility:
    """The compatibility report of two loaded models."""
    import pandas as pd

    rows: list[dict[str, Any]] = []

    def check(what: str, values: Sequence[Any], otherwise: str, same: bool | None = None) -> None:
        a, b = values
        equal = a == b if same is None else same
        rows.append({"what": what, "source": a, "target": b, "verdict": "same" if equal else otherwise})

    configs = [m.hf.config.get_text_config() for m in (source, target)]
    for key in _STRUCTURE:
        values = [getattr(c, key, None) for c in configs]
        if values != [None, None]:
            check(key, values, "forbids")
    _check_tokenizers(check, source.tokenizer, target.tokenizer)
    for key in _SETTINGS:
        values = [getattr(c, key, None) for c in configs]
        if values != [None, None]:
            check(key, values, "stays the target's")
    check("dtype", [str(m.hf.dtype).removeprefix("torch.") for m in (source, target)], "stays the target's")
    # a tensor of integers is still packed by its quantiser: its numbers are no weights
    quantised = [
        any(not p.is_floating_point() for p in m.hf.parameters())
        or getattr(m.hf.config, "quantization_config", None) is not None
        for m in (source, target)
    ]
    check("still quantised", quantised, "forbids", same=not any(quantised))
    shapes = _compare_shapes(source, target)
    misfits = shapes[~shapes.match]
    for row in misfits.itertuples():
        check(f"shape of {row.module}", (row.source, row.target), "forbids")
    if misfits.empty and not any(quantised):
        _check_other_tensors(check, source, target)
    return Compatibility(pd.DataFrame(rows), shapes)


def _check_tokenizers(check: Any, source: Any, target: Any) -> None:
    vocabularies = [t.get_vocab() for t in (source, target)]
    check(
        "tokenizer vocabulary",
        [f"{len(v)} tokens" for v in vocabularies],
        "forbids",
        same=vocabularies[0] == vocabularies[1],
    )
    probe = "What is 47 + 85? \\boxed{132}\n"
    ids = [t(probe, add_special_tokens=False)["input_ids"] for t in (source, target)]
    check("tokens of a probe text", [f"{len(i)} tokens" for i in ids], "forbids", same=ids[0] == ids[1])
    special = [(t.bos_token, t.eos_token) for t in (source, target)]
    check("begin and end tokens", special, "stays the target's")
    templates = [getattr(t, "chat_template", None) for t in (source, target)]
    otherwise = "stays the target's" if templates[1] else "the source's is used for both"
    check("chat template", ["yes" if t else "none" for t in templates], otherwise, same=templates[0] == templates[1])


def _compare_shapes(source: LanguageModel, target: LanguageModel) -> pd.DataFrame:
    import pandas as pd

    parameters = [dict(m.hf.named_parameters()) for m in (source, target)]
    rows = []
    for address in dict.fromkeys([*source.layout.linears, *target.layout.linears]):
        names = [m.layout.linears.get(address) for m in (source, target)]
        tensors = [p.get(f"{n}.weight") for p, n in zip(parameters, names, strict=True)]
        sizes = [
            "missing" if t is None else " × ".join(map(str, t.shape)) + (" + bias" if f"{n}.bias" in p else "")
            for t, p, n in zip(tensors, parameters, names, strict=True)
        ]
        match = sizes[0] == sizes[1]
        change = float("nan")
        if match and tensors[0] is not None and tensors[1] is not None:
            new, old = tensors[0].detach().float(), tensors[1].detach().float()
            change = float((new - old).norm() / old.norm().clamp_min(1e-30))
        rows.append(
            {"module": address, "source": sizes[0], "target": sizes[1], "match": match, "relative_change": change}
        )
    return pd.DataFrame(rows)


def _check_other_tensors(check: Any, source: LanguageModel, target: LanguageModel) -> None:
    """Embeddings, norms and the output head: not moved by a graft, so a difference stays the target's."""
    import torch

    moved = {f"{n}.{s}" for n in target.layout.linears.values() for s in ("weight", "bias")}
    theirs = dict(source.hf.named_parameters())
    ours = dict(target.hf.named_parameters())
    if theirs.keys() != ours.keys():
        check("parameter names", (len(theirs), len(ours)), "forbids", same=False)
        return
    for group, is_in in (("norm scales", True), ("embeddings and output head", False)):
        names = [n for n in ours if n not in moved and ("norm" in n or "ln_" in n) == is_in]
        fits = [n for n in names if theirs[n].shape == ours[n].shape]
        equal = len(fits) == len(names) and all(torch.equal(theirs[n], ours[n].to(theirs[n].dtype)) for n in names)
        check(f"{group} ({len(names)} tensors)", ["equal" if equal else "differ"] * 2, "stays the target's", same=equal)
