"""What notebooks share: two sizes, of which the tests run the smaller."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def sized(full: T, smoke: T) -> T:
    """``full``, or ``smoke`` where the environment variable MECHTRANSPLANT_SMOKE is set: to see that all runs."""
    return smoke if os.environ.get("MECHTRANSPLANT_SMOKE") else full
