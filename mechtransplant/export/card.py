"""README.md of an exported folder: a model card that says what was done, what it did, and how to check it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.export.staging import readable
from mechtransplant.grafting import Graft
from mechtransplant.modules import Layout, heads_in_words, parse_address
from mechtransplant.pair import LanguageModel, Pair
from mechtransplant.weights import HUB_NAME

if TYPE_CHECKING:
    from mechtransplant.evaluation import Outcome

METHOD = "arXiv [2602.16189](https://arxiv.org/abs/2602.16189)"
NOT_MEASURED = "No outcome was given: what this graft does was not measured."
NO_SIDE_EFFECTS = "No side effects were given: what this graft costs elsewhere was not measured."


def front_matter(pair: Pair, licence: str | None, library: str, relation: str) -> str:
    """The YAML block that the Hugging Face hub reads."""
    import yaml

    content: dict[str, Any] = {
        "base_model": [_hub_name(pair.target), _hub_name(pair.source)]
        if relation == "merge"
        else _hub_name(pair.target),
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["merge", "mechtransplant"],
    }
    if licence:
        content["license"] = licence
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"


def model_card(
    pair: Pair,
    graft: Graft,
    manifest: dict[str, Any],
    *,
    name: str,
    outcome: Outcome | None,
    task: str,
    side_effects: Any,
    licence: str | None,
) -> str:
    """The card's text, in Markdown."""
    said = manifest["graft"]
    lines = [
        front_matter(pair, licence, "transformers", "merge"),
        f"# {name}",
        "",
        f"`{readable(pair.target.name)}` with {len(graft)} modules of `{readable(pair.source.name)}` grafted in, "
        f"without training, by mechtransplant {manifest['made_by']['mechtransplant']}.",
        "",
        *graft_section(pair, graft, said),
        "",
        "## What it does",
        "",
        *(outcome_lines(outcome, task) if outcome else [NOT_MEASURED]),
        "",
        "## What it costs elsewhere",
        "",
        *side_effect_lines(side_effects),
        "",
        "## Load",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        "## Check",
        "",
        "`manifest.json` has the hash of every tensor here and in the target, and of every file. "
        "`mechtransplant verify FOLDER` reads all of it again; with the two models (`--source SPEC --target SPEC`) it "
        "also shows that no number outside the modules above moved, and that those inside are what the graft writes.",
        "",
        _recipe_line(manifest),
        "",
        "## Method",
        "",
        f"The method is that of {METHOD}.",
    ]
    return "\n".join(lines) + "\n"


def graft_section(pair: Pair, graft: Graft, said: dict[str, Any]) -> list[str]:
    """What was moved: equation, table by layer, consequences."""
    return [
        "## The graft",
        "",
        f"{said['parameters']:,} numbers ({said['parameter_share']:.1%} of the model), {graft.mode} by "
        f"`{graft.operator.name}`: {graft.operator.equation}"
        + _options(said["operator"]["options"])
        + f". K/V policy: `{graft.kv}`.",
        "",
        "| layer | modules | strength |",
        "|---|---|---|",
        *(f"| {layer} | {modules} | {strength:g} |" for layer, modules, strength in module_rows(pair.layout, graft)),
        "",
        *(f"- {line}" for line in said["consequences"] or ["nothing else moves"]),
        *(f"- differs between the two models and stays the target's: {line}" for line in pair.compatibility.stays),
    ]


def module_rows(layout: Layout, graft: Graft) -> list[tuple[str, str, float]]:
    """(layer, modules, strength): one row a layer and strength, heads as ranges, all linear layers in one phrase."""
    rows: dict[tuple[int, float], list[str]] = {}
    for module, strength in zip(graft.modules, graft.strengths, strict=True):
        rows.setdefault((layout.check(module).layer, strength), []).append(module)
    found = []
    for (layer, strength), modules in sorted(rows.items()):
        linears = [a for a in layout.linears if parse_address(a).layer == layer]
        heads = sorted(h for m in modules if (h := layout.check(m).head) is not None)
        neurons = sorted(n for m in modules if (n := layout.check(m).neuron) is not None)
        others = [m for m in modules if layout.check(m).kind not in ("head", "neuron")]
        said = [heads_in_words(heads)] if heads else []
        said += [heads_in_words(neurons, "neuron")] if neurons else []
        if linears and set(linears) <= set(others):
            said.append(f"all {len(linears)} linear layers")
            others = [m for m in others if m not in linears]
        said += [re.sub(rf"^L{layer}\.", "", m) if m != f"L{layer}" else "the whole block" for m in others]
        found.append(("–" if layer < 0 else f"L{layer}", ", ".join(said), strength))
    return found


def outcome_lines(outcome: Outcome, task: str) -> list[str]:
    """The statistics of an outcome, as a table and a list."""
    # only what the outcome itself knows: whether its questions chose the graft, nobody else can say
    split = f" (split `{outcome.role}`)" if outcome.role else ""
    lines = [
        f"On {outcome.n} questions{f' of {task or outcome.task}' if task or outcome.task else ''}{split}:",
        "",
        "| | accuracy |",
        "|---|---|",
        f"| target | {outcome.target_accuracy:.1%} |",
        f"| source | {outcome.source_accuracy:.1%} |",
        f"| this model | {outcome.after_accuracy:.1%} |",
        "",
        f"- difference to the target {100 * outcome.difference:+.1f} points, 95 % interval "
        f"{_interval(outcome.interval, 100)} points; {outcome.gained} questions gained, {outcome.lost} lost; exact "
        f"McNemar p = {outcome.p_value:.2g}",
    ]
    if outcome.tir is not None:
        lines.append(f"- TIR (this model / target): {outcome.tir:.3f}, 95 % interval {_interval(outcome.tir_interval)}")
    if outcome.recovery is not None:
        lines.append(
            f"- Recovery (share of the gap between source and target): {outcome.recovery:.1f} %, 95 % interval "
            f"{_interval(outcome.recovery_interval)} %"
        )
    ranks, curve = outcome.controls, outcome.curve
    if ranks is not None:
        lines.append(
            f"- among {ranks.n} random sets matched in kind, depth and parameters: beats {ranks.beaten}, one-sided "
            f"permutation p = {ranks.p_value:.2g}; their median {ranks.median:.1%}, range {ranks.low:.1%} – "
            f"{ranks.high:.1%}"
        )
    if curve is not None:
        lines.append(
            f"- the ranking's whole K-curve among {curve.n} random orders: p = {curve.p_value:.2g} (max-statistic)"
        )
    # a ratio that is undefined or withheld has its reason among the notes
    return lines + [f"- {note}" for note in outcome.notes]


def side_effect_lines(side_effects: Any) -> list[str]:
    """Side effects as a table, or the sentence that none were given; raises UsageError for what is no table."""
    if side_effects is None:
        return [NO_SIDE_EFFECTS]
    header, rows = side_effect_table(side_effects)
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_cell(c) for c in row)} |" for row in cells]


def side_effect_table(side_effects: Any) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows of a pandas frame, or of a mapping: name → value, or name → mapping of values."""
    if hasattr(side_effects, "columns") and hasattr(side_effects, "itertuples"):
        return [str(c) for c in side_effects.columns], [list(row) for row in side_effects.itertuples(index=False)]
    if isinstance(side_effects, Mapping):
        from mechtransplant.evaluation import Outcome

        side_effects = {
            key: _effect(value) if isinstance(value, Outcome) else value for key, value in side_effects.items()
        }
        if any(isinstance(v, Mapping) for v in side_effects.values()):
            side_effects = {k: v if isinstance(v, Mapping) else {"value": v} for k, v in side_effects.items()}
        if side_effects and all(isinstance(v, Mapping) for v in side_effects.values()):
            columns = list(dict.fromkeys(key for v in side_effects.values() for key in v))
            rows = [[name, *(v.get(c, "") for c in columns)] for name, v in side_effects.items()]
            return ["", *map(str, columns)], rows
        return ["", "value"], [[name, value] for name, value in side_effects.items()]
    raise UsageError(f"side effects are a pandas frame or a mapping, got {type(side_effects).__name__}")


def _effect(outcome: Outcome) -> dict[str, Any]:
    """A row of an outcome on another task."""
    return {
        "target": f"{outcome.target_accuracy:.1%}",
        "this model": f"{outcome.after_accuracy:.1%}",
        "difference (points)": f"{100 * outcome.difference:+.1f} {_interval(outcome.interval, 100)}",
        "n": outcome.n,
    }


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _interval(ends: tuple[float, float] | None, scale: float = 1) -> str:
    if ends is None:
        return "–"
    low, high = ("∞" if math.isinf(end) else f"{scale * end:.3g}" for end in ends)
    return f"[{low}, {high}]"


def _options(options: dict[str, Any]) -> str:
    return f" ({', '.join(f'{key} = {value}' for key, value in options.items())})" if options else ""


def _recipe_line(manifest: dict[str, Any]) -> str:
    said = manifest["recipe"]
    if said["file"]:
        return f"`{said['file']}` is the same graft as a mergekit recipe."
    return f"There is no mergekit recipe: {said['reason']}."


def _hub_name(model: LanguageModel) -> str:
    """A model's name on the hub, without its revision; else its spec as a reader can understand it."""
    if HUB_NAME.fullmatch(model.name) and not Path(model.name).exists():
        return model.name.partition("@")[0]
    return readable(model.name)
