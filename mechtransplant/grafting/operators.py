"""How the numbers of source and target become the graft's: replacing, and the merge operators that it is compared with.

Every operator is a function of the same part of three models (target t, source s, and their common ancestor b, which is
the target where none is given) and of a strength λ. It sees only the modules of the graft, so operators compare at
equal parameter budget. A graft of narrower numbers is computed in float32 and rounded once.

mergekit is the reference for whole tensors: ``benchmarks/operators.py`` compares the two number by number. The order of
operations here is what makes most of them equal to the bit. A new tensor is written in place, which saves memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, get_type_hints, runtime_checkable

from mechtransplant.errors import UnknownNameError, UsageError, check_seed

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Operator(Protocol):
    """What a graft needs of an operator; ``key`` names the part, for operators that draw random numbers."""

    name: ClassVar[str]
    equation: ClassVar[str]

    def __call__(self, target: Tensor, source: Tensor, base: Tensor | None, strength: float, key: str) -> Tensor:
        """The new numbers, of the same shape; ``base`` is None where the target is the ancestor."""
        ...


OPERATORS: dict[str, Callable[..., Operator]] = {}


def register(operator: Any) -> Any:
    """Make a class of operators known by its name (a decorator)."""
    OPERATORS[operator.name] = operator
    return operator


def list_operators() -> dict[str, str]:
    """Every operator with its equation."""
    return {name: getattr(operator, "equation", "") for name, operator in OPERATORS.items()}


def get_operator(operator: str | Mapping[str, Any] | Operator) -> Operator:
    """An operator by its name, by a mapping (``{"name": "ties", "density": 0.1}``), or the one given.

    Raises UnknownNameError, also for an option that the operator does not have.
    """
    if isinstance(operator, Mapping):
        options = dict(operator)
        made = get_operator(str(options.pop("name", "")))
        known = options_of(made)
        for option in options:
            if option not in known:
                raise UnknownNameError(f"option of operator {made.name!r}", option, known)
        return OPERATORS[made.name](**options)
    if isinstance(operator, str):
        if operator not in OPERATORS:
            raise UnknownNameError("operator", operator, OPERATORS)
        return OPERATORS[operator]()
    if isinstance(operator, type) and isinstance(operator, Operator):
        raise UsageError(f"{operator.__name__} is a class of operators: give an operator, {operator.__name__}()")
    if not isinstance(operator, Operator):
        raise UsageError(f"{operator!r} is no operator: give a name ({', '.join(OPERATORS)}) or an operator object")
    return operator


def seed_of_part(seed: int, key: str) -> int:
    """The seed of one part's random numbers, whatever order parts are written in."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{key}".encode()).digest()[:7], "big")


def options_of(operator: Operator) -> dict[str, Any]:
    """An operator's options, for a manifest; empty for an operator of your own that is no dataclass."""
    return {f.name: getattr(operator, f.name) for f in fields(operator)} if is_dataclass(operator) else {}


@register
@dataclass(frozen=True)
class Replace:
    """The default: a straight line from the target through the source; at λ = 1 the source's bytes as they are."""

    name: ClassVar[str] = "replace"
    #: every number by itself: neighbouring parts may be written as one
    elementwise: ClassVar[bool] = True
    equation: ClassVar[str] = "t + λ (s − t)"

    def __call__(self, target: Tensor, source: Tensor, base: Tensor | None, strength: float, key: str) -> Tensor:
        # written so that equal models stay equal to the bit
        return source if strength == 1 else (source - target).mul_(strength).add_(target)


@register
@dataclass(frozen=True)
class Linear:
    """Linear interpolation as mergekit's ``linear`` computes it: the same line as "replace", rounded otherwise."""

    name: ClassVar[str] = "linear"
    elementwise: ClassVar[bool] = True
    equation: ClassVar[str] = "(1 − λ) t + λ s"

    def __call__(self, target: Tensor, source: Tensor, base: Tensor | None, strength: float, key: str) -> Tensor:
        import torch

        weights = torch.tensor([1 - strength, strength], dtype=target.dtype, device=target.device)
        # one fused multiply-add, as the reference has it; far from 0 … 1 the rounded weights can miss a sum of 1
        merged = (weights[0] * target).addcmul_(source, weights[1])
        total = weights.sum()
        return merged if total == 1 else merged.div_(total)


@register
@dataclass(frozen=True)
class TaskArithmetic:
    """What the source learned since the ancestor is added to the target (Ilharco et al. 2023, arXiv 2212.04089)."""

    name: ClassVar[str] = "task_arithmetic"
    elementwise: ClassVar[bool] = True
    equation: ClassVar[str] = "t + λ (s − b)"

    def __call__(self, target: Tensor, source: Tensor, base: Tensor | None, strength: float, key: str) -> Tensor:
        return (source - (target if base is None else base)).mul_(strength).add_(target)


@register
@dataclass(frozen=True)
class Ties:
    """Trim the smallest changes, elect a sign for every number, merge those that agree (Yadav et al. 2023,
    arXiv 2306.01708).

    With an ancestor the changes of both models are merged, the target's at weight 1; without one only the source's
    remains. ``density`` is the share of numbers kept, rounded down but at least one; those that tie with the smallest
    kept are all kept. ``normalize`` divides by the weights that agreed: by default (None) where two changes meet.
    """

    density: float = 0.2
    normalize: bool | None = None
    name: ClassVar[str] = "ties"
    #: leaves some numbers as they are (see ``Graft.changed_count``)
    drops: ClassVar[bool] = True
    equation: ClassVar[str] = "b + elect(trim(t − b), λ trim(s − b))"

    def __post_init__(self) -> None:
        _check_density(self.density)
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise UsageError(f"normalize must be True, False or None (where two changes meet), got {self.normalize!r}")

    def __call__(self, target: Tensor, source: Tensor, base: Tensor | None, strength: float, key: str) -> Tensor:
        import torch

        start = target if base is None else base
        models = [(source, strength)] if base is None else [(target, 1.0), (source, strength)]
        changes = [self._trimmed(model - start).mul_(weight) for model, weight in models]
        positive = (changes[0] if base is None else changes[0] + changes[1]) >= 0
        agree = [torch.where(positive, change > 0, change < 0) for change in changes]
        merged = reduce(torch.Tensor.add_, (change.mul_(a) for change, a in zip(changes, agree, strict=True)))
        if base is not None if self.normalize is None else self.normalize:
            weights = (weight * a.to(merged) for a, (_, weight) in zip(agree, models, strict=True))
            total = reduce(torch.Tensor.add_, weights)
            merged.div_(torch.where(total != 0, total, 1.0))
        return merged.add_(start)

    def _trimmed(self, change: Tensor) -> Tensor:
        """The change, in place, with 0 for all but the largest numbers."""
        keep = max(1, int(self.density * change.numel()))
        if keep < change.numel():
            # numpy's selection keeps no table of indices, which would be twice the numbers
            sizes = change.abs().flatten().cpu().numpy()
            sizes.partition(sizes.size - keep)
            smallest = float(sizes[-keep])
            del sizes
            change.mul_(change.abs() >= smallest)
        return change


@register
@dataclass(frozen=True)
class Dare:
    """Drop changes at random and rescale the rest (Yu et al. 2024, arXiv 2311.03099).

    ``density`` is the probability of keeping a number. ``rescale`` divides by it ("density", the paper's), or restores
    the sum of absolute changes ("l1", mergekit's). The draw depends on ``seed`` and the part's name, not on the order
    or the device.
    """

    density: float = 0.5
    seed: int = 0
    rescale: Literal["l1", "density"] = "l1"
    name: ClassVar[str] = "dare"
    drops: ClassVar[bool] = True
    equation: ClassVar[str] = "t + λ rescale(drop(s − b))"

    def __post_init__(self) -> None:
        _check_density(self.density)
        check_seed(self.seed)
        if self.rescale not in get_args(get_type_hints(type(self))["rescale"]):
            raise UsageError(f"unknown rescale {self.rescale!r}: expected l1 or density")

    def __call__(self, target: Tensor, source: Tensor, base: Tensor | None, strength: float, key: str) -> Tensor:
        change = source - (target if base is None else base)
        return self.dropped(change, self.seed_of(key)).mul_(strength).add_(target)

    def seed_of(self, key: str) -> int:
        """The seed of one part's draw."""
        return seed_of_part(self.seed, key)

    def dropped(self, change: Tensor, seed: int) -> Tensor:
        """The change, in place, with some numbers 0 and the others rescaled."""
        import torch

        if self.density == 1:
            return change
        # drawn on the CPU: another device's generator has other numbers
        generator = torch.Generator().manual_seed(seed)
        chances = torch.full(change.shape, self.density, dtype=change.dtype)
        mask = torch.bernoulli(chances, generator=generator).to(change.device)
        if self.rescale == "density":
            return change.mul_(mask).div_(self.density)
        before = change.abs().sum()
        after = change.mul_(mask).abs().sum()
        return change.mul_(before / after) if before > 1e-7 and after > 1e-7 else change


@register
@dataclass(frozen=True)
class Slerp:
    """Along the arc between the two, each part as one vector; along the line where they point (nearly) one way."""

    name: ClassVar[str] = "slerp"
    equation: ClassVar[str] = "(sin((1 − λ)θ) t + sin(λθ) s) / sin θ, cos θ = ⟨t, s⟩ / (‖t‖ ‖s‖)"

    #: above this |cos θ| the arc is taken for a line
    threshold: float = 0.9995

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not 0 <= self.threshold < 1:
            raise UsageError(
                f"threshold is the |cos θ| above which the arc is a line, from 0 to below 1, got {self.threshold!r}"
            )

    def __call__(self, target: Tensor, source: Tensor, base: Tensor | None, strength: float, key: str) -> Tensor:
        import torch

        cosine = _cosine(target, source)
        theirs = torch.tensor(strength, dtype=target.dtype, device=target.device)
        ours = 1 - theirs
        # compared as Python numbers: a threshold near 1 would round up to 1 in float32
        if abs(float(cosine)) <= self.threshold:
            angle = torch.acos(cosine)
            ours, theirs = (torch.sin(part * angle) / torch.sin(angle) for part in (ours, theirs))
        return (ours * target).add_(theirs * source)


#: sums over a part go in pieces of so many numbers, as mergekit's do, for results that are equal to the bit
PIECE = 1 << 20


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """cos of the angle between two parts, each as one vector; 0 where one of them is (nearly) zero."""
    import torch

    parts = [tensor.reshape(-1).split(PIECE) for tensor in (one, other)]
    norms = []
    for pieces in parts:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(piece) for piece in pieces]))
        norms.append(torch.where(norm > 1e-8, norm, 1))
    # divided before they are multiplied: the product of two long vectors could overflow
    products = [(a / norms[0] * (b / norms[1])).sum() for a, b in zip(*parts, strict=True)]
    return torch.stack(products).sum().clamp(-1, 1)


def _check_density(density: object) -> None:
    if not _is_number(density) or not 0 < density <= 1:  # type: ignore[operator]
        raise UsageError(f"density is the share of numbers that is kept, above 0 and at most 1, got {density!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
