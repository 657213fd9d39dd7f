"""Modules that overlap (a head and its layer, a part and its block): each number is written once, or none is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mechtransplant.errors import UsageError
from mechtransplant.modules import Region


@dataclass(frozen=True)
class Claim:
    """A region that a module of a graft wants to write, at a strength."""

    owner: str
    region: Region
    strength: float


def resolve(claims: Iterable[Claim], strict: bool = False) -> dict[Region, float]:
    """Region → strength, no number of a parameter twice, in the order of the claims.

    A region inside another of equal strength is dropped. Raises UsageError where two claims on one number differ in
    strength, or, if ``strict``, belong to two modules.
    """
    by_parameter: dict[str, list[Claim]] = {}
    for claim in claims:
        by_parameter.setdefault(claim.region.parameter, []).append(claim)
    found: dict[Region, float] = {}
    for parameter, wanted in by_parameter.items():
        whole = [c for c in wanted if c.region.axis is None]
        if whole:
            for other in wanted:
                if other is not whole[0]:
                    _check(whole[0], other, strict)
            found[Region(parameter)] = whole[0].strength
            continue
        merged: list[tuple[Claim, int, int]] = []
        for claim in sorted(wanted, key=lambda c: (c.region.start, -c.region.stop)):
            start, stop = claim.region.start, claim.region.stop
            if merged and start < merged[-1][2]:
                last, first, end = merged[-1]
                _check(last, claim, strict)
                merged[-1] = (last, first, max(end, stop))
            else:
                merged.append((claim, start, stop))
        for claim, start, stop in merged:
            found[Region(parameter, claim.region.axis, start, stop)] = claim.strength
    return found


def joined(regions: Mapping[Region, float]) -> dict[Region, float]:
    """The same numbers in fewer regions: neighbours of one strength are one (a layer's neurons, its heads).

    For operators that treat every number by itself; ``regions`` as :func:`resolve` gives them, in order of place.
    """
    found: dict[Region, float] = {}
    last: tuple[Region, float] | None = None
    for region, strength in regions.items():
        if last is not None:
            before, at = last
            next_to = (before.parameter, before.axis, before.stop) == (region.parameter, region.axis, region.start)
            if region.axis is not None and next_to and at == strength:
                del found[before]
                region = Region(before.parameter, before.axis, before.start, region.stop)
        found[region] = strength
        last = region, strength
    return found


def _check(one: Claim, other: Claim, strict: bool) -> None:
    if one.strength != other.strength:
        raise UsageError(
            f"{one.owner} and {other.owner} share weights ({other.region}) and have different strengths "
            f"{one.strength:g} and {other.strength:g}: keep one of them, or give both one strength"
        )
    if strict and one.owner != other.owner:
        raise UsageError(
            f"{one.owner} and {other.owner} overlap in {other.region}: keep one of them, or graft with strict=False, "
            "which writes shared weights once"
        )
