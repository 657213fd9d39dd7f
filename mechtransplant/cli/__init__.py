"""The command line: ``mechtransplant demo | run | shifts | effects | heads-vs-mlps | report | export | verify | …``."""

# in the order in which the help lists them
from mechtransplant.cli import analyses, pages, models, names  # isort: skip
from mechtransplant.cli.app import app, main  # isort: skip

__all__ = ["analyses", "app", "main", "models", "names", "pages"]
