"""``python -m mechtransplant.cli``."""

from mechtransplant.cli import main

main()
