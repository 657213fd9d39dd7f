"""A graft as a PEFT LoRA adapter, where the difference that it makes is of low rank.

The difference Δ = grafted − target of a layer becomes B A with the smallest rank r for which ‖Δ − B A‖ / ‖Δ‖ ≤ the
tolerance (Frobenius norms; the best B A of a rank is that of the singular values, Eckart and Young 1936). With
alpha = r the adapter's scale is 1, so that target + adapter is the grafted model up to that error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError, check_count, finite_number
from mechtransplant.evaluation.batches import make_ready
from mechtransplant.export.card import (
    METHOD,
    NOT_MEASURED,
    front_matter,
    graft_section,
    outcome_lines,
    side_effect_lines,
)
from mechtransplant.export.given import check_given
from mechtransplant.export.grafted import with_tensors, written_tensors
from mechtransplant.export.manifest import describe
from mechtransplant.export.staging import check_free, new_folder, readable
from mechtransplant.progress import track
from mechtransplant.weights import write_hashes

if TYPE_CHECKING:
    from mechtransplant.evaluation import Outcome
    from mechtransplant.grafting import Graft
    from mechtransplant.pair import Pair

PROBE = "What is 47 + 85? \\boxed{132}\n"
WHOLE = "export the whole model instead (export_graft, or `mechtransplant export` without --adapter)"


@dataclass(frozen=True)
class AdapterExport:
    """What was written: by linear layer the rank and the relative error ‖Δ − B A‖ / ‖Δ‖, and the cost in logits.

    ``logit_difference`` is the largest |Δ logit| between target + adapter and the grafted model on a probe text.
    """

    folder: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    logit_difference: float

    def __str__(self) -> str:
        return (
            f"{self.folder}: a LoRA on {len(self.ranks)} linear layers, ranks {min(self.ranks.values())} to "
            f"{max(self.ranks.values())}, relative error up to {max(self.errors.values()):.2g}, logits of a probe text "
            f"within {self.logit_difference:.2g} of the graft's"
        )


@dataclass(frozen=True)
class Factors:
    """One layer's difference as B A: ``down`` is A (rank, in), ``up`` is B (out, rank), both float32."""

    address: str
    module: str
    down: Any
    up: Any
    error: float


def export_adapter(
    pair: Pair,
    graft: Graft,
    folder: str | Path,
    *,
    max_rank: int = 64,
    tolerance: float = 1e-3,
    outcome: Outcome | None = None,
    side_effects: Any = None,
    task: str | None = None,
    name: str | None = None,
    licence: str | None = None,
) -> AdapterExport:
    """Write the difference that a graft makes as a LoRA for the target, for ``PeftModel.from_pretrained``.

    Args:
        folder: where; it must not exist yet, or be empty. It appears whole or not at all.
        max_rank: the largest rank of a layer.
        tolerance: the largest relative error of a layer (Frobenius norm).
        outcome: what the graft itself did, for the model card, and ``task``, what that was measured on;
            ``side_effects``, what it costs elsewhere (see :func:`export_graft`).
        name: the model card's title.
        licence: an identifier of the hub, such as "apache-2.0".

    Raises:
        UsageError: a layer that needs a higher rank, a difference outside the weights of linear layers, a graft that
        changes nothing, or a folder that cannot be written.
    """
    check_given(pair, graft, folder, outcome, task)
    check_free(Path(folder).expanduser())
    check_count("max_rank", max_rank)
    if not 0 < finite_number("tolerance", tolerance) < 1:
        raise UsageError(f"tolerance is a relative error above 0 and below 1, got {tolerance}")
    _, changed = written_tensors(pair, graft)
    layers = factors(pair, changed, max_rank, tolerance)
    difference = _logit_difference(pair, changed, layers)
    tensors = {}
    for layer in layers:
        tensors[f"base_model.model.{layer.module}.lora_A.weight"] = layer.down
        tensors[f"base_model.model.{layer.module}.lora_B.weight"] = layer.up
    made = AdapterExport(
        Path(folder),
        {layer.address: layer.down.shape[0] for layer in layers},
        {layer.address: layer.error for layer in layers},
        difference,
    )
    with new_folder(folder, sum(t.numel() * t.element_size() for t in tensors.values())) as temporary:
        import safetensors.torch

        safetensors.torch.save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_config(pair, layers, temporary)
        title = name or Path(folder).expanduser().resolve().name
        measured = outcome_lines(outcome, task or "") if outcome else [NOT_MEASURED]
        if side_effects is not None:
            measured += ["", "### Side effects", "", *side_effect_lines(side_effects)]
        card = _card(pair, graft, made, tolerance, title, measured, licence)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_hashes(temporary)
    return made


def factors(pair: Pair, changed: dict[str, Any], max_rank: int, tolerance: float) -> list[Factors]:
    """Every changed layer's difference as B A; raises UsageError naming the first layer that cannot be said so."""
    import torch

    addresses = {f"{module}.weight": address for address, module in pair.layout.linears.items()}
    moved = {n: t for n, t in changed.items() if not torch.equal(t, pair.target_parameters[n])}
    if not moved:
        raise UsageError("this graft changes no number of the target: there is no difference to write as an adapter")
    for name in moved:
        if name not in addresses:
            raise UsageError(f"{name} differs, and a LoRA holds only the weights of linear layers: {WHOLE}")
    found = []
    for name, tensor in track(moved.items(), "singular values", total=len(moved)):
        difference = tensor.detach().cpu().double() - pair.target_parameters[name].detach().cpu().double()
        if addresses[name] in pair.layout.transposed:
            difference = difference.T
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        # entry r: the error of rank r
        left = (s.square().flip(0).cumsum(0).flip(0) / s.square().sum()).sqrt().tolist() + [0.0]
        rank = next(r for r, error in enumerate(left) if r > 0 and error <= tolerance)
        if rank > max_rank:
            raise UsageError(
                f"{addresses[name]} differs by a matrix that needs rank {rank} for a relative error of {tolerance:g} "
                f"(at rank {max_rank} it is {left[max_rank]:.2g}): raise max_rank or tolerance, or {WHOLE}"
            )
        root = s[:rank].sqrt()
        up = (u[:, :rank] * root).float().contiguous()
        down = (root[:, None] * v[:rank]).float().contiguous()
        # of the numbers as they are stored
        error = float((difference - up.double() @ down.double()).norm() / difference.norm())
        found.append(Factors(addresses[name], name.removesuffix(".weight"), down, up, error))
    return found


def _logit_difference(pair: Pair, changed: dict[str, Any], layers: list[Factors]) -> float:
    import torch

    make_ready(pair.target)
    merged = {}
    for layer in layers:
        name = f"{layer.module}.weight"
        target = pair.target_parameters[name].detach()
        product = (layer.up @ layer.down).to(target.device)
        product = product.T if layer.address in pair.layout.transposed else product
        merged[name] = (target.float() + product).to(target.dtype)
    ids = torch.tensor([pair.target.tokenizer(PROBE)["input_ids"]], device=pair.target.hf.device)
    logits = []
    for tensors in (changed, merged):
        with torch.inference_mode():
            logits.append(with_tensors(pair.target, tensors, "probe").hf(ids).logits.float())
    return float((logits[0] - logits[1]).abs().max())


def _write_config(pair: Pair, layers: list[Factors], folder: Path) -> None:
    """``adapter_config.json`` by peft itself, in a fixed order."""
    import peft

    ranks = {layer.module: int(layer.down.shape[0]) for layer in layers}
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=any(layer.address in pair.layout.transposed for layer in layers),
        base_model_name_or_path=readable(pair.target.name),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # peft keeps a set, whose order changes from process to process
    content["target_modules"] = list(ranks)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(
    pair: Pair,
    graft: Graft,
    made: AdapterExport,
    tolerance: float,
    title: str,
    measured: list[str],
    licence: str | None,
) -> str:
    said = describe(pair, graft, None)
    lines = [
        front_matter(pair, licence, "peft", "adapter"),
        f"# {title}",
        "",
        f"A LoRA for `{readable(pair.target.name)}` that stands for {len(graft)} modules of "
        f"`{readable(pair.source.name)}` grafted in, without training, by mechtransplant "
        f"{said['made_by']['mechtransplant']}. Every layer's difference was factored by singular values in float64, "
        f"at the smallest rank with a relative error of at most {tolerance:g}.",
        "",
        f"Made for the target with the fingerprint `{said['pair']['target']['fingerprint']}`, from the source "
        f"`{said['pair']['source']['fingerprint']}`.",
        "",
        f"**Error.** Largest |Δ logit| against the grafted model on the probe text {json.dumps(PROBE)}: "
        f"{made.logit_difference:.3g}.",
        "",
        "| layer | rank | relative error ‖Δ − BA‖ / ‖Δ‖ |",
        "|---|---|---|",
        *(f"| {address} | {rank} | {made.errors[address]:.2g} |" for address, rank in made.ranks.items()),
        "",
        *graft_section(pair, graft, said["graft"]),
        "",
        "## What the graft does",
        "",
        *measured,
        "",
        "## Load",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        'target = AutoModelForCausalLM.from_pretrained("TARGET")',
        'model = PeftModel.from_pretrained(target, "FOLDER").merge_and_unload()',
        "```",
        "",
        f"The method of the graft is that of {METHOD}.",
    ]
    return "\n".join(lines) + "\n"
