"""The same identities on a real pretrained model: SmolLM2-135M, fetched from its Python package, adapters merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechtransplant.activations import cache_activations, decoding_magnitudes, forced_magnitudes
from mechtransplant.evaluation import evaluate, generate, gold_scores
from mechtransplant.evaluation.batches import encode
from mechtransplant.evaluation.gold import stopping_tokens
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair, make_pair
from mechtransplant.patching import Patch
from mechtransplant.shifts import measure_shifts
from mechtransplant.tasks import Example, PromptFormat, Task, load_task

pytestmark = pytest.mark.needs_smollm2


@pytest.fixture(scope="module")
def pair(smollm2: Pair) -> Iterator[Pair]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield smollm2
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few_shot() -> Task:
    return load_task("arithmetic-few-shot").split(4, 4, 10).test


@pytest.fixture(scope="module")
def short() -> Task:
    """A sum, a difference and a word problem: 39, 40 and 54 tokens."""
    return load_task("arithmetic", 3)


def test_the_whole_fine_tune_lies_in_the_linear_layers(pair: Pair) -> None:
    assert pair.compatibility.stays == [] and pair.compatibility.forbidden == []
    assert len(pair.modules("linear")) == 210 and len(pair.modules("head")) == 270
    assert (pair.compatibility.shapes.relative_change > 0).all()


def test_batched_equals_one_by_one_to_the_token(pair: Pair, few_shot: Task) -> None:
    # a word problem after worked examples and a bare sum differ in length, so rows are padded
    assert len({len(p) for p in encode(few_shot, pair.target.tokenizer).prompts}) > 3
    single = [generate(pair.target, few_shot.subset([i]), 12, 1)[0] for i in range(len(few_shot))]
    assert generate(pair.target, few_shot, 12, 10) == single
    assert generate(pair.target, few_shot, 12, 4) == single


def test_padding_sides_and_prefix_agree(pair: Pair, few_shot: Task) -> None:
    left = gold_scores(pair.source, few_shot, 10)
    for other in (
        gold_scores(pair.source, few_shot, 3, "right", share_prefix=False),
        gold_scores(pair.source, few_shot, 10, "right"),
    ):
        assert (other[0] == left[0]).all()
        np.testing.assert_allclose(other[1], left[1], atol=1e-3)


def test_one_forward_decides_what_generation_would_write(pair: Pair, few_shot: Task) -> None:
    short = replace(few_shot, scorer="exact", short_answer=True)
    forced, written = evaluate(pair.source, short), evaluate(pair.source, short, "generate")
    assert (forced.correct == written.correct).all() and 0 < forced.accuracy < 1


def test_one_forward_decides_short_answers_that_end_with_the_line(pair: Pair) -> None:
    shown = tuple((f"{a} + {b} =", f" {a + b}") for a, b in ((21, 34), (45, 12), (33, 27), (52, 25), (41, 38)))
    asked = tuple(Example(f"{a} + {b} =", str(a + b)) for a in (22, 37, 48, 51) for b in (23, 31, 36, 40))
    form = PromptFormat(question="{question}", completion=" {answer}", shots=shown, shot_separator="\n")
    task = Task("lines", asked, format=form, short_answer=True, stop=("\n",))
    for model in (pair.source, pair.target):
        forced, written = evaluate(model, task), evaluate(model, task, "generate")
        assert forced.method == "teacher-forced" and (forced.correct == written.correct).all()
        # without the stop the base model goes on with the next sum
        assert forced.correct.any() and not evaluate(model, replace(task, stop=())).correct.any()
    lines = set(stopping_tokens(pair.target.tokenizer, ("\n",)))
    texts = {token: pair.target.tokenizer.decode([token]) for token in lines}
    assert lines and all("\n" in text and not text.split("\n")[0].strip() for text in texts.values())


def test_magnitudes_of_a_text_do_not_depend_on_who_decodes_it(pair: Pair, few_shot: Task) -> None:
    task = few_shot.subset([0, 1, 2])
    own, generations = decoding_magnitudes(pair.source, task, 6)
    forced = forced_magnitudes(pair.source, task, [list(g.tokens) for g in generations])
    np.testing.assert_allclose(own[:, :, : forced.shape[2]], forced, atol=1e-4)


def test_graft_of_everything_is_the_source_and_undo_restores_every_byte(pair: Pair) -> None:
    before = pair.target.fingerprint
    with Graft(pair.modules("linear")).applied(pair):
        assert pair.target.fingerprint == pair.source.fingerprint
    assert pair.target.fingerprint == before


def test_bridge_gives_the_models_logits(pair: Pair) -> None:
    ids = torch.tensor([pair.target.tokenizer("What is 47 + 85?")["input_ids"]])
    torch.testing.assert_close(pair.target.bridge(ids), pair.target.hf(ids).logits, atol=1e-2, rtol=1e-3)


def test_streamed_shifts_equal_explicit_head_writes(pair: Pair, short: Task) -> None:
    task = short.subset([0, 1])
    shifts = measure_shifts(pair, task, measures=("magnitude", "distance", "own", "inherited"), positions="answer")
    indexed = shifts.set_index(["measure", "module", "prompt"]).value
    hooks = ("blocks.17.attn.hook_result", "blocks.17.hook_mlp_out")
    source, target = (cache_activations(m, task, hooks, "answer") for m in (pair.source, pair.target))
    for prompt in range(2):
        heads, mlp = ([c.prompt(prompt, h).double() for c in (source, target)] for h in hooks)
        for module, a_s, a_t in [
            *[(f"L17H{h}", heads[0][:, h], heads[1][:, h]) for h in range(9)],
            ("L17.mlp", *mlp),
        ]:
            scale = (a_s.norm(dim=-1) + a_t.norm(dim=-1)) / 2
            distance = ((a_s - a_t).norm(dim=-1) / scale).mean()
            magnitude = (a_s.abs().mean(-1) - a_t.abs().mean(-1)).mean()
            assert indexed["distance", module, prompt] == pytest.approx(float(distance), abs=1e-5)
            assert indexed["magnitude", module, prompt] == pytest.approx(float(magnitude), abs=1e-5)
    wide = shifts.pivot(index=["module", "prompt"], columns="measure", values="value")
    assert (wide.distance <= wide.own + wide.inherited + 1e-5).all() and (wide.own > 0).all()


def test_batches_and_padding_do_not_change_shifts(pair: Pair, short: Task) -> None:
    task = short.subset([0, 1, 2])
    one = measure_shifts(pair, task, positions="last", batch_size=1)
    for side in ("left", "right"):
        other = measure_shifts(pair, task, positions="last", batch_size=3, padding_side=side)  # type: ignore[arg-type]
        np.testing.assert_allclose(other.value, one.value, atol=1e-5)


def test_a_self_patch_is_the_identity_to_the_bit(pair: Pair, short: Task) -> None:
    own, one = make_pair(pair.target, pair.target, "self"), short.subset([0])
    modules = ["L3H1", "L17H8", "L20.mlp", "L9.attn", "L12.resid_pre", "L29"]
    plain = gold_scores(pair.target, one)[1]
    for heads in ("z", "result"):
        with Patch(modules, heads=heads).applied(own):  # type: ignore[arg-type]
            assert np.array_equal(gold_scores(pair.target, one)[1], plain)


def test_a_patch_in_generation_equals_whole_passes_without_the_cache(pair: Pair, short: Task) -> None:
    patch = Patch(["L3H1", "L17H8", "L20.mlp", "L25.attn"])
    prompt = encode(short, pair.target.tokenizer).prompts[0]
    one = short.subset([0])
    plain = gold_scores(pair.target, one)[1]
    with patch.applied(pair):
        written = generate(pair.target, one, 4)[0]
        ids = list(prompt)
        for token in written.tokens:
            with torch.no_grad():
                step = pair.target.hf(torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert int(step.argmax()) == token
            ids.append(token)
        patched = gold_scores(pair.target, one)[1]
    assert len(written.tokens) > 1 and abs(patched - plain).max() > 0.01


def test_a_head_with_its_group_moves_just_those_rows(pair: Pair) -> None:
    kept = {n: p.clone() for n, p in pair.target.hf.named_parameters() if ".layers.5.self_attn." in n}
    graft = Graft(["L5H4"], kv="group")
    assert graft.consequences(pair) == ["L5: moves K/V of heads 3–5, read by heads 3, 5 outside the graft as well"]
    with graft.applied(pair):
        for name, old in kept.items():
            new, source = pair.target_parameters[name], pair.source_parameters[name]
            expected = old.clone()
            rows = slice(4 * 64, 5 * 64) if "q_proj" in name else slice(64, 128)
            if "o_proj" in name:
                expected[:, 4 * 64 : 5 * 64] = source[:, 4 * 64 : 5 * 64]
            else:
                expected[rows] = source[rows]
            assert torch.equal(new, expected)
