"""Modules that a random set may exchange for each other, and rules made of another rule's ranking.

Two modules are of one class if both are attention or both feed-forward, have equally many parameters, and lie in the
same part of the depth (thirds, halves, or anywhere). By projection, two linear layers are so only where they are the
same projection as well: with grouped heads K and V have one size, and what a graft of them does has not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mechtransplant.errors import UsageError
from mechtransplant.grafting import KV, Graft
from mechtransplant.modules import Kind, parse_address
from mechtransplant.ranking.registry import Kinds, Scores, get_rule, register_rule, scores_of
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    from mechtransplant.pair import Pair

Class = tuple[Any, ...]
#: what linear layers that may be exchanged have in common: their size, or their projection (q, k, v, o, gate, …) too
Match = Literal["size", "projection"]


def kinds_among(pair: Pair, modules: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds of some modules, in their order; parts of fused layers are candidates beside whole ones."""
    kinds = dict.fromkeys(pair.layout.check(m).kind for m in modules)
    if any(m in pair.layout.parts for m in modules):
        kinds = dict.fromkeys("part" if k == "linear" else k for k in kinds)  # type: ignore[assignment]
    return tuple(kinds)


def projection_of(pair: Pair, module: str) -> str | None:
    """Which projection of its block a linear layer or its part is (of an expert: of experts); None of other kinds."""
    address = pair.layout.check(module)
    if address.kind not in ("linear", "part"):
        return None
    return re.sub(r"\.\d+(?=\.)", "", str(address.name))


def classes(pair: Pair, modules: Sequence[str], parts: int = 3, match: Match = "size") -> dict[str, Class]:
    """Module → its class; ``parts`` of the depth: 3, 2, or 1 for anywhere.

    Raises:
        UsageError: another ``match`` than "size" or "projection".
    """
    if match not in get_args(Match):
        raise UsageError(f"match: expected size or projection, got {match!r}")
    found: dict[str, Class] = {}
    for module in modules:
        address = pair.layout.check(module)
        regions = pair.layout.regions(module, pair.target_parameters)
        count = sum(r.of(pair.target_parameters[r.parameter]).numel() for r in regions)
        # heads, MLPs and blocks tell by their kind, layers and parts of layers by what they belong to
        kind = (
            ("linear", pair.layout.is_feed_forward(module)) if address.kind in ("linear", "part") else (address.kind,)
        )
        same = (projection_of(pair, module),) if match == "projection" else ()
        found[module] = (*kind, *same, count, parse_address(module).layer * parts // pair.layout.layers)
    return found


def matched_order(classes: dict[str, Class], order: Sequence[str], rng: np.random.Generator) -> list[str]:
    """A random order whose every first K has the make-up of the first K of ``order``: each place keeps its class."""
    pools: dict[Class, list[str]] = {}
    for module, its in classes.items():
        pools.setdefault(its, []).append(module)
    shuffled = {its: iter([members[i] for i in rng.permutation(len(members))]) for its, members in pools.items()}
    return [next(shuffled[classes[m]]) for m in order]


def shares_kv(pair: Pair, modules: Sequence[str], kv: KV) -> bool:
    """Whether a graft of some modules moves K and V that several heads share: its size then depends on their groups."""
    return kv != "never" and pair.layout.group_size > 1 and any(parse_address(m).kind == "head" for m in modules)


def exchanged(pair: Pair, classes: dict[str, Class], rng: np.random.Generator) -> dict[str, str]:
    """Module → the one of its class that takes its place, at random; heads go with their K/V group, in any order.

    What takes the place of some heads has as many of them in as many groups, so that as many K and V move with them.
    """
    units: dict[Class, dict[tuple[int, int], list[str]]] = {}
    for number, (module, its) in enumerate(classes.items()):
        address = parse_address(module)
        unit = (number, -1) if address.head is None else (address.layer, pair.layout.group(address.head))
        units.setdefault(its, {}).setdefault(unit, []).append(module)
    found: dict[str, str] = {}
    for groups in units.values():
        members = list(groups.values())
        for mine, other in zip(members, rng.permutation(len(members)), strict=True):
            found |= {module: members[other][at] for module, at in zip(mine, rng.permutation(len(mine)), strict=True)}
    return found


def _order_of(pair: Pair, task: Task | None, kind: Kinds, of: str, seed: int, options: dict[str, Any]) -> list[str]:
    """All modules by another rule, best first."""
    rule = get_rule(of)
    modules = pair.modules(kind)
    scores = np.asarray(scores_of(rule.score(pair, task, kind, seed=seed, **options)), dtype=float)
    return [modules[i] for i in np.argsort(-scores, kind="stable")]


@register_rule(
    "random_matched",
    "a random order in which every place has a module of the same class as in the ranking `of`",
    cost="that of the rule it matches",
    sign="nothing",
)
def random_matched(
    pair: Pair,
    task: Task | None,
    kind: Kinds,
    *,
    of: str = "lae",
    parts: int = 3,
    kv: KV = "never",
    seed: int = 0,
    **options: Any,
) -> Scores:
    """Chance, matched to a rule at every K in kind, parameters and depth (`parts`: thirds, halves, or 1)."""
    if get_rule(of).takes("kv"):
        options["kv"] = kv
    order = _order_of(pair, task, kind, of, seed, options)
    group, rng = classes(pair, pair.modules(kind), parts), np.random.default_rng(seed)
    if shares_kv(pair, order, kv):
        other = exchanged(pair, group, rng)
        drawn = [other[m] for m in order]
    else:
        drawn = matched_order(group, order, rng)
    place = {m: at for at, m in enumerate(drawn)}
    return [len(drawn) - place[m] for m in pair.modules(kind)]


@register_rule(
    "bottom",
    "s(m) = the place of m in the ranking `of`, so that its last comes first",
    cost="that of the rule it turns around",
    sign="the rule `of` ranks it low",
)
def bottom(pair: Pair, task: Task | None, kind: Kinds, *, of: str = "lae", seed: int = 0, **options: Any) -> Scores:
    """Another rule upside down: what it holds for least important."""
    order = _order_of(pair, task, kind, of, seed, options)
    place = {m: at for at, m in enumerate(order)}
    return [place[m] for m in pair.modules(kind)]


@register_rule(
    "per_parameter",
    "s(m) = s_of(m) / |m|, with the score s_of of the rule `of`, and |m| the numbers that a graft of m writes",
    cost="that of the rule it divides",
    sign="the score is high for its size: what a budget of parameters buys first",
)
def per_parameter(
    pair: Pair,
    task: Task | None,
    kind: Kinds,
    *,
    of: str = "gradient",
    kv: KV = "never",
    seed: int = 0,
    **options: Any,
) -> Scores:
    """Another rule's score for every number that is moved (value for weight, as in the knapsack's greedy solution).

    Among scores below 0 the order means little: a large module that harms comes before a small one that harms as much.
    """
    rule = get_rule(of)
    if rule.takes("kv"):
        options["kv"] = kv
    scores = np.asarray(scores_of(rule.score(pair, task, kind, seed=seed, **options)), dtype=float)
    return scores / [Graft([m], kv=kv).parameter_count(pair) for m in pair.modules(kind)]
