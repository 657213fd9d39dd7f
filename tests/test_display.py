"""What notebooks show: every object as a table that says what its words say, and names that are no markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
from test_report import Page

import mechtransplant as mt
from mechtransplant.display import html_table
from mechtransplant.evaluation import compare, evaluate
from mechtransplant.pair import Pair
from mechtransplant.tasks import Example, Task


def shown(thing: Any) -> str:
    """The text of what a notebook shows; raises AssertionError for elements that are not closed in turn."""
    markup = thing._repr_html_()
    assert "<table>" in markup and "\x00" not in markup
    Page(markup)
    return unescape(re.sub(r"<[^>]+>", " ", markup))


def test_names_are_text() -> None:
    markup = html_table([("<b>x</b>", "a & b", None)], ("", "<i>", "y"), "<script>", ["<img>"])
    assert not re.findall(r"<(b|i|script|img)>", markup) and "a &amp; b" in markup and "–" in markup


def test_a_pair_and_its_models(generations: Pair, instruct: Pair) -> None:
    text = shown(generations)
    for word in (generations.source.name, generations.target.name, "LlamaForCausalLM", "32 heads, 4 MLPs, 28 linear"):
        assert word in text
    assert all(f"Stays the target's: {what}" in text for what in generations.compatibility.stays)
    assert generations.source.name in shown(generations.source) and "heads a layer" in shown(generations.source)
    checks = shown(generations.compatibility)
    assert all(str(row.what) in checks for row in generations.compatibility.checks.itertuples())
    assert "28 linear layers of equal name and shape" in checks
    assert "Planted" not in text and "Planted: " in shown(mt.load_pair("family/planted-heads"))


def test_a_graft_by_layer() -> None:
    text = shown(mt.Graft(["L3.mlp", "L0H2", "L3H1", "L12.q_proj"]))
    assert re.search(r"layer 0\s+L0H2\s+layer 3\s+L3.mlp, L3H1\s+layer 12", text) and "Strength 1 (replacement)" in text
    assert "outside of the layers" in shown(mt.Graft(["embed_tokens", "L0H1"]))
    assert "L0H1 (0.5)" in shown(mt.Graft(["L0H1", "L0H2"], [0.5, 1.0])) and "Graft of 0 modules" in shown(mt.Graft([]))


def test_a_task_and_an_evaluation(generations: Pair) -> None:
    task = mt.load_task("addition").split(4, 4, 12).test
    assert task.examples[0].question in shown(task) and "12 questions (test)" in shown(task)
    odd = Task("odd", (Example("is 1 < 2 & 3 > 2?", "<yes>"),))
    assert "is 1 < 2 & 3 > 2?" in shown(odd) and "<yes>" not in odd._repr_html_()
    found = evaluate(generations.target, task)
    text = shown(found)
    assert f"{int(found.correct.sum())} of 12 right" in text and f"{100 * found.interval[1]:.1f}" in text


def test_an_outcome_says_what_is_undefined() -> None:
    # of its own: on a pair that tests share others may have selected
    generations = mt.load_pair("family/generations")
    task = mt.load_task("addition").split(8, 8, 64).test
    target, source = evaluate(generations.target, task), evaluate(generations.source, task)
    with mt.Graft(generations.modules("linear")).applied(generations):
        after = evaluate(generations.target, task)
    outcome = compare(target, source, after)
    text = shown(outcome)
    assert f"{outcome.tir:.2f} [" in text and f"{outcome.recovery:.0f} % [" in text and "no random control" in text
    assert "exact McNemar p = " in text and "nats [" in text and f"n = {outcome.n}" in text
    nothing = replace(
        outcome, tir=None, tir_interval=None, recovery=None, recovery_interval=None, notes=("why: x < y",)
    )
    text = shown(nothing)
    assert "undefined" in text and "withheld" in text and "why: x < y" in text
    assert "-0 %" not in shown(replace(outcome, recovery=-0.0)) and "0 % [" in shown(replace(outcome, recovery=-0.0))
    assert "∞" in shown(replace(outcome, tir_interval=(1.2, float("inf"))))


@pytest.mark.parametrize("cells", [0, 3])
def test_rows_may_have_any_number_of_cells(cells: int) -> None:
    assert html_table([("a", *range(cells))]).count("<td") == cells
