"""Weight grafts: which modules of the source go into the target, how strongly, and what that means.

At strength λ a part of the target becomes t + λ · (s − t) (other equations: ``operators``): 1 copies the source's
numbers as they are, 0 changes nothing, above 1 extrapolates, below 0 subtracts. Biases travel with their weights.
Norms, embeddings and the output head move only when they are named.

**Heads.** A head's own weights are its rows of the Q projection, with their bias, and its columns of the output
projection. K and V are read by every head of its group, so they follow ``kv``:

* ``"never"`` (the default): K and V stay the target's. No head outside the graft is touched, and a graft of head set A
  and then of B is the graft of A ∪ B.
* ``"group"``: K and V of every group with a head in the graft move; the group's other heads then read them too.
* ``"whole-group"``: K and V of the groups that are in the graft with all their heads move: no other head is touched.

The bias of the output projection, and norms of queries and keys (Qwen 3, Gemma 3, OLMo 2), stay the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from mechtransplant.display import html_table
from mechtransplant.errors import CompatibilityError, UnknownNameError, UsageError, check_count, finite_number
from mechtransplant.grafting.applied import Applied, differing, in_few_parts, squared_change, written
from mechtransplant.grafting.operators import Operator, Replace, get_operator, options_of
from mechtransplant.grafting.overlaps import Claim, resolve
from mechtransplant.modules import Address, Region, heads_in_words, parse_address
from mechtransplant.selection import (
    SelectedModule,
    Selection,
    put_on,
    selected_by,
    selections_of,
    selections_on,
    what_acts_on,
)
from mechtransplant.weights import awaken

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel, Pair

KV = Literal["never", "group", "whole-group"]
Strength = float | Sequence[float] | Mapping[str, float] | Callable[[Address], float]


@dataclass(frozen=True)
class Graft:
    """A set of modules with a strength.

    Args:
        modules: addresses, in any mix of kinds; an address given twice counts once.
        strength: one number for all, one a module, a mapping from module to number, or a function of the module's
            address (see :func:`depth_curve`).
        kv: what becomes of K and V under a graft of heads: "never", "group" or "whole-group" (see above).
        operator: the equation: a name of :func:`list_operators`, or an operator with its options.
        strict: refuse modules that overlap; otherwise weights that two modules share are written once.

    Raises:
        UsageError: strengths that do not fit the modules, or are not finite.
    """

    modules: tuple[str, ...]
    strengths: tuple[float, ...]
    kv: KV = "never"
    operator: Operator = field(default_factory=Replace)
    strict: bool = False
    #: what selected the modules, where a ranking did
    selections: tuple[Selection, ...] = field(default=(), repr=False, compare=False)

    def __init__(
        self,
        modules: Iterable[str],
        strength: Strength = 1.0,
        *,
        kv: KV = "never",
        operator: str | Mapping[str, Any] | Operator = "replace",
        strict: bool = False,
    ) -> None:
        if isinstance(modules, Mapping):
            # a mapping iterates over its keys: its numbers would be lost without a word
            raise UsageError("strengths are given beside the modules: Graft(list(m), m) for a mapping m of strengths")
        names = addresses_of(modules, ordered=isinstance(strength, Sequence) or hasattr(strength, "__array__"))
        if kv not in get_args(KV):
            raise UnknownNameError("K/V policy", kv, get_args(KV))
        values = _strengths(names, strength)
        unique: dict[str, float] = {}
        for name, value in zip(names, values, strict=True):
            if unique.setdefault(name, value) != value:
                raise UsageError(f"module {name} is given twice with strengths {unique[name]} and {value}: keep one")
        object.__setattr__(self, "modules", tuple(unique))
        object.__setattr__(self, "strengths", tuple(unique.values()))
        object.__setattr__(self, "kv", kv)
        object.__setattr__(self, "operator", get_operator(operator))
        object.__setattr__(self, "strict", strict)
        object.__setattr__(self, "selections", selections_of(unique))

    def __len__(self) -> int:
        return len(self.modules)

    def _repr_html_(self) -> str:
        by_layer: dict[int, list[str]] = {}
        alike = len(set(self.strengths)) == 1
        for module, strength in zip(self.modules, self.strengths, strict=True):
            by_layer.setdefault(parse_address(module).layer, []).append(
                str(module) if alike else f"{module} ({strength:g})"
            )
        rows = [
            ("outside of the layers" if layer < 0 else f"layer {layer}", shortened(names))
            for layer, names in sorted(by_layer.items())
        ]
        strengths = ", ".join(f"{s:g}" for s in sorted(set(self.strengths))) or "none"
        how = (
            f"Strength {strengths} ({self.mode}); operator {self.operator.name}; K and V of a grafted head: {self.kv}."
        )
        return html_table(rows, title=f"Graft of {len(self)} modules", notes=[how])

    @property
    def label(self) -> tuple[Any, ...]:
        """What tells this graft from another one."""
        return (*sorted(zip(map(str, self.modules), self.strengths, strict=True)), self.kv, repr(self.operator))

    @property
    def mode(self) -> str:
        """What the strengths do: "replacement" (1), "interpolation" (0 to 1), "extrapolation" (> 1), "subtraction"
        (< 0), "nothing" (0), or several of them."""
        names = dict.fromkeys(_mode(s) for s in self.strengths)
        return " and ".join(names) or "nothing"

    def claims(self, pair: Pair) -> Iterator[Claim]:
        """What every module wants to write, K and V by the policy; raises UsageError for an unknown address."""
        if not hasattr(pair, "target_parameters"):
            raise UsageError(f"a graft goes between two models: pass the pair, got {type(pair).__name__}")
        layout, parameters = pair.layout, pair.target_parameters
        groups: dict[tuple[int, int], dict[int, float]] = {}
        for module, strength in zip(self.modules, self.strengths, strict=True):
            address = layout.check(module)
            if address.head is not None:
                groups.setdefault((address.layer, layout.group(address.head)), {})[address.head] = strength
            for region in layout.regions(module, parameters):
                yield Claim(module, region, strength)
        for (layer, group), heads in groups.items():
            if self.kv == "never" or (self.kv == "whole-group" and len(heads) < layout.group_size):
                continue
            if len(set(heads.values())) > 1:
                named = ", ".join(f"L{layer}H{head} at {s:g}" for head, s in heads.items())
                raise UsageError(
                    f"{named} share K and V and have different strengths: give them one strength, or use kv='never'"
                )
            for region in layout.kv_regions(layer, group, parameters):
                yield Claim(f"K/V of L{layer} group {group}", region, next(iter(heads.values())))

    def regions(self, pair: Pair) -> dict[Region, float]:
        """What the graft writes: region → strength, no number of a parameter twice.

        Raises UsageError where two modules overlap with different strengths (or at all, if ``strict``), and for an
        address that the pair does not have.
        """
        return resolve(self.claims(pair), self.strict)

    def _written(self, pair: Pair) -> dict[Region, float]:
        """The regions that the graft writes: those at strength 0 stay as they are."""
        return {region: strength for region, strength in self.regions(pair).items() if strength != 0}

    def parameter_count(self, pair: Pair) -> int:
        """How many numbers the graft's modules have."""
        parameters = pair.target_parameters
        return sum(region.of(parameters[region.parameter]).numel() for region in self.regions(pair))

    def changed_count(self, pair: Pair) -> int:
        """How many of them it changes: all but those at strength 0, and fewer by operators that drop changes (TIES,
        DARE), where they are counted.

        Call it while no graft is in place.
        """
        if not getattr(self.operator, "drops", False):
            parameters = pair.target_parameters
            return sum(region.of(parameters[region.parameter]).numel() for region in self._written(pair))
        return sum(differing(pair, self.operator, *part) for part in self._written(pair).items())

    def carried_count(self, pair: Pair) -> int:
        """How many of the source's numbers it carries: what a limit to a graft's size counts.

        Those that it changes, but for the operator low_rank, whose directions take fewer numbers to write down than
        the matrices that they change. Call it while no graft is in place.
        """
        if not hasattr(self.operator, "carried"):
            return self.changed_count(pair)
        parameters = pair.target_parameters
        return sum(
            self.operator.carried(region.of(parameters[region.parameter]).shape) for region in self._written(pair)
        )

    def distance(self, pair: Pair) -> float:
        """How far the graft moves the target's weights: the L2 norm ‖t_grafted − t‖ over all numbers that it writes.

        A length, wherever it leads: a graft as long as the whole difference may end as far from the source as it
        began. Call it while no graft is in place.
        """
        return sum(squared_change(self.operator, pair, *part) for part in self._written(pair).items()) ** 0.5

    def consequences(self, pair: Pair) -> list[str]:
        """What a reader of a result must know: K and V, heads that are touched beside the graft's, what stays."""
        layout, parameters, said = pair.layout, pair.target_parameters, []
        if self.mode not in ("replacement", "nothing"):
            said.append(f"strength: {self.mode}")
        heads: dict[int, set[int]] = {}
        named: list[str] = []
        for address, strength in zip(map(layout.check, self.modules), self.strengths, strict=True):
            if strength == 0:
                continue
            if address.head is not None:
                heads.setdefault(address.layer, set()).add(address.head)
            elif address.kind in ("norm", "embedding"):
                named.append(str(address))
        if named:
            said.append(f"moves {', '.join(named)}, which stay the target's unless they are named")
        written = self.regions(pair)
        for layer, ours in heads.items():
            # what is moved, by whichever module: a head's K and V may come with the whole layer
            moved, touched, still = [], set(), []
            for group in sorted({layout.group(h) for h in ours}):
                members = set(range(group * layout.group_size, (group + 1) * layout.group_size))
                if all(_covered(region, written) for region in layout.kv_regions(layer, group, parameters)):
                    moved += sorted(members)
                    touched |= members - ours
                else:
                    still += sorted(members & ours)
            if moved:
                others = f", read by {heads_in_words(sorted(touched))} outside the graft as well" if touched else ""
                said.append(f"L{layer}: moves K/V of {heads_in_words(moved)}{others}")
            if still:
                said.append(f"L{layer}: K/V of {heads_in_words(still)} stay the target's (kv={self.kv!r})")
            norms = [n for n in ("q_norm", "k_norm") if f"L{layer}.{n}" in layout.others]
            norms = [n for n in norms if f"L{layer}.{n}" not in self.modules]
            if norms:
                said.append(f"L{layer}: {' and '.join(norms)} stay the target's, as norms do unless they are named")
        return said

    def describe(self, pair: Pair) -> str:
        """The graft in words: modules, strength, equation, share of the model, consequences."""
        wanted = self.regions(pair)
        parameters = pair.target_parameters
        regions = [r for r, strength in wanted.items() if strength != 0]
        count = sum(r.of(parameters[r.parameter]).numel() for r in regions)
        share = count / sum(p.numel() for p in parameters.values())
        options = ", ".join(f"{key} = {value}" for key, value in options_of(self.operator).items())
        lines = [
            f"{len(self)} module{'s' if len(self) != 1 else ''}, {count:,} numbers ({share:.1%} of the model), by "
            f"{self.operator.name}{f' ({options})' if options else ''}: {self.operator.equation}",
            *self.consequences(pair),
        ]
        if len(set(self.strengths)) > 1:
            each = zip(self.modules, self.strengths, strict=True)
            lines.append("strengths: " + shortened([f"{m} {value:g}" for m, value in each]))
        if pair.base is not None:
            lines.append(f"ancestor b: {pair.base.name}")
        return "\n".join(lines)

    def applied(self, pair: Pair) -> Applied:
        """The target with the graft in place, for the length of a ``with`` block.

        Every byte is restored on any exit, an exception and Ctrl-C included. Blocks may be nested, and one may be
        entered again while it is in use; a graft acts on the weights that it finds.
        """
        return Applied(self, pair, in_few_parts(self.operator, checked(self, pair)))

    def copied(self, pair: Pair, name: str | None = None) -> LanguageModel:
        """A new model, the target with the graft in it; the pair is not touched.

        Plain grafts that are in place are in the copy as well; a conditional one is refused.
        """
        from mechtransplant.pair import LanguageModel, copy_without_hooks

        regions = in_few_parts(self.operator, checked(self, pair))
        pair.check_plain("copy")
        # the copy stays where it is made
        awaken(pair.target.hf)
        hf = copy_without_hooks(pair.target.hf)
        new = LanguageModel(name or f"{pair.target.name} + graft of {len(self)}", hf, pair.target.tokenizer)
        parameters = dict(hf.named_parameters())
        for region, strength in regions.items():
            if strength != 0:
                region.of(parameters[region.parameter].data).copy_(written(self.operator, pair, region, strength))
        chosen = (*selections_on(pair.target.hf), *selected_by(pair.target.hf, self.modules))
        put_on(hf, chosen, (*what_acts_on(pair.target.hf), self.label))
        return new


def shortened(names: Sequence[str], most: int = 256) -> str:
    """Names with commas; of thousands (neurons) the first ones, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f", and {more:,} more" if more > 0 else "")


def depth_curve(values: Sequence[float], layers: int) -> Callable[[Address], float]:
    """Strength as a function of depth: ``values`` at even steps from the first layer to the last, linear in between.

    ``Graft(modules, depth_curve([0, 1, 0.5], pair.layout.layers))``.
    """
    import numpy as np

    check_count("layers", layers)
    values = [finite_number("a depth curve's value", v) for v in values]
    if not values:
        raise UsageError("a depth curve needs at least one value")
    points = np.linspace(0, max(layers - 1, 1), len(values)) if len(values) > 1 else np.zeros(1)

    def strength(address: Address) -> float:
        if not 0 <= address.layer < layers:
            raise UsageError(f"{address} is in none of {layers} layers, and has no place on a depth curve")
        return float(np.interp(address.layer, points, values))

    return strength


def layer_swap(pair: Pair, first: int, last: int, strength: float = 1.0) -> Graft:
    """The graft of whole transformer blocks ``first`` to ``last``, both counted, with their norms."""
    for name, value in (("first layer", first), ("last layer", last)):
        check_count(name, value, least=0, most=pair.layout.layers - 1)
    if first > last:
        raise UsageError(f"layers {first} to {last} are not in 0 to {pair.layout.layers - 1}, in this order")
    layers = range(first, last + 1)
    norms = [a for a in pair.layout.of_kind("norm") if parse_address(a).layer in layers]
    return Graft([*(f"L{layer}" for layer in layers), *norms], strength)


def checked(graft: Graft, pair: Pair) -> dict[Region, float]:
    """The graft's regions, if source and target have one shape and dtype there, and source and ancestor are finite."""
    regions = graft.regions(pair)
    for name in dict.fromkeys(region.parameter for region in regions):
        source, target = pair.source_parameters.get(name), pair.target_parameters[name]
        if source is None or source.shape != target.shape:
            found = "missing" if source is None else f"of shape {tuple(source.shape)}"
            raise CompatibilityError(
                f"the source's {name} is {found} and the target's of shape {tuple(target.shape)}: nothing was grafted"
            )
        if source.dtype != target.dtype:
            types = [str(t.dtype).removeprefix("torch.") for t in (source, target)]
            raise CompatibilityError(
                f"the source's {name} is {types[0]} and the target's {types[1]}: nothing was grafted; load both with "
                "one dtype"
            )
        given = {"source": source} if pair.base is None else {"source": source, "ancestor": pair.base_parameters[name]}
        for role, numbers in given.items():
            # looked at once, and again when the numbers have changed
            state = (id(numbers), numbers._version)
            if pair.known_finite.get((role, name)) != state:
                if not numbers.isfinite().all():
                    raise CompatibilityError(
                        f"the {role}'s {name} holds NaN or Inf: nothing was grafted; use intact weights"
                    )
                pair.known_finite[role, name] = state
    return regions


def _strengths(names: list[str], strength: Any) -> list[float]:
    """One number a module."""
    what = "a graft's strength"
    if callable(strength):
        return [finite_number(what, strength(parse_address(name))) for name in names]
    # a pandas Series has an index, which says whose each number is
    keyed = strength.to_dict() if hasattr(strength, "to_dict") else strength
    if isinstance(keyed, Mapping):
        known = set(names)
        for name in [*keyed, *names]:
            if name not in known or name not in keyed:
                raise UsageError(f"{name} has a strength or is in the graft, not both: give every module one")
        return [finite_number(what, keyed[name]) for name in names]
    many = isinstance(strength, Iterable) and getattr(strength, "shape", None) != ()
    if isinstance(strength, str | bytes) or not many:
        return [finite_number(what, strength)] * len(names)
    values = [finite_number(what, s) for s in strength]
    if len(values) != len(names):
        raise UsageError(f"{len(values)} strengths for {len(names)} modules: give one number, or one a module")
    return values


def addresses_of(modules: Any, ordered: bool = False) -> list[str]:
    """Module names from one name or several; raises UsageError for anything else, and for a set that needs an order."""
    if isinstance(modules, str):
        modules = [modules]
    if not isinstance(modules, Iterable):
        raise UsageError(f"modules are addresses such as ['L5H3', 'L5.mlp'], got {modules!r}")
    if ordered and isinstance(modules, set | frozenset):
        raise UsageError("a set of modules has no order for a list of strengths: give a list, or map module → strength")
    # a ranking's names remember what selected them
    return [m if isinstance(m, SelectedModule) else str(m).strip() for m in modules]


def _mode(strength: float) -> str:
    if strength < 0:
        return "subtraction"
    if strength > 1:
        return "extrapolation"
    return {0.0: "nothing", 1.0: "replacement"}.get(strength, "interpolation")


def _covered(region: Region, written: Mapping[Region, float]) -> bool:
    """Whether a region lies inside one that is written at a strength other than 0."""
    for other, strength in written.items():
        if strength != 0 and other.parameter == region.parameter:
            inside = other.axis == region.axis and other.start <= region.start and region.stop <= other.stop
            if other.axis is None or inside:
                return True
    return False
