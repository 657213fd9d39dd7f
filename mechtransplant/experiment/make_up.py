"""Where a graft's projections are others than its random sets' are: matched in size, they need not be so in kind.

With grouped heads K and V are of one size, so sets that are matched in kind, depth and parameters may exchange one for
the other, and a rule that prefers V would beat them by that alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mechtransplant.ranking.matched import Match, projection_of

if TYPE_CHECKING:
    from mechtransplant.pair import Pair


def others_make_up(pair: Pair, modules: Sequence[str], sets: Sequence[Sequence[str]], match: Match) -> str:
    """A sentence on the projections of which a graft has more, or fewer, than any of its random sets; else nothing."""
    if match == "projection" or not sets:
        return ""
    own = Counter(projection_of(pair, m) for m in modules)
    drawn = [Counter(projection_of(pair, m) for m in one) for one in sets]
    names = sorted({name for name in own if name} | {name for one in drawn for name in one if name})
    said = []
    for name in names:
        low, high = (end(one[name] for one in drawn) for end in (min, max))
        if not low <= own[name] <= high:
            said.append(f"{own[name]} {name} (they {low} to {high})")
    if not said:
        return ""
    return (
        f" Random sets are matched in size, not in projection, and it has {', '.join(said)}: with `random_match: "
        "projection` they have as many."
    )
