"""Which sets of heads, of MLPs and of both the study compares, and the random sets that each is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from mechtransplant.controls import RandomSets, drawn_by_group, random_matched
from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import Kind, parse_address
from mechtransplant.ranking.matched import Class, classes, shares_kv

if TYPE_CHECKING:
    from mechtransplant.pair import Pair

Arm = Literal["head", "mlp", "mixed"]
Match = Literal["modules", "parameters"]
#: arm → the kinds that are ranked together for it
ARMS: dict[Arm, tuple[Kind, ...]] = {"head": ("head",), "mlp": ("mlp",), "mixed": ("head", "mlp")}
MATCHES: tuple[Match, ...] = ("modules", "parameters")
#: where the candidates lie: anywhere, or in one third of the layers
DEPTHS = ("all", "early", "middle", "late")
#: an arm whose parameters are further than this from the budget is not "at equal parameters", and is left out
NEAR = 0.25
#: what the sets of each arm are made of, in words
NAMES: dict[str, str] = {"head": "heads", "mlp": "MLPs", "mixed": "heads and MLPs"}


@dataclass(frozen=True)
class ModuleSet:
    """One arm's set; ``count`` is the number of MLPs that it equals in number or, within ``near``, in parameters."""

    depth: str
    arm: Arm
    match: Match
    count: int
    modules: tuple[str, ...]
    parameters: int
    #: its parameters over those of ``count`` MLPs (None where the number of modules is matched)
    near: float | None = None


def mlps(count: int) -> str:
    """A number of MLPs in words."""
    return f"{count} MLP" + "s" * (count != 1)


def candidates_in(pair: Pair, modules: Sequence[str], depth: str) -> list[str]:
    """The modules in a part of the depth, in their order."""
    layers = pair.layout.layers
    return [m for m in modules if depth == "all" or DEPTHS[1 + parse_address(m).layer * 3 // layers] == depth]


def sets_of(
    pair: Pair, rankings: Mapping[Arm, Sequence[str]], counts: Sequence[int], kv: KV = "never"
) -> tuple[list[ModuleSet], list[str]]:
    """Every arm's set at every depth and count, and, in words, those that are left out.

    Args:
        rankings: each arm's candidates, best first; "mixed" has heads and MLPs.
    """
    known: dict[tuple[str, ...], int] = {}

    def parameters(modules: Sequence[str]) -> int:
        names = tuple(sorted(modules))
        # without K and V a head's numbers are its own, and sums are enough
        if kv == "never" and len(names) > 1:
            return sum(parameters([m]) for m in names)
        if names not in known:
            known[names] = Graft(names, kv=kv).parameter_count(pair)
        return known[names]

    found: list[ModuleSet] = []
    left_out: list[str] = []
    for depth in DEPTHS:
        of = {arm: candidates_in(pair, order, depth) for arm, order in rankings.items()}
        where = "all depths" if depth == "all" else f"{depth} third"
        for count in counts:
            for arm in ARMS:
                if count > len(of[arm]):
                    left_out.append(f"{where}, {count} {NAMES[arm]}: there are only {len(of[arm])}")
                    continue
                top = tuple(of[arm][:count])
                found.append(ModuleSet(depth, arm, "modules", count, top, parameters(top)))
            if count > len(of["mlp"]):
                left_out.append(f"{where}, the parameters of {mlps(count)}: there are only {len(of['mlp'])} MLPs")
                continue
            budget = parameters(of["mlp"][:count])
            for arm in ARMS:
                if arm == "mlp":
                    top = tuple(of[arm][:count])
                elif arm == "head":
                    top = _nearest(of[arm], budget, parameters)
                else:
                    top = _filled(of[arm], budget, parameters)
                near = parameters(top) / budget if top else 0.0
                if abs(near - 1) > NEAR:
                    left_out.append(
                        f"{where}, the parameters of {mlps(count)}: {_all(top, of[arm])}{len(top)} {NAMES[arm]} "
                        f"have {near:.0%} of them"
                    )
                    continue
                found.append(ModuleSet(depth, arm, "parameters", count, top, parameters(top), near))
    return found, left_out


def _all(chosen: Sequence[str], candidates: Sequence[str]) -> str:
    return "all " if len(chosen) == len(candidates) else ""


def _nearest(order: Sequence[str], budget: int, parameters: Callable[[Sequence[str]], int]) -> tuple[str, ...]:
    """As many of the first as come nearest to the budget; fewer among equals."""
    if not order:
        return ()
    size = min(range(1, len(order) + 1), key=lambda k: (abs(parameters(order[:k]) - budget), k))
    return tuple(order[:size])


def _filled(order: Sequence[str], budget: int, parameters: Callable[[Sequence[str]], int]) -> tuple[str, ...]:
    """Down the ranking until the budget is used, never above it: what no longer fits is passed over."""
    chosen: list[str] = []
    for module in order:
        if parameters([*chosen, module]) <= budget:
            chosen.append(module)
    return tuple(chosen)


def random_sets(pair: Pair, chosen: ModuleSet, n: int, seed: int = 0, kv: KV = "never") -> RandomSets:
    """``n`` different random sets of a set's make-up (kinds, parameters, depth); fewer, or none, where fewer exist.

    At all depths they are those of ``controls.random_matched``; in a third they are drawn from that third.
    """
    if chosen.depth == "all":
        return random_matched(pair, chosen.modules, n, seed, kv)
    inside = candidates_in(pair, [*pair.modules("head"), *pair.modules("mlp")], chosen.depth)
    group = classes(pair, inside, 1)
    if shares_kv(pair, chosen.modules, kv):
        return RandomSets(drawn_by_group(pair, group, chosen.modules, n, seed), "the same third")
    pools: dict[Class, list[str]] = {}
    for module in inside:
        pools.setdefault(group[module], []).append(module)
    wanted = Counter(group[m] for m in chosen.modules)
    possible = prod(comb(len(pools[g]), c) for g, c in wanted.items()) - 1
    rng = np.random.default_rng(seed)
    own = frozenset(chosen.modules)
    found: dict[frozenset[str], tuple[str, ...]] = {}
    while len(found) < min(n, possible):
        drawn = [str(m) for g, c in sorted(wanted.items(), key=str) for m in rng.choice(pools[g], c, replace=False)]
        if frozenset(drawn) != own:
            found.setdefault(frozenset(drawn), tuple(drawn))
    return RandomSets(list(found.values()), "the same third")
