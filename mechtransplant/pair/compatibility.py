"""What matches between two models, what stays the target's in any graft, and what forbids one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechtransplant.display import html_table
from mechtransplant.pair.model import LanguageModel

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Compatibility:
    """What matches between two models, what stays the target's in any graft, and what forbids one.

    ``checks`` has columns ``what, source, target, verdict`` (same / stays the target's / forbids); ``shapes`` has one
    row a linear layer: ``module, source, target, match, relative_change`` (‖ΔW‖ / ‖W_target‖, Frobenius).
    """

    checks: pd.DataFrame
    shapes: pd.DataFrame

    def turned_from(self, before: Compatibility) -> Compatibility:
        """This report with what differed between the tokenizers, from before the pair was turned.

        Both models have shared one tokenizer since then, so that a comparison now would find no difference.
        """
        import pandas as pd

        known = {row["what"]: row for row in before.checks.to_dict("records") if row["what"] in _TOKENIZER}
        rows = []
        for row in self.checks.to_dict("records"):
            was = known.get(row["what"])
            if was is not None:
                verdict = {_TARGETS: _SOURCES, _SOURCES: _TARGETS}.get(was["verdict"], was["verdict"])
                row = {**row, "source": was["target"], "target": was["source"], "verdict": verdict}
            rows.append(row)
        return Compatibility(pd.DataFrame(rows), self.shapes)

    @property
    def forbidden(self) -> list[str]:
        """The reasons that forbid a graft, in words; empty when one is possible."""
        rows = self.checks[self.checks.verdict == "forbids"]
        return [f"{row.what} (source {row.source}, target {row.target})" for row in rows.itertuples()]

    @property
    def table(self) -> pd.DataFrame:
        """``checks``, and a last row that counts the linear layers and those with different weights."""
        import pandas as pd

        layers, changed = len(self.shapes), int((self.shapes.relative_change > 0).sum())
        row = {"what": "linear layers", "source": layers, "target": layers, "verdict": f"{changed} differ in weights"}
        return pd.concat([self.checks, pd.DataFrame([row])], ignore_index=True)

    @property
    def stays(self) -> list[str]:
        """Settings and tensors that differ and no graft moves: the target's stay, unless the verdict says otherwise."""
        rows = self.checks[~self.checks.verdict.isin(["same", "forbids"])]
        return [
            f"{row.what} (source {row.source}, target {row.target})"
            + ("" if row.verdict == _TARGETS else f": {row.verdict}")
            for row in rows.itertuples()
        ]

    def __str__(self) -> str:
        lines = [
            f"{row.what:34} {row.source!s:>26} {row.target!s:>26}  {row.verdict}" for row in self.checks.itertuples()
        ]
        return "\n".join([*lines, self._layers])

    @property
    def _layers(self) -> str:
        changed = int((self.shapes.relative_change > 0).sum())
        return f"{len(self.shapes)} linear layers of equal name and shape, {changed} of them with different weights"

    def _repr_html_(self) -> str:
        rows = [(row.what, row.source, row.target, row.verdict) for row in self.checks.itertuples()]
        return html_table(rows, ("", "source", "target", "verdict"), "What matches", [f"{self._layers}."])


_TARGETS, _SOURCES = "stays the target's", "the source's is used for both"
#: what is of a tokenizer, and may differ
_TOKENIZER = ("begin and end tokens", "chat template")
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
SETTINGS = (
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
    # Granite's
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
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
            check(key, [_derived(c, key) if v is None else v for c, v in zip(configs, values, strict=True)], "forbids")
    _check_tokenizers(check, source.tokenizer, target.tokenizer)
    for key in SETTINGS:
        values = [getattr(c, key, None) for c in configs]
        if values != [None, None]:
            check(key, values, _TARGETS)
    check("dtype", [str(m.hf.dtype).removeprefix("torch.") for m in (source, target)], _TARGETS)
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


def _derived(config: Any, key: str) -> Any:
    """What a model takes for a number that its config leaves out; None where there is no such rule."""
    heads = getattr(config, "num_attention_heads", None)
    if key == "head_dim" and heads:
        return config.hidden_size // heads
    return heads if key == "num_key_value_heads" else None


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
    check("begin and end tokens", special, _TARGETS)
    templates = [getattr(t, "chat_template", None) for t in (source, target)]
    otherwise = _TARGETS if templates[1] else _SOURCES
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
            new, old = tensors[0].detach().to(tensors[1].device).float(), tensors[1].detach().float()
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
        equal = len(fits) == len(names) and all(torch.equal(theirs[n], ours[n].to(theirs[n])) for n in names)
        check(f"{group} ({len(names)} tensors)", ["equal" if equal else "differ"] * 2, _TARGETS, same=equal)
