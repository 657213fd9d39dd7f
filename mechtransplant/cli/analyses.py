"""Commands that measure: a run, shifts, effects, heads against MLPs, the planted benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechtransplant.cli.app import app, bench_app, listed
from mechtransplant.errors import UsageError

DEVICE = "The device instead of the config's: cpu, cuda, auto, …; a folder may go on with another one."


def _say_unused(device: str) -> None:
    """A line where a GPU is here and the config names the CPU."""
    import torch

    if device == "cpu" and torch.cuda.is_available():
        typer.echo(f"{torch.cuda.get_device_name()} is here and is not used: --device auto uses it", err=True)


def _run(
    config_path: Path,
    out: Path | None,
    dry: bool = False,
    device: str | None = None,
    engine: Any = "serial",
    workers: int | None = None,
    address: str | None = None,
    reuse: Path | None = None,
) -> None:
    from mechtransplant.errors import wrong_in
    from mechtransplant.experiment import Run
    from mechtransplant.experiment.config import on_device, read_config
    from mechtransplant.experiment.worker import EngineChoice

    config = on_device(read_config(config_path), device)
    folder = out or Path("runs") / config.name
    if device is None and config.device_map is None:
        _say_unused(config.device)
    choice = EngineChoice(engine, workers, address)
    with wrong_in(config_path):
        made = Run(config, folder, engine=choice, reuse=reuse)
    if dry:
        typer.echo(f"{folder}: {made.estimate()}")
        return
    result = made.execute()
    typer.echo(result.summary)
    typer.echo(f"Tables and figures are in {result.folder}")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file; configs/ has examples.")],
    out: Annotated[
        Path | None, typer.Option(help="The run's folder (runs/NAME by default). Started again, a run continues.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Where cells are computed: serial, processes or ray.")] = "serial",
    workers: Annotated[int | None, typer.Option(help="With --engine processes or ray: how many (2).")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="With --engine ray: a cluster's, such as ray://HOST:10001. Else Ray starts here."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it, and say what it would cost.")] = False,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    reuse: Annotated[
        Path | None, typer.Option(help="Another run's folder: cells and rankings that are the same there are taken.")
    ] = None,
) -> None:
    """Run a config: baselines, ranking, K sweep with random controls, report on held-out questions."""
    _run(config, out, dry_run, device, engine, workers, address, reuse)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo")) -> None:
    """The main job on the small models in the repo: about a minute on two quiet cores."""
    from mechtransplant.weights import models_folder

    _run(models_folder() / "demo.yaml", out)
    typer.echo(f"Next: mechtransplant report {out} (one page with everything), or make lab and notebook 01")


@app.command()
def shifts(
    pair: Annotated[str, typer.Argument(help="A pair's name.")],
    task: Annotated[str | None, typer.Option(help="A task's name or a JSONL file; the pair's own by default.")] = None,
    control: Annotated[str | None, typer.Option(help="A task whose prompts serve as control.")] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts of each.")] = 64,
    unit: Annotated[str, typer.Option(help="prompt, or template: prompts that share one are averaged.")] = "prompt",
    positions: Annotated[str, typer.Option(help="all, last, answer or decoding.")] = "answer",
    kinds: Annotated[str, typer.Option(help="head, neuron, mlp, attn, linear; several with commas.")] = "head,mlp",
    correction: Annotated[str, typer.Option(help="max-t, max-t-step-down, holm, by, bh, …")] = "max-t",
    permutations: Annotated[int, typer.Option(help="Of every test: the smallest p is one over them.")] = 10_000,
    text: Annotated[
        str, typer.Option(help="With --positions decoding: whose text, target, source or gold.")
    ] = "target",
    k: Annotated[int, typer.Option(help="K of the top-K share and stability.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the split, the permutations and the bootstrap.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder (runs/shifts-PAIR by default); of the same options, it is replaced.")
    ] = None,
) -> None:
    """Measure how every head and MLP shifts between two models, test it, and draw it."""
    from mechtransplant.experiment import ShiftConfig, report_shifts

    # the library checks the names, and says which there are
    where: Any = positions
    whose: Any = unit
    read: Any = text
    parts = tuple(part.strip() for part in kinds.split(","))
    config = ShiftConfig(
        pair, task, control, prompts, whose, where, parts, correction, k, batch_size, seed, read, permutations
    )
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
        numbers = tuple(dict.fromkeys(int(part) for part in listed(counts)))
    except ValueError as error:
        raise UsageError(f"--counts is whole numbers with commas, for example 1,2,4, got {counts!r}") from error
    # the library checks the names, and says which there are
    policy: Any = kv
    ablations: Any = tuple(dict.fromkeys(listed(methods)))
    config = HeadsMlpsConfig(pair, task, rule, numbers, ablations, sets, discover, test, batch_size, policy, seed)
    folder = out or Path("runs") / f"heads-vs-mlps-{pair.replace('/', '-')}"
    typer.echo(report_heads_and_mlps(config, folder))
    typer.echo(f"Tables and figures are in {folder}")


@app.command()
def screen(
    config: Annotated[Path, typer.Argument(help="A YAML file; see docs/configuration.md.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder (runs/NAME by default). Started again, it continues.")
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
) -> None:
    """Compare recipes (kinds, rules, operators, strengths, sizes) on choose, and write the best as a run's config."""
    from mechtransplant.errors import wrong_in
    from mechtransplant.experiment import read_screen, report_screen

    wanted = read_screen(config)
    if device is None:
        _say_unused(wanted.device)
    folder = out or Path("runs") / wanted.name
    with wrong_in(config):
        said = report_screen(wanted, folder, device=device)
    typer.echo(said)
    best = folder / "best.yaml"
    typer.echo(f"Tables and figures are in {folder}" + (f"; next: mechtransplant run {best}" if best.exists() else ""))


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
    given |= {key: tuple(listed(given[key])) for key in lists if isinstance(given.get(key), str)}
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
    asked = given.get("rules") if config is None and not (out / "config.yaml").is_file() else None
    for option in ("options", "single"):
        strange = [rule for rule in given.get(option) or () if asked and rule not in asked]
        if strange:
            raise UsageError(f"--{option} names {strange[0]}, which is none of --rules: add it there, or leave it out")
    typer.echo(report_planted(continued(out, given), out, finished_only=finished_only))
    typer.echo(f"Tables and figures are in {out}")
