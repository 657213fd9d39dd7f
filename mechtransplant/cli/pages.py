"""Commands that show: a finished folder as a web page, and the notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechtransplant.cli.app import app
from mechtransplant.errors import UsageError


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A folder that run, shifts, effects, heads-vs-mlps or bench wrote.")],
    out: Annotated[Path | None, typer.Option(help="The file (RUN/report.html by default).")] = None,
) -> None:
    """Write one web page that needs no network: verdict, figures, sortable tables, how to make it again."""
    from mechtransplant.report import write_page

    typer.echo(f"Open {write_page(run, out)} in a browser")


@app.command("figures")
def draw_figures(
    run: Annotated[Path, typer.Argument(help="A finished folder.")],
    out: Annotated[Path | None, typer.Option(help="The folder for the files (RUN/figures by default).")] = None,
) -> None:
    """Draw a finished folder's figures again, from its tables alone: PNG, PDF, SVG and their data."""
    from mechtransplant.experiment.drawing import draw

    names = draw(run, out)
    typer.echo(f"{', '.join(names)}: {out or run / 'figures'}")


@app.command()
def recheck(
    run: Annotated[Path, typer.Argument(help="A run's folder, finished or not.")],
    cells: Annotated[int, typer.Option(help="How many evaluations.")] = 1,
    seed: Annotated[int, typer.Option(help="Draws which.")] = 0,
) -> None:
    """Compute some of a run's evaluations again and compare them: exit code 1 where a verdict differs."""
    from mechtransplant.experiment.recheck import recheck as compared

    found = compared(run, cells, seed, progress=True)
    typer.echo(found.to_string(index=False))
    alike, same = int((found.differ == 0).sum()), int(found.same.sum())
    typer.echo(
        f"{alike} of {len(found)} have the same verdicts, {same} also the same log-probabilities to seven digits"
    )
    if alike < len(found):
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Option(help="The folder with the notebooks.")] = None,
    port: Annotated[int, typer.Option(help="Where JupyterLab listens; the next free one if it is taken.")] = 8888,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Start JupyterLab at the notebooks; other options are JupyterLab's own (--allow-root in a container)."""
    import subprocess
    import sys

    notebooks = _notebooks(folder)
    command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={notebooks}", f"--port={port}"]
    command += [] if browser else ["--no-browser"]
    raise typer.Exit(subprocess.run([*command, *context.args]).returncode)


def _notebooks(folder: Path | None) -> Path:
    """The folder that was named, or the notebooks here, or those beside an installation from a clone."""
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder: give --folder one with notebooks")
        return folder
    places = [Path("notebooks"), Path(__file__).resolve().parents[2] / "notebooks"]
    for place in places:
        if any(place.glob("*.ipynb")):
            return place
    raise UsageError("no notebooks here: they are in a clone of the repository; give --folder another folder")
