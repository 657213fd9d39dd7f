"""What chance would give: random sets of modules, matched to the chosen set.

A matched set has exactly as many modules of every size class (attention or feed-forward, number of parameters), and
therefore the same kind counts and parameter count. Depth is matched by thirds of the layers; where that leaves too few
different sets (a model of four layers), by halves, else not at all. The level that was used is part of the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb, prod
from typing import TYPE_CHECKING

import numpy as np

from mechtransplant.modules import parse_address

if TYPE_CHECKING:
    from mechtransplant.pair import Pair

#: how many different sets a depth level must allow for it to be a control
ENOUGH_SETS = 1000
#: parts of the depth within which a set keeps its counts, strictest first
DEPTH_LEVELS = {3: "thirds", 2: "halves", 1: "not matched"}


@dataclass(frozen=True)
class RandomSets:
    """Random control sets; ``depth`` says how depth was matched: "thirds", "halves" or "not matched"."""

    sets: list[tuple[str, ...]]
    depth: str


def random_matched(pair: Pair, modules: Sequence[str], n: int, seed: int = 0) -> RandomSets:
    """``n`` different random sets of modules, each matched to ``modules``; fewer when fewer exist.

    The chosen set itself is never among them. A set of all candidates has no control: the list is then empty.
    """
    kind = pair.layout.check(modules[0]).kind
    # the parts of fused layers are candidates beside layers that hold one projection
    kind = "part" if any(m in pair.layout.parts for m in modules) else kind
    candidates = pair.modules(kind)
    sizes = {}
    for module in candidates:
        regions = pair.layout.regions(module, pair.target_parameters)
        count = sum(r.of(pair.target_parameters[r.parameter]).numel() for r in regions)
        feed_forward = kind in ("linear", "part") and pair.layout.is_feed_forward(module)
        sizes[module] = (feed_forward, count)
    chosen = frozenset(modules)
    for parts in DEPTH_LEVELS:
        pools: dict[Hashable, list[str]] = {}
        group = {}
        for module in candidates:
            group[module] = (*sizes[module], parse_address(module).layer * parts // pair.layout.layers)
            pools.setdefault(group[module], []).append(module)
        wanted = Counter(group[m] for m in chosen)
        possible = prod(comb(len(pools[g]), c) for g, c in wanted.items())
        if possible >= ENOUGH_SETS or parts == 1:
            break
    rng = np.random.default_rng(seed)
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for _ in range(50 * n):
        if len(found) >= min(n, possible - 1):
            break
        drawn = [str(m) for g, c in sorted(wanted.items(), key=str) for m in rng.choice(pools[g], c, replace=False)]
        if frozenset(drawn) != chosen:
            found.setdefault(frozenset(drawn), tuple(drawn))
    return RandomSets(list(found.values()), DEPTH_LEVELS[parts])
