"""What chance would give: random sets of modules, and random orders of all modules, matched to the chosen ones.

A matched set has exactly as many modules of every size class (attention or feed-forward, number of parameters) as the
chosen set, and therefore the same kind counts and parameter count. Depth is matched by thirds of the layers; where that
leaves too few different sets (a model of four layers), by halves, else not at all. The level that was used is part of
the result. A matched order has such a set at every K.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, prod
from typing import TYPE_CHECKING

import numpy as np

from mechtransplant.errors import UsageError, check_count, check_seed
from mechtransplant.ranking.matched import Class, classes, kinds_among, matched_order

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


@dataclass(frozen=True)
class RandomOrders:
    """Random orders of all candidates, each with a matched set among its first K for every K; ``depth`` as above."""

    orders: list[tuple[str, ...]]
    depth: str


def random_matched(pair: Pair, modules: Sequence[str], n: int, seed: int = 0) -> RandomSets:
    """``n`` different random sets of modules, each matched to ``modules``; fewer when fewer exist.

    The chosen set itself is never among them. A set of all candidates has no control: the list is then empty.
    """
    check_count("n", n, least=0)
    check_seed(seed)
    chosen = list(dict.fromkeys(map(str, modules)))
    if not chosen:
        raise UsageError("no modules were named: give the set that random sets are matched to")
    candidates = pair.modules(kinds_among(pair, chosen))
    parts, group = _strictest(pair, candidates, chosen)
    pools = _members(group)
    wanted = Counter(group[m] for m in chosen)
    possible = _possible(group, chosen)
    rng = np.random.default_rng(seed)
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for _ in range(50 * n):
        if len(found) >= min(n, possible - 1):
            break
        drawn = [str(m) for g, c in sorted(wanted.items(), key=str) for m in rng.choice(pools[g], c, replace=False)]
        if frozenset(drawn) != frozenset(chosen):
            found.setdefault(frozenset(drawn), tuple(drawn))
    return RandomSets(list(found.values()), DEPTH_LEVELS[parts])


def random_orders(pair: Pair, order: Sequence[str], n: int, k: int, seed: int = 0) -> RandomOrders:
    """``n`` random orders matched to a ranking of all candidates; depth as strictly as random sets of ``k`` would be.

    Drawn independently: at a small K two of them may begin alike, and one may begin as the ranking does, which a
    permutation p-value allows for.
    """
    check_count("n", n, least=0)
    check_seed(seed)
    names = list(map(str, order))
    candidates = pair.modules(kinds_among(pair, names))
    if sorted(names) != sorted(candidates):
        raise UsageError(f"an order of all {len(candidates)} candidates was expected, got {len(names)} modules")
    check_count("k", k, most=len(names))
    parts, group = _strictest(pair, candidates, names[:k])
    rng = np.random.default_rng(seed)
    return RandomOrders([tuple(matched_order(group, names, rng)) for _ in range(n)], DEPTH_LEVELS[parts])


def _strictest(pair: Pair, candidates: Sequence[str], chosen: Sequence[str]) -> tuple[int, dict[str, Class]]:
    """The strictest depth level that leaves enough different sets, and every candidate's class at it."""
    for parts in DEPTH_LEVELS:
        group = classes(pair, candidates, parts)
        if parts == 1 or _possible(group, chosen) >= ENOUGH_SETS:
            break
    return parts, group


def _members(group: dict[str, Class]) -> dict[Class, list[str]]:
    pools: dict[Class, list[str]] = {}
    for module, its in group.items():
        pools.setdefault(its, []).append(module)
    return pools


def _possible(group: dict[str, Class], chosen: Sequence[str]) -> int:
    """How many sets have the make-up of the chosen one, itself included."""
    pools = _members(group)
    return prod(comb(len(pools[g]), c) for g, c in Counter(group[m] for m in chosen).items())
