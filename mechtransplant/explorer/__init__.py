"""A finished run to look around in, in a notebook: ``cells`` (what the run measured), ``widget`` (what is clicked)."""

from mechtransplant.explorer.cells import MeasuredRun
from mechtransplant.explorer.widget import Explorer, explore

__all__ = ["Explorer", "MeasuredRun", "explore"]
