"""As many changes at random: what a graft that keeps a part of every module's change is compared with.

TIES keeps the largest changes of every module. Its random weights keep as many of the same modules' changes at random
(DARE). How far those are moved is chosen on ``choose``, from the config's strengths times three scales: each number as
far as in the source, all as long together (L2) as the whole change, or as large on average. Of a graft of all modules,
which no random set of modules can be compared with, they say whether it matters which numbers are kept. With low_rank,
which keeps the largest directions of every module's change, they are as many directions, drawn from the four times as
many largest, and moved as far as in the source, or two or four times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechtransplant.errors import UsageError
from mechtransplant.grafting import Graft, get_operator
from mechtransplant.grafting.low_rank import POOL, LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mechtransplant.experiment.config import RunConfig
    from mechtransplant.grafting import Operator
    from mechtransplant.grafting.graft import KV
    from mechtransplant.pair import Pair

#: powers of the share of changes that is kept, by which a draw's strength is scaled (see above)
SCALES = (1.0, 0.5, 0.0)


@dataclass(frozen=True)
class RandomNumbers:
    """As many numbers as TIES changes: the share ``density`` of those that differ, drawn by DARE."""

    density: float
    #: in words: what is counted, what its grafts do, what is drawn, and how
    what: ClassVar[str] = "numbers"
    does: ClassVar[str] = "change as many numbers"
    drawn: ClassVar[str] = "numbers of the same modules"
    by: ClassVar[str] = "DARE "

    @classmethod
    def of(cls, rule: str, graft: Graft, pair: Pair) -> RandomNumbers:
        """Those beside a graft of a rule's modules; raises UsageError where the graft keeps every change."""
        everything = Graft(graft.modules, kv=graft.kv, operator={"name": "ties", "density": 1.0})
        changed, differing = graft.changed_count(pair), everything.changed_count(pair)
        if changed == differing:
            raise UsageError(
                f"random_weights: the operator keeps all {changed:,} changes of {rule}'s modules, because many are "
                "equally large or 0, so none can be drawn: give a lower density, or leave random_weights out"
            )
        return cls(float(f"{changed / differing:.4g}"))

    @property
    def scales(self) -> list[float]:
        """What the config's strengths are multiplied with; DARE makes up for dropped numbers by itself."""
        return [self.density**power for power in SCALES]

    def operator(self, seed: int) -> dict[str, Any]:
        """One draw."""
        return {"name": "dare", "density": self.density, "rescale": "density", "seed": seed}

    @staticmethod
    def note(graft: Graft, pair: Pair) -> str:
        """What a reader has to know of the draws."""
        return ""


@dataclass(frozen=True)
class RandomDirections:
    """As many directions as low_rank keeps."""

    rank: int
    what: ClassVar[str] = "directions"
    does: ClassVar[str] = "keep as many directions of their changes"
    drawn: ClassVar[str] = "directions of the same modules' changes"
    by: ClassVar[str] = ""

    @classmethod
    def of(cls, rule: str, graft: Graft, pair: Pair) -> RandomDirections:
        """Those beside a graft of a rule's modules; raises UsageError where no module has more directions."""
        assert isinstance(graft.operator, LowRank)
        rank = graft.operator.rank
        if not any(pool > rank for pool in _pools(graft, pair)):
            raise UsageError(
                f"random_weights: no module of {rule} has more than {rank} directions, so none can be drawn: give a "
                "lower rank, or leave random_weights out"
            )
        return cls(rank)

    @property
    def scales(self) -> list[float]:
        """As far as in the source, and so much further as four times as many directions reach, or half of that."""
        return [(1 / POOL) ** power * POOL for power in SCALES]

    def operator(self, seed: int) -> dict[str, Any]:
        """One draw."""
        return {"name": "low_rank", "rank": self.rank, "draw": seed}

    @staticmethod
    def note(graft: Graft, pair: Pair) -> str:
        """What a reader has to know of the draws."""
        assert isinstance(graft.operator, LowRank)
        pool = max(_pools(graft, pair))
        return (
            f" Directions are drawn from a part's {pool} largest; a draw has {graft.operator.rank / pool:.0%} of the "
            "graft's own among them on average, and less of the change's length."
        )


#: by the graft's operator
_KINDS: dict[str, type[RandomNumbers | RandomDirections]] = {"ties": RandomNumbers, "low_rank": RandomDirections}


def random_weights(
    rule: str, modules: Sequence[str], kv: KV, operator: str | Mapping[str, Any] | Operator, pair: Pair
) -> RandomNumbers | RandomDirections:
    """What a graft of a rule's modules by an operator is compared with."""
    graft = Graft(modules, kv=kv, operator=operator)
    return _KINDS[graft.operator.name].of(rule, graft, pair)


def drawn_beside(operator: str | Mapping[str, Any] | Operator) -> type[RandomNumbers | RandomDirections]:
    """The kind of random weights beside grafts by an operator, for its words."""
    return _KINDS[get_operator(operator).name]


def _pools(graft: Graft, pair: Pair) -> list[int]:
    """For every part of a low-rank graft that does not move whole, how many directions are drawn from."""
    assert isinstance(graft.operator, LowRank)
    start, found = pair.target_parameters if pair.base is None else pair.base_parameters, []
    for region in graft.regions(pair):
        source = region.of(pair.source_parameters[region.parameter])
        change = source.float() - region.of(start[region.parameter]).to(source.device).float()
        found += [pool] if (pool := graft.operator.pool_of(change)) else []
    return found


def check_random_weights(config: RunConfig) -> None:
    """Refuse random weights where the operator does not choose some, and controls of no rule."""
    if not config.random_weights:
        return
    given = {"name": config.operator} if isinstance(config.operator, str) else config.operator
    name = given.get("name")
    if given.get("density") == 1 or given.get("normalize"):
        raise UsageError(
            "random_weights: TIES at density 1 keeps every change, and with normalize it ignores the strength: give a "
            "density below 1 and leave normalize out, or leave random_weights out"
        )
    if name not in _KINDS:
        raise UsageError(
            f"random_weights: the operator {name} does not keep the largest changes of a module, or directions, which "
            "is what random ones are compared with: give operator: {name: ties, density: …} or {name: low_rank, rank: "
            "…}, or leave random_weights out"
        )
    if given.get("draw") is not None:
        raise UsageError("random_weights: with draw the operator keeps random directions itself: leave one of them out")
    if not config.with_controls:
        raise UsageError("random_weights: no rule has controls: name one in controlled, or leave it out")


def check_ancestor(config: RunConfig, pair: Pair) -> None:
    """Refuse random weights beside a TIES graft that undoes changes of the target as well."""
    if config.random_weights and pair.base is not None and get_operator(config.operator).name == "ties":
        raise UsageError(
            "random_weights: with an ancestor TIES undoes the target's small changes as well, so as many numbers "
            "at random are no match: leave base or random_weights out"
        )
