"""The command itself, which its parts add to, and what it does with errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mechtransplant import __version__
from mechtransplant.errors import UsageError
from mechtransplant.progress import LOG, BetweenBars

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
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say each step with its time: for long work into a file.")
    ] = False,
) -> None:
    """Options that come before a command."""
    if verbose and not any(isinstance(handler, BetweenBars) for handler in LOG.handlers):
        LOG.addHandler(BetweenBars())
        LOG.setLevel("INFO")


def listed(text: str | None) -> list[str]:
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
