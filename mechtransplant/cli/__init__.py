"""The command line: ``mechtransplant demo | run | shifts | effects | heads-vs-mlps | export | verify | pairs | …``."""

# in the order in which the help lists them
from mechtransplant.cli import analyses, models, names  # isort: skip
from mechtransplant.cli.app import app, main  # isort: skip

__all__ = ["analyses", "app", "main", "models", "names"]
