"""Grafts write exactly their modules, and undoing them restores every byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtransplant import grafting
from mechtransplant.errors import CompatibilityError, UsageError
from mechtransplant.grafting import Graft
from mechtransplant.pair import LanguageModel, Pair, make_pair

ALL = [
    f"L{layer}{m}"
    for layer in range(2)
    for m in ("", ".mlp", ".attn", ".q_proj", ".k_proj", ".o_proj", ".down_proj", "H0", "H3")
]


def snapshot(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.hf.named_parameters()}


def same(model: LanguageModel, kept: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, kept[name]) for name, p in model.hf.named_parameters())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(ALL), unique=True), st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]))
def test_undo_restores_every_byte(random_pair: Pair, modules: list[str], strength: float) -> None:
    kept = snapshot(random_pair.target)
    graft = Graft(modules, strength)
    with graft.applied(random_pair):
        untouched = same(random_pair.target, kept)
        assert untouched == (strength == 0 or not modules)
    assert same(random_pair.target, kept)


def test_strength_one_on_all_linear_layers_is_the_source_byte_for_byte(random_pair: Pair) -> None:
    with Graft(random_pair.modules("linear")).applied(random_pair):
        for name in random_pair.layout.linears.values():
            assert torch.equal(
                random_pair.target_parameters[f"{name}.weight"], random_pair.source_parameters[f"{name}.weight"]
            )


def test_only_the_named_modules_move(random_pair: Pair) -> None:
    kept = snapshot(random_pair.target)
    with Graft(["L0.q_proj", "L1.mlp"]).applied(random_pair):
        moved = {n for n, p in random_pair.target.hf.named_parameters() if not torch.equal(p, kept[n])}
    assert moved == {"model.layers.0.self_attn.q_proj.weight"} | {
        f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }


def test_head_graft_equals_slicing_by_hand(random_pair: Pair) -> None:
    kept, source = snapshot(random_pair.target), random_pair.source_parameters
    with Graft(["L1H2"]).applied(random_pair):
        q, o = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "qo")
        expected_q, expected_o = kept[q].clone(), kept[o].clone()
        expected_q[16:24] = source[q][16:24]
        expected_o[:, 16:24] = source[o][:, 16:24]
        assert torch.equal(random_pair.target_parameters[q], expected_q)
        assert torch.equal(random_pair.target_parameters[o], expected_o)


def test_extrapolation(random_pair: Pair) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    old, new = random_pair.target_parameters[name].clone(), random_pair.source_parameters[name]
    with Graft(["L0.up_proj"], 2.0).applied(random_pair):
        torch.testing.assert_close(random_pair.target_parameters[name], old + 2 * (new - old))


def test_self_graft_changes_no_byte(random_model: Callable[..., LanguageModel]) -> None:
    pair = make_pair(random_model(0), random_model(0), "self")
    kept = snapshot(pair.target)
    for strength in (1.0, 0.7, 2.0):
        with Graft(pair.modules("block"), strength).applied(pair):
            assert same(pair.target, kept)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_undone_after_an_exception_in_the_block(random_pair: Pair, error: type[BaseException]) -> None:
    kept = snapshot(random_pair.target)
    with pytest.raises(error), Graft(["L0", "L1H1"]).applied(random_pair):
        raise error
    assert same(random_pair.target, kept)


@pytest.mark.parametrize("after", range(4))
def test_undone_after_ctrl_c_while_writing(random_pair: Pair, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    kept, write, calls = snapshot(random_pair.target), grafting._write, []

    def interrupted(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt

    monkeypatch.setattr(grafting, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt), Graft(["L0.attn"]).applied(random_pair):
        pytest.fail("the graft was applied although it was interrupted")
    assert same(random_pair.target, kept)


def test_ctrl_c_while_restoring_is_raised_after_everything_is_restored(random_pair: Pair) -> None:
    kept = snapshot(random_pair.target)
    undo = grafting._Undo()
    for parameter in random_pair.target_parameters.values():
        undo.keep(parameter)
        parameter.add_(1)

    class Interrupting:
        """Raises at the first try to write back, as a signal would, and then behaves."""

        def __init__(self, view: torch.Tensor) -> None:
            self.view, self.tries = view, 0

        def copy_(self, old: torch.Tensor) -> None:
            self.tries += 1
            if self.tries == 1:
                raise KeyboardInterrupt
            self.view.copy_(old)

    view, old = undo.saved[3]
    undo.saved[3] = (Interrupting(view), old)
    with pytest.raises(KeyboardInterrupt):
        undo.restore()
    assert same(random_pair.target, kept)


def test_nested_grafts(random_pair: Pair) -> None:
    kept = snapshot(random_pair.target)
    with Graft(["L0"]).applied(random_pair):
        outer = snapshot(random_pair.target)
        with Graft(["L0.q_proj", "L1"], 0.5).applied(random_pair):
            pass
        assert same(random_pair.target, outer)
    assert same(random_pair.target, kept)


def test_bridge_and_hf_see_the_graft(random_pair: Pair) -> None:
    ids = torch.tensor([[1, 20, 21, 22, 9]])
    plain = random_pair.target.bridge(ids)
    with Graft(["L1.mlp"]).applied(random_pair):
        grafted = random_pair.target.bridge(ids)
        torch.testing.assert_close(grafted, random_pair.target.hf(ids).logits, atol=1e-4, rtol=1e-4)
    assert (plain - grafted).abs().max() > 1e-3
    assert torch.equal(random_pair.target.bridge(ids), plain)


def test_refusals_change_nothing(random_model: Callable[..., LanguageModel]) -> None:
    pair = make_pair(random_model(0), random_model(1), "broken")
    kept = snapshot(pair.target)
    pair.source_parameters["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(CompatibilityError, match="NaN"), Graft(["L0", "L1"]).applied(pair):
        pass
    for bad in (["L0.q_prj"], ["L7"], ["nonsense"]):
        with pytest.raises(UsageError), Graft(bad).applied(pair):
            pass
    with pytest.raises(UsageError, match="different strength"), Graft(["L0", "L0.q_proj"], [1.0, 2.0]).applied(pair):
        pass
    with pytest.raises(UsageError, match="2 strengths for 1"):
        Graft(["L0"], [1.0, 2.0])
    with pytest.raises(UsageError, match="finite"):
        Graft(["L0"], float("nan"))
    assert same(pair.target, kept)


def test_overlap_at_equal_strength_is_applied_once(random_pair: Pair) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with Graft(["L0", "L0.attn", "L0.q_proj", "L0H1"], 0.5).applied(random_pair):
        grafted = random_pair.target_parameters[name].clone()
    with Graft(["L0"], 0.5).applied(random_pair):
        assert torch.equal(random_pair.target_parameters[name], grafted)
