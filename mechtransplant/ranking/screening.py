"""A cheap approximation for all modules, and the exact value for those that it puts first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mechtransplant.ranking.steps import Floats


def confirmed(modules: Sequence[str], scores: Floats, confirm: int, exact: Callable[[list[str]], Floats]) -> Floats:
    """The scores with exact values for the highest, until the ``confirm`` highest are all exact.

    A module whose exact value is below an approximate one lets the next be tried, so that nothing stands among the
    ``confirm`` highest by an approximation alone.
    """
    scores, done = scores.copy(), set[int]()
    while True:
        highest = np.argsort(-scores, kind="stable")[:confirm]
        new = [int(i) for i in highest if int(i) not in done]
        if not new:
            return scores
        scores[new] = exact([modules[i] for i in new])
        done.update(new)
