"""Commands that say which names there are."""

from __future__ import annotations

import typer

from mechtransplant.cli.app import app


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
