"""Every merge operator against a slow, literal definition in float64; what is refused; and operators inside grafts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mechtransplant.errors import UsageError
from mechtransplant.grafting import OPERATORS, Graft, LowRank, depth_curve, layer_swap, list_operators
from mechtransplant.grafting.operators import (
    Dare,
    Linear,
    Operator,
    Replace,
    Slerp,
    TaskArithmetic,
    Ties,
    get_operator,
    options_of,
)
from mechtransplant.pair import LanguageModel, Pair, make_pair

Numbers = list[float]
#: eighths and quarters: sums and products of these are exact in float32, so the definitions must agree to the bit
EIGHTHS = st.integers(-32, 32).map(lambda n: n / 8)
QUARTERS = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def three(draw: st.DrawFn, numbers: st.SearchStrategy[float] = EIGHTHS) -> tuple[Numbers, Numbers, Numbers]:
    """Target, source and ancestor, of one length."""
    n = draw(st.integers(1, 12))
    target, source, base = (draw(st.lists(numbers, min_size=n, max_size=n)) for _ in range(3))
    return target, source, base


def call(operator: Operator, target: Numbers, source: Numbers, base: Numbers | None, strength: float) -> Numbers:
    ancestor = None if base is None else torch.tensor(base)
    return operator(torch.tensor(target), torch.tensor(source), ancestor, strength, "part").tolist()


# --- equations -------------------------------------------------------------------------------------------------------


@given(three(), QUARTERS)
def test_lines_are_their_equations(models: tuple[Numbers, Numbers, Numbers], strength: float) -> None:
    target, source, base = models
    line = [t + strength * (s - t) for t, s in zip(target, source, strict=True)]
    assert call(Replace(), target, source, base, strength) == line
    assert call(Linear(), target, source, base, strength) == line
    assert call(TaskArithmetic(), target, source, None, strength) == line
    moved = [t + strength * (s - b) for t, s, b in zip(target, source, base, strict=True)]
    assert call(TaskArithmetic(), target, source, base, strength) == moved


def test_linear_divides_by_weights_that_round_to_another_sum_than_one() -> None:
    strength = -1.93
    assert torch.tensor([1 - strength, strength]).sum() != 1
    one = torch.ones(3)
    assert torch.equal(Linear()(one, one, None, strength, "part"), one)


def literal_ties(
    target: Numbers, source: Numbers, base: Numbers | None, strength: float, density: float, normalize: bool | None
) -> Numbers:
    """TIES number by number: trim, elect, merge (Yadav et al. 2023, section 3.2)."""
    start = target if base is None else base
    models = [(source, strength)] if base is None else [(target, 1.0), (source, strength)]
    if normalize is None:
        normalize = base is not None
    trimmed = []
    for model, _ in models:
        change = [m - b for m, b in zip(model, start, strict=True)]
        kept = max(1, math.floor(density * len(change)))
        smallest = sorted((abs(c) for c in change), reverse=True)[kept - 1]
        trimmed.append([c if abs(c) >= smallest else 0.0 for c in change])
    merged = []
    for at, first in enumerate(start):
        weighted = [(weight * change[at], weight) for change, (_, weight) in zip(trimmed, models, strict=True)]
        positive = sum(w for w, _ in weighted) >= 0
        agree = [(w, weight) for w, weight in weighted if (w > 0 if positive else w < 0)]
        total = sum(weight for _, weight in agree) if normalize else 1.0
        merged.append(first + sum(w for w, _ in agree) / (total or 1.0))
    return merged


@settings(max_examples=300)
@given(three(), QUARTERS, st.sampled_from([0.01, 0.2, 0.5, 0.75, 1.0]), st.sampled_from([None, True, False]))
def test_ties_is_its_definition(
    models: tuple[Numbers, Numbers, Numbers], strength: float, density: float, normalize: bool | None
) -> None:
    target, source, base = models
    for ancestor in (None, base):
        found = call(Ties(density, normalize), target, source, ancestor, strength)
        wanted = literal_ties(target, source, ancestor, strength, density, normalize)
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_ties_elects_the_sign_of_the_larger_change() -> None:
    base, target, source = [0.0] * 4, [4.0, -4.0, 1.0, 2.0], [-1.0, 1.0, 3.0, -2.0]
    # agreeing changes are averaged; where two cancel, the sign is positive
    assert call(Ties(1.0), target, source, base, 1.0) == [4.0, -4.0, 2.0, 2.0]
    # a weight that turns the majority
    assert call(Ties(1.0), target, source, base, 8.0)[0] == -1.0
    # without normalisation agreeing changes add up
    assert call(Ties(1.0, normalize=False), target, source, base, 1.0)[2] == 4.0
    # a negative weight subtracts the source's change
    assert call(Ties(1.0, normalize=False), target, source, base, -1.0)[:2] == [5.0, -5.0]


def test_ties_at_the_edges_of_density() -> None:
    source, zero = [1.0, -2.0, 3.0, -4.0], [0.0] * 4
    assert call(Ties(1e-9), zero, source, None, 1.0) == [0.0, 0.0, 0.0, -4.0]
    assert call(Ties(1.0), zero, source, None, 1.0) == source
    # rounded down
    assert call(Ties(0.74), zero, source, None, 1.0) == [0.0, 0.0, 3.0, -4.0]
    assert call(Ties(0.75), zero, source, None, 1.0) == [0.0, -2.0, 3.0, -4.0]
    # those that tie with the smallest kept are all kept
    assert call(Ties(0.5), zero, [1.0, 2.0, -2.0, 2.0], None, 1.0) == [0.0, 2.0, -2.0, 2.0]


def literal_slerp(target: Numbers, source: Numbers, strength: float) -> tuple[Numbers, float]:
    lengths = [math.sqrt(sum(x * x for x in v)) for v in (target, source)]
    cosine = sum(t * s for t, s in zip(target, source, strict=True)) / ((lengths[0] or 1) * (lengths[1] or 1))
    cosine = min(1.0, max(-1.0, cosine))
    ours, theirs = 1 - strength, strength
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        ours, theirs = math.sin(ours * angle) / math.sin(angle), math.sin(theirs * angle) / math.sin(angle)
    return [ours * t + theirs * s for t, s in zip(target, source, strict=True)], cosine


@given(three(), QUARTERS)
def test_slerp_is_its_equation(models: tuple[Numbers, Numbers, Numbers], strength: float) -> None:
    target, source, _ = models
    wanted, cosine = literal_slerp(target, source, strength)
    assume(abs(abs(cosine) - 0.9995) > 1e-5)
    assert call(Slerp(), target, source, None, strength) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_slerp_ends_at_both_models_and_keeps_length() -> None:
    generator = torch.Generator().manual_seed(0)
    target, source = (torch.randn(40, 7, generator=generator) for _ in range(2))
    assert torch.equal(Slerp()(target, source, None, 0.0, ""), target)
    assert torch.equal(Slerp()(target, source, None, 1.0, ""), source)
    units = [v / v.norm() for v in (target, source)]
    for strength in (0.1, 0.5, 0.9, -0.3, 1.4):
        assert float(Slerp()(*units, None, strength, "").norm()) == pytest.approx(1, abs=1e-5)


def test_slerp_of_parallel_opposite_and_zero_vectors() -> None:
    t, zero = [1.0, -2.0], [0.0, 0.0]
    assert call(Slerp(), t, [3.0, -6.0], None, 0.5) == [2.0, -4.0]
    assert call(Slerp(), t, [-1.0, 2.0], None, 0.25) == [0.5, -1.0]
    # no direction: taken as a right angle
    quarter = math.sin(math.pi / 8)
    assert call(Slerp(), zero, t, None, 0.25) == pytest.approx([quarter, -2 * quarter])
    assert call(Slerp(), zero, zero, None, 0.5) == zero
    # a threshold so near 1 that only exactly parallel vectors lie above it
    assert call(Slerp(math.nextafter(1, 0)), [1.0, 0.0], [2.0, 0.0], None, 0.5) == [1.5, 0.0]


def test_slerp_sums_in_pieces_give_the_same_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    from mechtransplant.grafting import operators

    generator = torch.Generator().manual_seed(0)
    target, source = (torch.randn(50, 21, generator=generator) for _ in range(2))
    whole = Slerp()(target, source, None, 0.3, "")
    monkeypatch.setattr(operators, "PIECE", 64)
    torch.testing.assert_close(Slerp()(target, source, None, 0.3, ""), whole)


# --- DARE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_expectation(density: float) -> None:
    change = torch.linspace(-2, 3, 64)
    draws = 4000
    mean = sum(Dare(density, rescale="density").dropped(change.clone(), seed) for seed in range(draws)) / draws
    error = change.abs() * math.sqrt((1 - density) / density / draws)
    assert bool(((mean - change).abs() <= 5 * error + 1e-6).all())


@pytest.mark.parametrize("rescale", ["l1", "density"])
def test_dare_keeps_a_share_and_rescales_it_by_one_factor(rescale: Any) -> None:
    change = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    dropped = Dare(0.3, rescale=rescale).dropped(change.clone(), 5)
    kept = dropped != 0
    assert abs(float(kept.double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    factor = (dropped[kept].double() / change[kept].double()).tolist()
    wanted = 1 / 0.3 if rescale == "density" else float(change.abs().double().sum() / change[kept].abs().double().sum())
    assert factor == pytest.approx([wanted] * len(factor), rel=1e-5)


def test_dare_without_anything_to_rescale() -> None:
    change = torch.tensor([1.0, 2.0])
    assert torch.equal(Dare(1.0).dropped(change.clone(), 0), change)
    assert torch.equal(Dare(0.5).dropped(torch.zeros(3), 0), torch.zeros(3))
    # everything dropped: nothing to restore the sum with
    nothing = [Dare(1e-6).dropped(change.clone(), seed) for seed in range(20)]
    assert all(torch.equal(n, torch.zeros(2)) for n in nothing)


def test_dare_depends_on_the_seed_and_the_part_and_on_no_other_draw() -> None:
    target, source = torch.zeros(500), torch.ones(500)
    one = Dare(seed=3)(target, source, None, 1.0, "a")
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert torch.equal(Dare(seed=3)(target, source, None, 1.0, "a"), one)
    assert torch.equal(torch.random.get_rng_state(), before)
    for seed, key in ((4, "a"), (3, "b"), (0, "a")):
        assert not torch.equal(Dare(seed=seed)(target, source, None, 1.0, key), one)


def test_dare_in_a_graft_is_independent_of_order_and_of_other_modules(random_pair: Pair) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    found = []
    for modules in (["L0.q_proj"], ["L1.mlp", "L0.q_proj", "L0H0"], ["L0.attn"], ["L0"]):
        with Graft(modules, 0.7, operator=Dare(0.5, seed=2)).applied(random_pair):
            found.append(random_pair.target_parameters[name].clone())
    assert all(torch.equal(f, found[0]) for f in found)
    with Graft(["L0.q_proj"], 0.7, operator=Dare(0.5, seed=3)).applied(random_pair):
        assert not torch.equal(random_pair.target_parameters[name], found[0])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0, 1.5, -0.1, math.nan, math.inf, "abc", None, True])
@pytest.mark.parametrize("operator", [Ties, Dare])
def test_a_density_outside_0_to_1_is_refused(operator: Any, density: Any) -> None:
    with pytest.raises(UsageError, match="density is the share"):
        operator(density=density)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Dare(seed=-1), "seed must be a whole number of at least 0, got -1"),
        (lambda: Dare(seed=1.5), "seed"),  # type: ignore[arg-type]
        (lambda: Dare(rescale="foo"), "unknown rescale 'foo': expected l1 or density"),  # type: ignore[arg-type]
        (lambda: Dare(rescale=["l1"]), "unknown rescale"),  # type: ignore[arg-type]
        (lambda: Ties(normalize="yes"), "normalize must be True, False or None"),  # type: ignore[arg-type]
        (lambda: Slerp(1.0), "threshold"),
        (lambda: Slerp(math.nan), "threshold"),
        (lambda: Slerp("0.9"), "threshold"),  # type: ignore[arg-type]
        (lambda: Graft(["L0"], operator="teis"), "unknown operator 'teis': did you mean ties"),
        (lambda: Graft(["L0"], operator="TASK_arithmetics"), "task_arithmetic"),
        (lambda: Graft(["L0"], operator=object()), "is no operator: give a name"),  # type: ignore[arg-type]
        (lambda: Graft(["L0"], operator=None), "None is no operator"),  # type: ignore[arg-type]
        (lambda: Graft(["L0"], operator=lambda *a: a[0]), "is no operator"),  # type: ignore[arg-type]
        (lambda: Graft(["L0"], operator=Ties), "Ties is a class of operators: give an operator, Ties()"),  # type: ignore[arg-type]
    ],
)
def test_refusals_say_what_to_give(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert said in str(error.value)


# --- every operator --------------------------------------------------------------------------------------------------


def test_every_operator_has_a_name_and_an_equation() -> None:
    listed = list_operators()
    assert set(listed) == set(OPERATORS) == {
        "replace", "linear", "task_arithmetic", "ties", "dare", "low_rank", "slerp"
    }  # fmt: skip
    assert all("t" in equation for equation in listed.values())
    assert [get_operator(name).name for name in listed] == list(listed)


def test_options_go_into_a_manifest() -> None:
    assert options_of(Ties(0.3)) == {"density": 0.3, "normalize": None}
    assert options_of(Dare(0.4, seed=7)) == {"density": 0.4, "seed": 7, "rescale": "l1"}
    assert options_of(Replace()) == {}
    assert options_of(Halfway()) == {}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (3, 0), (5,), (4, 3), (2, 3, 4)])
def test_shape_and_dtype_stay_and_the_inputs_are_not_written(operator: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        models = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]
        kept = [m.clone() for m in models]
        for base in (None, models[2]):
            for strength in (-0.5, 0.5, 1.0, 2.0):
                found = OPERATORS[operator]()(models[0], models[1], base, strength, "part")
                assert found.shape == shape and found.dtype == dtype and bool(found.isfinite().all())
        assert all(torch.equal(m, k) for m, k in zip(models, kept, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_view_gives_what_its_copy_gives(operator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target, source = (torch.randn(12, 20, generator=generator)[:, 4:9] for _ in range(2))
    merge = OPERATORS[operator]()
    found = merge(target, source, None, 0.4, "part")
    copied = merge(target.contiguous(), source.contiguous(), None, 0.4, "part")
    torch.testing.assert_close(found, copied, rtol=1e-6, atol=1e-7)


# --- inside grafts ---------------------------------------------------------------------------------------------------

SOME = [Replace(), Linear(), TaskArithmetic(), Ties(0.3), Dare(0.5, seed=1), LowRank(2), Slerp()]


def named(operator: Operator) -> str:
    return operator.name


def snapshot(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.hf.named_parameters()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def in_dtype(pair: Pair, dtype: torch.dtype, base: LanguageModel | None = None) -> Pair:
    """The pair in another dtype."""
    models = [copy.deepcopy(m) for m in (pair.source, pair.target)]
    for model in models:
        model.hf.to(dtype)
    made = make_pair(models[0], models[1], str(dtype))
    if base is not None:
        made.base = copy.deepcopy(base)
        made.base.hf.to(dtype)
    return made


@pytest.mark.parametrize("operator", SOME, ids=named)
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_a_head_is_written_and_nothing_else(random_pair: Pair, operator: Operator, strength: float) -> None:
    kept = snapshot(random_pair.target)
    graft = Graft(["L1H2"], strength, operator=operator)
    regions = graft.regions(random_pair)
    assert {r.parameter for r in regions} == {f"model.layers.1.self_attn.{n}_proj.weight" for n in "qo"}
    with graft.applied(random_pair):
        for name, now in random_pair.target.hf.named_parameters():
            expected = kept[name].clone()
            for region in regions:
                if region.parameter == name:
                    source = region.of(random_pair.source_parameters[name])
                    wanted = operator(region.of(kept[name]), source, None, strength, str(region))
                    assert not torch.equal(wanted, region.of(kept[name]))
                    region.of(expected).copy_(wanted)
            assert same_bytes(now, expected), name
    assert all(same_bytes(p, kept[n]) for n, p in random_pair.target.hf.named_parameters())


@pytest.mark.parametrize("operator", SOME, ids=named)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_the_float32_result_rounded_once(
    random_pair: Pair, random_model: Callable[..., LanguageModel], operator: Operator, dtype: torch.dtype
) -> None:
    pair = in_dtype(random_pair, dtype, base=random_model(2))
    kept = snapshot(pair.target)
    graft = Graft(["L0", "L1H1", "L1.input_layernorm"], 0.3, operator=operator)
    with graft.applied(pair):
        for region in graft.regions(pair):
            of = [region.of(p[region.parameter]) for p in (kept, pair.source_parameters, pair.base_parameters)]
            wide = operator(*(t.float() for t in of), 0.3, str(region))
            assert wide.dtype == torch.float32
            assert same_bytes(region.of(pair.target_parameters[region.parameter]), wide.to(dtype)), region
    assert all(same_bytes(p, kept[n]) for n, p in pair.target.hf.named_parameters())


def test_float64_is_not_rounded(random_pair: Pair) -> None:
    pair = in_dtype(random_pair, torch.float64)
    for p in (*pair.target.hf.parameters(), *pair.source.hf.parameters()):
        p.add_(1e-12 * torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape))
    name = "model.layers.0.mlp.up_proj.weight"
    old, new = pair.target_parameters[name].clone(), pair.source_parameters[name]
    with Graft(["L0"], 0.3).applied(pair):
        assert torch.equal(pair.target_parameters[name], old + 0.3 * (new - old))


@pytest.mark.parametrize("operator", SOME, ids=named)
def test_undo_restores_every_byte_of_every_kind(
    random_pair: Pair, random_model: Callable[..., LanguageModel], operator: Operator
) -> None:
    pair = in_dtype(random_pair, torch.float32, base=random_model(2))
    kept = [snapshot(m) for m in (pair.source, pair.target)]
    modules = [*pair.modules("block"), *pair.modules("norm"), *pair.modules("embedding")]
    graft, name = Graft(modules, 0.5, operator=operator), "model.layers.0.mlp.up_proj.weight"
    for _ in range(2):
        with graft.applied(pair), Graft(["L0.mlp", "L1H0"], 1.5, operator=operator).applied(pair):
            assert not same_bytes(pair.target_parameters[name], kept[1][name])
    for model, before in zip((pair.source, pair.target), kept, strict=True):
        assert all(same_bytes(p, before[n]) for n, p in model.hf.named_parameters())


@pytest.mark.parametrize("operator", SOME, ids=named)
def test_strength_0_changes_no_byte(random_pair: Pair, operator: Operator) -> None:
    kept = snapshot(random_pair.target)
    with Graft(["L0", "L1H1"], 0.0, operator=operator).applied(random_pair):
        assert all(same_bytes(p, kept[n]) for n, p in random_pair.target.hf.named_parameters())


@pytest.mark.parametrize("operator", [Replace(), TaskArithmetic(), Ties(0.3), Dare()], ids=named)
def test_equal_models_stay_equal_to_the_bit(random_model: Callable[..., LanguageModel], operator: Operator) -> None:
    pair = make_pair(random_model(0), random_model(0), "self")
    kept = snapshot(pair.target)
    for strength in (0.3, 1.0, 1.7):
        with Graft(pair.modules("block"), strength, operator=operator).applied(pair):
            assert all(same_bytes(p, kept[n]) for n, p in pair.target.hf.named_parameters())


def test_changes_are_taken_from_the_pairs_ancestor(
    random_pair: Pair, random_model: Callable[..., LanguageModel]
) -> None:
    pair = in_dtype(random_pair, torch.float32, base=random_model(2))
    name = "model.layers.0.self_attn.o_proj.weight"
    t, s, b = (p[name].clone() for p in (pair.target_parameters, pair.source_parameters, pair.base_parameters))
    with Graft(["L0H1"], 0.5, operator="task_arithmetic").applied(pair):
        now = pair.target_parameters[name]
        assert torch.equal(now[:, 8:16], (t + 0.5 * (s - b))[:, 8:16])
        assert torch.equal(now[:, :8], t[:, :8]) and torch.equal(now[:, 16:], t[:, 16:])


class Halfway:
    """An operator of a user's own, and no dataclass."""

    name: ClassVar[str] = "halfway"
    equation: ClassVar[str] = "(t + s) / 2"

    def __call__(
        self, target: torch.Tensor, source: torch.Tensor, base: torch.Tensor | None, strength: float, key: str
    ) -> torch.Tensor:
        return (target + source) / 2


def test_an_operator_of_ones_own(random_pair: Pair) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    t, s = random_pair.target_parameters[name].clone(), random_pair.source_parameters[name]
    graft = Graft(["L1.up_proj"], operator=Halfway())
    assert "halfway: (t + s) / 2" in graft.describe(random_pair)
    with graft.applied(random_pair):
        assert torch.equal(random_pair.target_parameters[name], (t + s) / 2)


# --- layer swaps and depth curves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 2), (0, 3)])
def test_a_layer_swap_moves_whole_blocks_with_their_norms(generations: Pair, first: int, last: int) -> None:
    pair, kept = generations, snapshot(generations.target)
    with layer_swap(pair, first, last).applied(pair):
        for name, now in pair.target.hf.named_parameters():
            inside = any(name.startswith(f"model.layers.{layer}.") for layer in range(first, last + 1))
            assert same_bytes(now, pair.source_parameters[name] if inside else kept[name]), name
    assert all(same_bytes(p, kept[n]) for n, p in pair.target.hf.named_parameters())
    assert len([m for m in layer_swap(pair, first, last).modules if "norm" in m]) == 2 * (last - first + 1)


@pytest.mark.parametrize(("first", "last"), [(-1, 1), (2, 1), (0, 4)])
def test_a_layer_swap_outside_the_model_is_refused(generations: Pair, first: int, last: int) -> None:
    with pytest.raises(UsageError, match=r"first|last|layers"):
        layer_swap(generations, first, last)


@given(st.lists(QUARTERS, min_size=1, max_size=6), st.integers(1, 12))
def test_a_depth_curve_is_linear_between_its_values(values: Numbers, layers: int) -> None:
    from mechtransplant.modules import parse_address

    curve = depth_curve(values, layers)
    for layer in range(layers):
        if len(values) == 1:
            wanted = values[0]
        else:
            at = layer / max(layers - 1, 1) * (len(values) - 1)
            left = min(int(at + 1e-9), len(values) - 2)
            wanted = values[left] + (at - left) * (values[left + 1] - values[left])
        for module in (f"L{layer}", f"L{layer}H0", f"L{layer}.q_proj"):
            assert curve(parse_address(module)) == pytest.approx(wanted)


def test_a_depth_curve_sets_each_layers_strength(generations: Pair) -> None:
    graft = Graft([f"L{layer}.mlp" for layer in range(4)], depth_curve([0, 1.5], 4))
    assert graft.strengths == pytest.approx((0, 0.5, 1.0, 1.5))
    assert graft.mode == "nothing and interpolation and replacement and extrapolation"
    for bad in (lambda: depth_curve([], 4), lambda: depth_curve([1], 0), lambda: Graft(["L4"], depth_curve([1], 4))):
        with pytest.raises(UsageError):
            bad()
    with pytest.raises(UsageError, match="no place on a depth curve"):
        Graft(["embed_tokens"], depth_curve([1], 4))
