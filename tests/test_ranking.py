"""Rules score what their equations say, on models whose answer is known or can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mechtransplant.errors import TaskError, UsageError
from mechtransplant.evaluation import evaluate, gold_outcomes, gold_passes, gold_scores
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair, load_pair
from mechtransplant.patching import Patch
from mechtransplant.ranking import RULES, list_rules, rank_modules, register_rule, rules_frame, weight_effects
from mechtransplant.ranking.sensitivity import WeightChanges
from mechtransplant.shifts import measure_shifts
from mechtransplant.significance import test_shifts as shift_table
from mechtransplant.tasks import Task, load_task

REQUIRED = [
    "lae", "lae_relative", "distance", "own", "own_over_inherited", "significant", "weight_delta", "gradient",
    "activation_gradient", "single_swap", "screened_swap", "single_patch", "screened_patch", "greedy", "mask", "random",
    "random_matched", "bottom", "depth", "per_parameter", "pruned",
]  # fmt: skip
#: these rank no linear layers
PATCHES = ("single_patch", "screened_patch")


@pytest.fixture(scope="module")
def splits(addition: Task) -> Any:
    return addition.split(16, 24, 64)


@pytest.fixture(scope="module")
def drifted() -> Pair:
    return load_pair("family/planted-mixed-drifted")


def scores(pair: Pair, task: Task | None, rule: str, kind: Any = "linear", **options: Any) -> pd.Series:
    found = rank_modules(pair, task, rule, kind, **options)
    return found.set_index(found.module.astype(str)).score.reindex(pair.modules(kind))


# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_rule_says_what_it_is() -> None:
    assert set(REQUIRED) <= set(RULES)
    table = rules_frame().set_index("rule").loc[REQUIRED]
    for column in ("what", "equation", "needs", "cost", "high"):
        assert (table[column] != "").all(), column
    assert set(table.needs) == {"nothing", "prompts", "gold answers", "gradients"}
    assert table.needs["gradient"] == "gradients" and table.needs["single_swap"] == "gold answers"
    assert "choose" in list_rules()["greedy"] and table.split["greedy"] == "choose"


@pytest.mark.parametrize(
    ("rule", "kind"),
    # patches of single linear layers are not made: a test of its own
    [(r, k) for r in REQUIRED for k in ("linear", "head", "mlp", ("head", "mlp")) if k != "linear" or r not in PATCHES],
)
def test_every_rule_ranks_every_kind_and_leaves_the_models_alone(
    unchanged: Pair, splits: Any, rule: str, kind: Any
) -> None:
    options = {"mask": {"steps": 3}, "greedy": {"pool": 2, "stop": 2}, "significant": {"permutations": 999}}
    split = splits.choose if rule in ("greedy", "mask") else splits.discover
    task = split.subset(range(8))
    found = rank_modules(unchanged, task, rule, kind, seed=1, **options.get(rule, {}))
    assert sorted(found.module) == sorted(unchanged.modules(kind))
    assert list(found["rank"]) == list(range(1, len(found) + 1))
    assert found.score.is_monotonic_decreasing
    assert all(not p.requires_grad and p.grad is None for p in unchanged.target.hf.parameters())
    again = rank_modules(unchanged, task, rule, kind, seed=1, **options.get(rule, {}))
    pd.testing.assert_frame_equal(found, again)


@pytest.mark.parametrize("kind", [("head", "mlp"), ("mlp", "head")])
def test_kinds_ranked_together_have_the_scores_that_they_have_alone(drifted: Pair, kind: Any) -> None:
    task = _task(drifted)
    for rule in ("own", "gradient", "weight_delta", "activation_gradient", "lae", "single_patch"):
        both = scores(drifted, task, rule, kind)
        apart = pd.concat([scores(drifted, task, rule, k) for k in kind])
        pd.testing.assert_series_equal(both, apart, rtol=1e-5, check_index_type=False)


def _task(pair: Pair, n: int = 12, role: str = "discover") -> Task:
    from mechtransplant.tasks import load_task

    return getattr(load_task(str(pair.default_task)).split(n, n, n), role)  # type: ignore[no-any-return]


def test_splits_that_a_rule_must_not_see(generations: Pair, splits: Any) -> None:
    for rule in ("gradient", "own", "single_swap"):
        with pytest.raises(TaskError, match="choose split"):
            rank_modules(generations, splits.choose, rule)
    for rule in ("greedy", "mask", "gradient"):
        with pytest.raises(TaskError, match="test split"):
            rank_modules(generations, splits.test, rule)
    with pytest.raises(UsageError, match="needs gold answers"):
        rank_modules(generations, None, "single_swap")
    with pytest.raises(UsageError, match=r"pass task\.split"):
        rank_modules(generations, splits, "gradient")  # type: ignore[arg-type]


# --- first-order effects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "head", "mlp", "attn"])
def test_gradient_is_the_slope_of_the_graft(drifted: Pair, kind: Any) -> None:
    """Central differences of the mean log-probability along strength, in float64."""
    task = _task(drifted, 6)
    small = 1e-3
    pair = _double(drifted)
    modules = pair.modules(kind)[:: max(1, len(pair.modules(kind)) // 6)]
    slopes = []
    for module in modules:
        ends = []
        for strength in (small, -small):
            with Graft([module], strength).applied(pair):
                ends.append(_mean(pair, task))
        slopes.append((ends[0] - ends[1]) / (2 * small))
    found = scores(pair, task, "gradient", kind)[modules]
    np.testing.assert_allclose(found, slopes, rtol=2e-3, atol=5e-4)


def _double(pair: Pair) -> Pair:
    import copy

    from mechtransplant.pair import LanguageModel, make_pair

    both = [LanguageModel(m.name, copy.deepcopy(m.hf).double(), m.tokenizer) for m in (pair.source, pair.target)]
    return make_pair(*both, "double")


def _mean(pair: Pair, task: Task) -> float:
    """In float64 throughout, which the library's own scores are not."""
    total = 0.0
    with torch.no_grad():
        for done in gold_passes(pair.target, task, share_prefix=False):
            logits = done.logits.log_softmax(-1)
            rows = logits.gather(-1, done.gold[..., None])[..., 0].masked_fill(~done.real, 0)
            total += float(rows.sum())
    return total / len(task)


def test_integrated_gradients_sum_to_what_grafting_everything_gains(drifted: Pair) -> None:
    task = _task(drifted)
    base = gold_scores(drifted.target, task)[1].mean()
    for kind in ("linear", ("attn", "mlp")):
        with Graft(drifted.modules(kind)).applied(drifted):  # type: ignore[arg-type]
            gain = gold_scores(drifted.target, task)[1].mean() - base
        total = scores(drifted, task, "integrated_gradient", kind, steps=32).sum()
        assert total == pytest.approx(gain, rel=0.03)


def test_gradients_do_not_depend_on_batches(drifted: Pair) -> None:
    task = _task(drifted)
    for rule in ("gradient", "activation_gradient"):
        one, many = (scores(drifted, task, rule, ("head", "mlp"), batch_size=b) for b in (1, 7))
        np.testing.assert_allclose(one, many, rtol=2e-3, atol=2e-4)


def test_gradient_sees_the_kv_policy(generations: Pair, splits: Any) -> None:
    alone = scores(generations, splits.discover, "gradient", "head")
    group = scores(generations, splits.discover, "gradient", "head", kv="group")
    kv = WeightChanges(generations, ["L1.k_proj", "L1.v_proj"])
    layer = weight_effects(kv, splits.discover)[0].sum()
    heads = [h for h in alone.index if h.startswith("L1")]
    # each of the layer's groups is counted once for each of its heads
    assert (group - alone)[heads].sum() == pytest.approx(layer * generations.layout.group_size, rel=1e-3)


@pytest.mark.parametrize("heads", ["result", "z"])
def test_activation_gradient_is_the_slope_of_the_patch(drifted: Pair, heads: Any) -> None:
    task = _task(drifted, 6)
    pair = _double(drifted)
    modules = ["L0H1", "L1H4", "L2H5", "L3H7", "L1.mlp", "L3.mlp"]
    small, slopes = 1e-3, []
    for module in modules:
        ends = []
        for strength in (small, -small):
            with Patch([module], heads=heads, strength=strength).applied(pair):
                ends.append(_mean(pair, task))
        slopes.append((ends[0] - ends[1]) / (2 * small))
    found = scores(pair, task, "activation_gradient", ("head", "mlp"), heads=heads)[modules]
    np.testing.assert_allclose(found, slopes, rtol=5e-3, atol=5e-4)


def test_nothing_is_grafted_between_a_model_and_itself(generations: Pair, splits: Any) -> None:
    from mechtransplant.pair import make_pair

    same = make_pair(generations.target, generations.target)
    for rule in ("gradient", "activation_gradient", "weight_delta", "lae", "own", "distance", "own_over_inherited"):
        assert (scores(same, splits.discover, rule, ("head", "mlp")) == 0).all(), rule


def test_gradients_under_a_patch_are_refused(generations: Pair, splits: Any) -> None:
    with Patch(["L1.mlp"]).applied(generations), pytest.raises(UsageError, match="leave its block"):
        rank_modules(generations, splits.discover, "gradient")


# --- exact effects, and searches --------------------------------------------------------------------------------------


def test_single_swap_is_what_a_graft_of_one_module_gains(generations: Pair, splits: Any) -> None:
    found = scores(generations, splits.discover, "single_swap")
    base = gold_scores(generations.target, splits.discover)[1].mean()
    for module in ("L0.up_proj", "L2.o_proj"):
        with Graft([module]).applied(generations):
            gain = gold_scores(generations.target, splits.discover)[1].mean() - base
        assert found[module] == pytest.approx(gain, abs=1e-6)


def test_greedy_takes_the_best_next_module(generations: Pair, splits: Any) -> None:
    task = splits.choose
    order = list(rank_modules(generations, task, "greedy", "mlp").module)
    assert (
        order[0]
        == rank_modules(generations, splits.choose.subset(range(24), "discover"), "single_swap", "mlp").module[0]
    )
    for at in (1, 2):
        values = {}
        for module in set(generations.modules("mlp")) - set(order[:at]):
            with Graft([*order[:at], module]).applied(generations):
                values[module] = gold_scores(generations.target, task)[1].mean()
        assert max(values, key=lambda m: values[m]) == order[at]


def test_greedy_moves_keys_and_values_once_their_group_is_whole(generations: Pair, splits: Any) -> None:
    """The second head of a group brings K and V along: a search by single heads would never try that."""
    task = splits.choose.subset(range(8), "choose")
    heads = list(rank_modules(generations, task, "greedy", "head", kv="whole-group", stop=4).module[:4])
    for at in range(1, 4):
        values = {}
        for module in generations.modules("head"):
            if module not in heads[:at]:
                with Graft([*heads[:at], module], kv="whole-group").applied(generations):
                    values[module] = gold_scores(generations.target, task)[1].mean()
        assert max(values, key=lambda m: values[m]) == heads[at], at
    groups = [(h.split("H")[0], int(h.split("H")[1]) // 2) for h in heads]
    assert len(set(groups)) < len(groups), f"no group became whole, and nothing was tested: {heads}"


def test_a_pool_of_everything_is_plain_greedy(generations: Pair, splits: Any) -> None:
    plain, pooled = (
        list(rank_modules(generations, splits.choose, "greedy", "mlp", **o).module) for o in ({}, {"pool": 4})
    )
    assert plain == pooled
    stopped = list(rank_modules(generations, splits.choose, "greedy", "mlp", stop=2).module)
    assert stopped[:2] == plain[:2]


def test_searches_beat_training_free_rules_on_choose(generations: Pair, addition: Task) -> None:
    """At every K, by the log-probability that they maximise.

    A hundredth of a nat is let pass: greedy's sets are nested, and where everything is answered rightly (K = 20, all
    rules within 0.002 nats of the source) the last digits are another set's.
    """
    splits = addition.split(32, 32, 32)
    free = [r for r in REQUIRED if r not in ("greedy", "mask", "pruned", "bottom", "random_matched", *PATCHES)]
    rankings = {r: rank_modules(generations, splits.discover, r) for r in free}
    greedy = rank_modules(generations, splits.choose, "greedy")

    def worth(modules: Any) -> float:
        with Graft(list(modules)).applied(generations):
            return float(gold_scores(generations.target, splits.choose)[1].mean())

    for k in (2, 6, 12, 20):
        best = max(worth(r.module[:k]) for r in rankings.values())
        assert worth(greedy.module[:k]) >= best - 0.01, k
        mask = rank_modules(generations, splits.choose, "mask", k=k, steps=40)
        assert worth(mask.module[:k]) >= best - 0.01, k


def test_mask_refuses_more_than_there_are(generations: Pair, splits: Any) -> None:
    with pytest.raises(UsageError, match="k = 29 is above the 28 modules"):
        rank_modules(generations, splits.choose, "mask", k=29)


# --- shifts -----------------------------------------------------------------------------------------------------------


def test_shift_rules_are_means_of_their_measures(generations: Pair, splits: Any) -> None:
    task = splits.discover
    shifts = measure_shifts(generations, task, ("head", "mlp"), ("distance", "own", "inherited"), "answer")
    means = shifts.groupby(["measure", "module"], observed=True).value.mean()
    for rule in ("distance", "own"):
        found = scores(generations, task, rule, ("head", "mlp"))
        np.testing.assert_allclose(found, means[rule].reindex(found.index), rtol=1e-6)
    found = scores(generations, task, "own_over_inherited", ("head", "mlp"))
    own, inherited = (means[m].reindex(found.index) for m in ("own", "inherited"))
    np.testing.assert_allclose(found, own / (own + inherited), rtol=1e-6)
    assert found["L0.mlp"] < 1, "attention of the same layer comes before it"


def test_lae_of_a_linear_layer_is_the_same_by_both_paths(generations: Pair, splits: Any) -> None:
    """Teacher-forced: the paper's recorder for linear layers, and the shift recorder that other kinds use."""
    task = splits.discover
    for rule in ("lae", "lae_relative"):
        ours = scores(generations, task, rule, "linear", alignment="teacher-forced", text="gold")
        other = scores(generations, task, rule, ("linear", "mlp"), text="gold")
        np.testing.assert_allclose(ours, other.reindex(ours.index), rtol=1e-4)


def test_lae_relative_forgets_the_size_of_an_output(generations: Pair, splits: Any) -> None:
    shifts = measure_shifts(generations, splits.discover, ("mlp",), ("lae", "lae_relative", "magnitude"), "answer")
    wide = shifts.pivot_table(index=["module", "prompt"], columns="measure", values="value", observed=True)
    assert (wide.lae >= wide.magnitude.abs() - 1e-7).all()
    assert ((wide.lae_relative >= 0) & (wide.lae_relative <= 2)).all()


def test_significant_puts_small_p_first_and_then_large_effects(generations: Pair, splits: Any) -> None:
    task = splits.discover
    order = list(rank_modules(generations, task, "significant", "head", permutations=999).module)
    shifts = measure_shifts(generations, task, ("head",), ("magnitude",), "answer")
    table = shift_table(shifts, permutations=999).set_index("module").loc[order]
    pairs = list(zip(table.p_adjusted, -table.effect.abs(), strict=True))
    assert pairs == sorted(pairs)


# --- rules made of others ---------------------------------------------------------------------------------------------


def test_bottom_is_the_other_end(generations: Pair, splits: Any) -> None:
    order = list(rank_modules(generations, splits.discover, "own").module)
    assert list(rank_modules(generations, splits.discover, "bottom", of="own").module) == order[::-1]
    assert len(rank_modules(generations, None, "bottom", of="weight_delta")) == 28
    with pytest.raises(UsageError, match="needs gradients"):
        rank_modules(generations, None, "bottom", of="gradient")
    with pytest.raises(UsageError, match="itself made of another"):
        rank_modules(generations, splits.discover, "bottom", of="random_matched")


@pytest.mark.parametrize("k", [1, 5, 14, 23])
def test_random_matched_is_matched_at_every_k(generations: Pair, k: int) -> None:
    from collections import Counter

    from mechtransplant.ranking.matched import classes

    order = list(rank_modules(generations, None, "weight_delta").module)
    drawn = [list(rank_modules(generations, None, "random_matched", of="weight_delta", seed=s).module) for s in (0, 1)]
    group = classes(generations, order)
    assert drawn[0] != drawn[1] != order
    for one in drawn:
        assert Counter(group[m] for m in one[:k]) == Counter(group[m] for m in order[:k])


def test_depth_and_relative_weight_delta(generations: Pair) -> None:
    late, early = (rank_modules(generations, None, "depth", first=f) for f in ("late", "early"))
    assert list(late.layer) == sorted(late.layer, reverse=True) and list(early.layer) == sorted(early.layer)
    plain, relative = (scores(generations, None, "weight_delta", relative=r) for r in (False, True))
    size = {
        m: float(generations.target_parameters[f"{generations.layout.linears[m]}.weight"].norm()) for m in plain.index
    }
    np.testing.assert_allclose(relative, plain / pd.Series(size), rtol=1e-5)


# --- what was selected ------------------------------------------------------------------------------------------------


def test_nobody_reports_on_questions_that_selected(generations: Pair, addition: Task, tmp_path: Any) -> None:
    """Every way round that the public API offers: another seed, another name, a relabelled split, a copy, a patch."""
    from dataclasses import replace

    from mechtransplant.evaluation import compare
    from mechtransplant.grafting import ConditionalGraft
    from mechtransplant.patching import mean_shift

    splits = addition.split(32, 32, 64, seed=0)
    rank = rank_modules(generations, splits.discover, "own")
    relabelled = replace(splits.discover, role="test")
    whole = addition.subset(range(len(addition)))
    renamed = replace(relabelled, name="mine")
    overlapping = addition.split(32, 32, 600, seed=5).test

    def outcome(task: Task, applied: Any, model: Any = None) -> Any:
        before, best = evaluate(generations.target, task), evaluate(generations.source, task)
        if model is not None:
            return compare(before, best, evaluate(model, task))
        with applied.applied(generations):
            return compare(before, best, evaluate(generations.target, task))

    chosen = list(rank.module[:4])
    for modules in (
        rank.module[:4],
        chosen,
        rank.module.head(4).tolist(),
        [*rank.module[:3], "L3.up_proj"],
        rank.module[0],
    ):
        for task in (relabelled, renamed, overlapping):
            with pytest.raises(UsageError, match="selected the modules"):
                outcome(task, Graft(modules))
    with pytest.raises(UsageError, match="selected the modules"):
        outcome(whole, Graft(chosen))
    with pytest.raises(UsageError, match="selected the modules"):
        outcome(relabelled, None, Graft(chosen).copied(generations))
    with pytest.raises(UsageError, match="selected the modules"):
        outcome(relabelled, ConditionalGraft(Graft(chosen), "prompt"))
    heads = rank_modules(generations, splits.discover, "own", "head")
    with pytest.raises(UsageError, match="selected the modules"):
        outcome(relabelled, Patch(heads.module[:2]))
    with pytest.raises(UsageError, match="selected the modules"):
        outcome(relabelled, mean_shift(generations, splits.discover, ["L2.mlp"]))
    # questions on which K was chosen count as well, once a graft was tried on them
    elsewhere = replace(splits.choose, role="test")
    assert outcome(elsewhere, Graft(chosen)).n == 32
    with Graft(rank.module[:7]).applied(generations):
        evaluate(generations.target, splits.choose)
    with pytest.raises(UsageError, match="selected the modules"):
        outcome(elsewhere, Graft(chosen))
    for split in (splits.discover, splits.choose):
        with pytest.raises(UsageError, match="split, which served to select"):
            outcome(split, Graft(chosen))
    assert outcome(splits.test, Graft(chosen)).n == 64
    # the target itself was selected by nothing
    assert evaluate(generations.target, relabelled).selections == ()


def test_a_module_name_stays_a_string(generations: Pair, splits: Any, tmp_path: Any) -> None:
    import copy
    import json
    import pickle

    rank = rank_modules(generations, splits.discover, "own")
    name = rank.module[0]
    assert isinstance(name, str) and json.loads(json.dumps([name])) == [str(name)] and {str(name): 1}[name] == 1
    for twin in (copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        assert twin == name and twin.selection.questions == set(splits.discover.keys)
    rank.to_parquet(tmp_path / "rank.parquet")
    assert list(pd.read_parquet(tmp_path / "rank.parquet").module) == list(rank.module)
    assert (rank.merge(pd.DataFrame({"module": generations.modules("linear")})).module == rank.module).all()


def test_tables_of_shifts_remember_what_they_were_measured_on(generations: Pair, addition: Task) -> None:
    from mechtransplant.evaluation import compare
    from mechtransplant.localization import topk_stability
    from mechtransplant.patching import patch_versus_graft

    test = addition.split(8, 8, 24).test
    shifts = measure_shifts(generations, test, ("mlp",), ("magnitude", "own"))
    chosen = [
        shift_table(shifts, measure="magnitude", permutations=99).module[:2],
        topk_stability(shifts[shifts.measure == "own"], 2, resamples=50).frequency.module[:2],
        patch_versus_graft(generations, test, ["L1.mlp", "L2.mlp"], resamples=50).module,
    ]
    for modules in chosen:
        with Graft(modules).applied(generations):
            after = evaluate(generations.target, test)
        with pytest.raises(UsageError, match="selected the modules"):
            compare(evaluate(generations.target, test), evaluate(generations.source, test), after)


def test_a_graft_of_a_rankings_first_k_is_recognised_by_plain_names(generations: Pair, addition: Task) -> None:
    from dataclasses import replace

    from mechtransplant.evaluation import compare

    splits = addition.split(24, 8, 40, seed=3)
    rank = rank_modules(generations, splits.discover, "own")
    plain = sorted({str(m) for m in rank.module[:9]})
    relabelled = replace(splits.discover, role="test")
    both = [evaluate(m, relabelled) for m in (generations.target, generations.source)]
    with Graft(plain).applied(generations), pytest.raises(UsageError, match="selected the modules"):
        compare(*both, evaluate(generations.target, relabelled))
    # another set of the same size is somebody's own choice
    other = [*plain[1:], str(rank.module[20])]
    with Graft(other).applied(generations):
        assert compare(*both, evaluate(generations.target, relabelled)).n == 24
    # what no question selected may be reported on any
    with Graft(rank_modules(generations, None, "weight_delta").module[:9]).applied(generations):
        assert compare(*both, evaluate(generations.target, relabelled)).n == 24


def test_grafts_that_were_tried_on_the_reporting_questions_are_counted(generations: Pair, splits: Any) -> None:
    from mechtransplant.evaluation import compare

    rank = rank_modules(generations, splits.discover, "own", "mlp")
    before, best = evaluate(generations.target, splits.test), evaluate(generations.source, splits.test)
    for k, said in ((1, False), (1, False), (2, True)):
        with Graft(rank.module[:k]).applied(generations):
            notes = " ".join(compare(before, best, evaluate(generations.target, splits.test)).notes)
        assert ("2 grafts of this ranking were evaluated on these questions" in notes) == said


def test_controls_are_no_grafts_that_were_tried(generations: Pair, addition: Task) -> None:
    from mechtransplant.controls import graft_with_controls

    splits = addition.split(discover=16, choose=8, test=24, seed=4)
    rank = rank_modules(generations, splits.discover, "own", "mlp")
    other = rank_modules(generations, load_task("sort").split(discover=16, choose=8, test=8).discover, "own", "mlp")
    for k, said in ((1, False), (1, False), (2, True)):
        report = graft_with_controls(generations, rank, k, splits.test, unrelated=other, random_sets=3)
        notes = " ".join(report.outcome.notes)
        assert ("2 grafts of this ranking were evaluated on these questions" in notes) == said
        assert said or "were evaluated" not in notes


def test_gradients_that_were_there_are_left_alone(generations: Pair, splits: Any) -> None:
    clean = scores(generations, splits.discover, "gradient")
    parameters = dict(generations.target.hf.named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    parameters[name].requires_grad_(True)
    parameters[name].grad = torch.ones_like(parameters[name])
    try:
        np.testing.assert_array_equal(scores(generations, splits.discover, "gradient"), clean)
        assert parameters[name].requires_grad and (parameters[name].grad == 1).all()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(WeightChanges, "products", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            rank_modules(generations, splits.discover, "gradient")
        assert (parameters[name].grad == 1).all()
    finally:
        parameters[name].grad = None
        parameters[name].requires_grad_(False)
    assert all(p.grad is None and not p.requires_grad for p in parameters.values())
    np.testing.assert_array_equal(scores(generations, splits.discover, "gradient"), clean)


def test_rules_made_of_others_have_their_options_splits_and_checks(generations: Pair, splits: Any) -> None:
    group = list(rank_modules(generations, splits.discover, "gradient", "head", kv="group").module)
    assert (
        list(rank_modules(generations, splits.discover, "bottom", "head", of="gradient", kv="group").module)
        == group[::-1]
    )
    searched = rank_modules(generations, splits.choose, "bottom", "mlp", of="greedy")
    assert list(searched.module)[::-1] == list(rank_modules(generations, splits.choose, "greedy", "mlp").module)
    with pytest.raises(UsageError, match="unknown option of rule 'own' 'pool'"):
        rank_modules(generations, splits.discover, "bottom", of="own", pool=3)
    with pytest.raises(UsageError, match="unknown rule 'nonsense'"):
        rank_modules(generations, splits.discover, "bottom", of="nonsense")


def test_kinds_and_options_that_make_no_sense(generations: Pair, splits: Any) -> None:
    assert len(rank_modules(generations, None, "weight_delta", ["head", "head"])) == 32
    with pytest.raises(UsageError, match="name the same weights twice"):
        rank_modules(generations, None, "weight_delta", ["linear", "part"])
    with pytest.raises(UsageError, match="unknown alignment 'bogus'"):
        rank_modules(generations, splits.discover, "lae", "head", alignment="bogus")
    with pytest.raises(UsageError, match="add alignment='teacher-forced'"):
        rank_modules(generations, splits.discover, "lae", text="gold")
    with pytest.raises(UsageError, match="a rule named 'lae' exists already"):
        register_rule("lae")


# --- continuous outcomes ----------------------------------------------------------------------------------------------


def test_logit_difference_is_accuracy_made_continuous(generations: Pair, splits: Any) -> None:
    for model in (generations.source, generations.target):
        found = gold_outcomes(model, splits.test)
        assert ((found.logit_difference > 0) == found.correct).all()
        assert (found.correct.any() and not found.correct.all()) or model is generations.source
        one = gold_outcomes(model, splits.test.subset([3]), padding_side="right")
        assert one.logit_difference[0] == pytest.approx(found.logit_difference[3], abs=1e-3)


def test_logit_difference_by_hand(generations: Pair, splits: Any) -> None:
    model, task = generations.target, splits.test.subset([0])
    ids = model.tokenizer(task.prompts()[0] + task.completions()[0], return_tensors="pt", add_special_tokens=True)
    tokens = torch.cat([ids["input_ids"], torch.tensor([[model.tokenizer.eos_token_id]])], 1)
    answer = len(model.tokenizer(task.completions()[0], add_special_tokens=False)["input_ids"]) + 1
    with torch.no_grad():
        logits = model.hf(tokens).logits[0, -answer - 1 : -1]
    gold = tokens[0, -answer:]
    margins = []
    for at, token in zip(logits, gold, strict=True):
        others = at.clone()
        others[token] = -torch.inf
        margins.append(float(at[token] - others.max()))
    assert gold_outcomes(model, task).logit_difference[0] == pytest.approx(min(margins), abs=1e-3)


def test_generated_answers_have_continuous_outcomes_too(instruct: Pair) -> None:
    from mechtransplant.tasks import load_task

    task = load_task("boxed", 12)
    found = evaluate(instruct.source, task)
    assert found.method == "generate" and found.log_probability is not None and found.logit_difference is not None
    np.testing.assert_allclose(found.log_probability, gold_scores(instruct.source, task)[1])
    assert evaluate(instruct.source, task, gold=False).log_probability is None


@pytest.mark.parametrize(
    ("first_order", "of_one", "screened", "most"),
    # patches of the first layers are far from linear: more of them have to be tried
    [
        ("gradient", "single_swap", "screened_swap", 1 / 2),
        ("activation_gradient", "single_patch", "screened_patch", 2 / 3),
    ],
)
def test_a_screen_is_confirmed_from_above(
    first_order: str, of_one: str, screened: str, most: float, drifted: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechtransplant.ranking import patches, swaps

    task, kinds = load_task("addition").split(32, 8, 8).discover, ("head", "mlp")
    tried: list[str] = []
    made: Any = swaps if of_one == "single_swap" else patches
    gains = made._gains

    def counted(pair: Pair, task: Task, modules: Any, *more: Any) -> Any:
        tried.extend(modules)
        return gains(pair, task, modules, *more)

    first, exact = (scores(drifted, task, r, kinds) for r in (first_order, of_one))
    monkeypatch.setattr(made, "_gains", counted)
    found = scores(drifted, task, screened, kinds, confirm=6)
    # each once, and few
    assert 6 <= len(tried) == len(set(tried)) < len(exact) * most
    others = [m for m in found.index if m not in tried]
    np.testing.assert_allclose(found[tried], exact[tried], atol=1e-4)
    np.testing.assert_allclose(found[others], first[others], atol=1e-6)
    # none of the highest is an approximation
    assert set(found.sort_values(ascending=False).index[:6]) <= set(tried)
    assert found.idxmax() == exact.idxmax()
    whole = scores(drifted, task, screened, kinds, confirm=len(exact))
    np.testing.assert_allclose(whole, exact, atol=1e-4)


@pytest.mark.parametrize("heads", ["result", "z"])
def test_single_patch_is_what_a_patch_of_one_module_gains(drifted: Pair, heads: Any) -> None:
    task = _task(drifted, 12)
    found = scores(drifted, task, "single_patch", ("head", "mlp", "attn"), heads=heads)
    before = _mean(drifted, task)
    for module in ("L0H1", "L3H6", "L2.mlp", "L1.attn"):
        with Patch([module], heads=heads).applied(drifted):
            assert found[module] == pytest.approx(_mean(drifted, task) - before, abs=1e-4), module


def test_rules_of_patches_have_no_linear_layers(generations: Pair, splits: Any) -> None:
    for rule in PATCHES:
        with pytest.raises(UsageError, match="scores kind head, neuron, mlp or attn, not 'linear'"):
            rank_modules(generations, splits.discover, rule, "linear")


def test_gradient_against_single_swap(drifted: Pair) -> None:
    """To first order and exactly: the same order for most modules (benchmarks/README.md has the numbers)."""
    task = _task(drifted, 32)
    first, exact = (scores(drifted, task, r, ("head", "mlp")) for r in ("gradient", "single_swap"))
    assert stats.spearmanr(first, exact).statistic > 0.6


def test_rules_that_need_answers_refuse_empty_ones(generations: Pair) -> None:
    discover = load_task("addition").split(6, 1, 1).discover
    blank = replace(discover, examples=(replace(discover.examples[0], answer=" "), *discover.examples[1:]))
    for rule in ("gradient", "single_swap"):
        with pytest.raises(TaskError, match="has an empty answer"):
            rank_modules(generations, blank, rule)


def test_an_error_in_a_users_rule_names_the_rule(generations: Pair) -> None:
    @register_rule("broken-rule", needs="nothing")
    def broken(pair: Any, task: Any, kind: Any, **options: Any) -> list[float]:
        raise ZeroDivisionError("mine")

    try:
        with pytest.raises(ZeroDivisionError) as caught:
            rank_modules(generations, None, "broken-rule")
    finally:
        RULES.pop("broken-rule")
    assert caught.value.__notes__ == ["raised by the rule 'broken-rule'"]
