"""A gate is open for a task's questions and for nothing else, and a graft behind it acts there alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mechtransplant.errors import UsageError
from mechtransplant.evaluation import evaluate
from mechtransplant.grafting import ConditionalGraft, Gate, Graft, fit_gate
from mechtransplant.grafting.gate import residual_means
from mechtransplant.pair import Pair
from mechtransplant.side_effects import measure_side_effects, neutral_texts
from mechtransplant.tasks import Splits, Task, load_task

MODULES = ["L0", "L1.mlp", "L2H3"]


@pytest.fixture(scope="module")
def splits(addition: Task) -> Splits:
    return addition.split(32, 8, 64)


@pytest.fixture(scope="module")
def gate(generations: Pair, splits: Splits) -> Gate:
    others = [load_task(name).split(32, 8, 64).discover for name in ("reverse", "sort")]
    texts = neutral_texts(generations.target, 32, 16, seed=1)
    return fit_gate(generations.target, splits.discover, [*others, texts])


def test_it_is_open_for_the_task_and_closed_elsewhere(generations: Pair, splits: Splits) -> None:
    # without neutral texts, which this small model fills with sums
    others = [load_task(name).split(32, 8, 64).discover for name in ("reverse", "sort")]
    gate = fit_gate(generations.target, splits.discover, others)
    assert gate.share(splits.test) >= 0.95
    for name in ("reverse", "sort"):
        assert gate.share(load_task(name).split(32, 8, 64).test) <= 0.05
    # what it was not fitted against it may take for the task
    assert gate.share(load_task("max").split(32, 8, 64).test) > 0.5
    # one at a time as in batches, and as in the definition
    one = [gate(example) for example in splits.test.examples[:8]]
    rows = [generations.target.tokenizer(e.question)["input_ids"] for e in splits.test.examples]
    assert one == list(gate.opens(rows)[:8])
    whole = residual_means(generations.target, rows, gate.layer)
    np.testing.assert_allclose(whole, residual_means(generations.target, rows, gate.layer, 5), atol=1e-4)


def test_a_graft_behind_it(unchanged: Pair, splits: Splits, gate: Gate) -> None:
    pair = unchanged
    # with the centre among these questions it is open for some of them
    rows = [pair.target.tokenizer(e.question)["input_ids"] for e in splits.test.examples]
    centre = residual_means(pair.target, rows, gate.layer).mean(0)
    fresh = Gate(pair.target, gate.layer, gate.direction, centre)
    plain = evaluate(pair.target, splits.test)
    with Graft(MODULES).applied(pair):
        grafted = evaluate(pair.target, splits.test)
    with ConditionalGraft(Graft(MODULES), accepts=fresh).applied(pair):
        behind = evaluate(pair.target, splits.test)
    # it read the questions while the graft was not in place
    open_for = Gate(pair.target, gate.layer, gate.direction, centre).opens(rows)
    assert [fresh.known[e.key] for e in splits.test.examples] == list(open_for)
    assert open_for.any() and not open_for.all()
    assert (behind.correct == np.where(open_for, grafted.correct, plain.correct)).all()
    np.testing.assert_allclose(
        behind.log_probability, np.where(open_for, grafted.log_probability, plain.log_probability), atol=1e-3
    )


def test_it_does_not_read_a_grafted_target(unchanged: Pair, splits: Splits) -> None:
    pair, other = unchanged, load_task("sort").split(32, 8, 64)
    gate = fit_gate(pair.target, splits.discover, [other.discover])
    questions = splits.test.examples + other.test.examples
    right = list(gate.opens([pair.target.tokenizer(e.question)["input_ids"] for e in questions]))
    plain, behind = Graft(["L0", "L1"]), ConditionalGraft(Graft(["L3.mlp"]), accepts=gate)
    with plain.applied(pair):
        with behind.applied(pair), pytest.raises(UsageError, match=r"reads the target as it is.*gate\.read"):
            evaluate(pair.target, splits.test)
        with pytest.raises(UsageError, match="reads the target as it is"):
            fit_gate(pair.target, splits.discover, [other.discover])
    assert gate.known == {}
    # behind another conditional graft, which is off meanwhile, and inside of a plain one what it knows already
    with ConditionalGraft(plain, accepts=lambda e: True).applied(pair):
        evaluate(pair.target, splits.test)
        gate.read(questions)
    with plain.applied(pair), behind.applied(pair):
        evaluate(pair.target, splits.test)
    assert [gate(e) for e in questions] == right


def test_side_effects_behind_it(unchanged: Pair, gate: Gate) -> None:
    pair = unchanged
    reverse = load_task("reverse").split(32, 8, 64).test
    text = neutral_texts(pair.target, 24, 16, seed=2)
    plain = measure_side_effects(pair, Graft(MODULES), tasks=[reverse], text=text)
    behind = measure_side_effects(pair, ConditionalGraft(Graft(MODULES), accepts=gate), tasks=[reverse], text=text)
    open_for = gate.opens(text.rows(pair.target))
    # what was decided for these texts is known, also where they cannot be read; in another order, and one twice
    order = [3, 0, 3, 7]
    some = [text.rows(pair.target)[i] for i in order]
    with Graft(MODULES).applied(pair):
        np.testing.assert_array_equal(gate.opens_for_texts(some), open_for[order])
        with pytest.raises(UsageError, match="reads the target as it is"):
            gate.opens(some)
    assert plain.divergence is not None and behind.divergence is not None
    np.testing.assert_array_equal(behind.divergence.kl, np.where(open_for, plain.divergence.kl, 0))
    np.testing.assert_array_equal(behind.divergence.before, plain.divergence.before)
    assert behind.kl is not None and plain.kl is not None and behind.kl < 0.2 * plain.kl
    assert f"open for {open_for.sum()} of 24 texts" in " ".join(behind.notes)
    before, after = behind.evaluations["reverse"]
    assert not any(gate(e) for e in reverse.examples) and (before.correct == after.correct).all()
    with pytest.raises(UsageError, match="text=False"):
        measure_side_effects(pair, ConditionalGraft(Graft(MODULES), "prompt", gate), tasks=[reverse], text=text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"others": []}, "give other tasks or neutral texts"),
        ({"layer": 4}, "no layer 4 .* from 0 to 3"),
        ({"task": "alike"}, "all these questions are alike"),
        ({"others": ["reverse"]}, "reads tasks and neutral texts, got str"),
        ({"task": "one"}, "at least two"),
    ],
)
def test_what_is_refused(generations: Pair, splits: Splits, changes: dict[str, Any], message: str) -> None:
    if changes.get("task") == "one":
        changes = {"task": splits.discover.subset([0])}
    if changes.get("task") == "alike":
        changes = {"task": splits.discover.subset([0, 0]), "others": [splits.test.subset([0, 0])]}
    given: dict[str, Any] = {"task": splits.discover, "others": [load_task("sort").split(8, 8, 8).discover], **changes}
    with pytest.raises(UsageError, match=message):
        fit_gate(generations.target, **given)
