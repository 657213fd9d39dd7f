"""Short answers and a K-sweep with random controls, beside what one writes without a library.

    python benchmarks/answers.py [--pair smollm2/generations] [--repeats 7] [--random 100] [--out benchmarks/results]

The other side is Hugging Face's ``generate`` (greedy, left-padded batches of the same size and order, the same token
budget), decoded and scored, and for the sweep the loop over all cells: copy the set's weights, generate, score, put
the weights back. Float32, two threads; rows are interleaved in one process; every repeat is added to the CSV file.

Short answers are sums, eight prompts of 64 tokens, right where the whole text is the answer: once after worked
examples, which all prompts share, up to the end of the line, and once as sums of many numbers that share nothing;
budget 16 tokens (a task's default). The sweep asks the former. In ``sweep_stops.csv`` ours is beside the loop that also
gives ``generate`` the stop strings (it stops where every row has ended). Verdicts are also compared on 128 questions
of the pair's own, of which target, graft and source have different shares right: untimed, in ``verdicts.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sweeps import TOKENS, sums
from tables import in_turns, save

from mechtransplant.controls import random_matched
from mechtransplant.evaluation import evaluate
from mechtransplant.evaluation.batches import encode, length_sorted, pad
from mechtransplant.evaluation.generation import end_tokens
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair, load_pair
from mechtransplant.ranking import rank_modules
from mechtransplant.tasks import Example, PromptFormat, Task, load_task

ROOT = Path(__file__).resolve().parent.parent
BATCH, KS, RANDOM, BUDGET = 16, (4, 8, 16, 32), 100, 16
PARTS = ("verdicts", "stops", "answers")


def worked(pair: Pair, questions: int = 8) -> Task:
    """Sums of two numbers after as many worked examples as fill the tokens."""
    rng = np.random.default_rng(1)
    numbers = rng.permutation([(a, b) for a in range(20, 60) for b in range(20, 40)])
    pairs = [(f"{a} + {b} =", str(a + b)) for a, b in numbers.tolist()]
    for shots in range(1, 40):
        shown = tuple((q, f" {a}") for q, a in pairs[:shots])
        task = replace(
            load_task("addition"),
            name="worked sums",
            examples=tuple(Example(q, a) for q, a in pairs[40 : 40 + questions]),
            format=PromptFormat(question="{question}", completion=" {answer}", shots=shown, shot_separator="\n"),
            stop=("\n",),
            role="test",
        )
        if max(map(len, encode(task, pair.target.tokenizer).prompts)) >= TOKENS - 4:
            return task
    raise SystemExit("this tokenizer makes too few tokens of the examples")


class HuggingFace:
    """What one writes with transformers alone; ``stops``: with the task's stop strings given to ``generate``."""

    def __init__(self, pair: Pair, task: Task, budget: int, stops: bool = False) -> None:
        self.stops: dict[str, Any] = (
            {"stop_strings": list(task.stop), "tokenizer": pair.target.tokenizer} if stops else {}
        )
        self.hf, self.tokenizer, self.task, self.budget = pair.target.hf, pair.target.tokenizer, task, budget
        self.prompts = encode(task, self.tokenizer).prompts
        self.ends = end_tokens(pair.target)

    def written(self) -> list[list[int]]:
        """The tokens of every question, with those after its end."""
        texts: list[list[int]] = [[]] * len(self.prompts)
        for rows in length_sorted([len(p) for p in self.prompts], BATCH):
            ids, mask = pad([self.prompts[i] for i in rows], self.ends[0], "left")
            with torch.no_grad():
                new = self.hf.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=self.budget,
                    eos_token_id=self.ends, pad_token_id=self.ends[0], **self.stops,
                )[:, ids.shape[1] :]  # fmt: skip
            for row, tokens in zip(rows, new.tolist(), strict=True):
                texts[row] = tokens
        return texts

    def verdicts(self) -> np.ndarray:
        """Whether every answer is right, end of the text included."""
        found = []
        for tokens, example in zip(self.written(), self.task.examples, strict=True):
            ended = next((i for i, t in enumerate(tokens) if t in self.ends), None)
            text = self.tokenizer.decode(tokens[:ended], skip_special_tokens=True)
            line, stop, _ = text.partition("\n") if self.task.stop else (text, "", "")
            found.append((ended is not None or bool(stop)) and self.task.score(line, example.answer))
        return np.array(found)


def naive(pair: Pair, theirs: HuggingFace, sets: Sequence[Sequence[str]]) -> np.ndarray:
    """One accuracy a set, by the loop that needs no library but the graft's meaning."""
    parameters, found = dict(pair.target.hf.named_parameters()), []
    source = dict(pair.source.hf.named_parameters())
    for modules in sets:
        kept = {}
        for region in Graft(modules).regions(pair):
            name = region.parameter
            kept.setdefault(name, parameters[name].clone())
            region.of(parameters[name]).copy_(region.of(source[name]))
        found.append(theirs.verdicts().mean())
        for name, before in kept.items():
            parameters[name].copy_(before)
    return np.array(found)


def verdicts(pair: Pair, modules: Sequence[str], path: Path, questions: int = 128) -> None:
    """Not timed: every verdict on the pair's own questions, by one forward and by ``generate``; kept in ``path``."""
    if path.exists():
        return
    task = load_task(str(pair.default_task)).split(16, 8, questions).test
    rows = []
    for what, model, graft in (
        ("target", pair.target, None),
        (f"target with {len(modules)} layers grafted", pair.target, Graft(modules)),
        ("source", pair.source, None),
    ):
        with nullcontext() if graft is None else graft.applied(pair):
            ours = evaluate(model, task, batch_size=BATCH)
            theirs = HuggingFace(pair, task, task.max_new_tokens)
            theirs.hf = model.hf
            different = int((ours.correct != theirs.verdicts()).sum())
        rows.append({"pair": pair.name, "model": what, "questions": len(task), "accuracy": ours.accuracy})
        rows[-1] |= {"different": different}
        print(rows[-1], flush=True)
    save(pd.DataFrame(rows), path, "%.5g")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2/generations")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--random", type=int, default=RANDOM, help="random sets in the sweep")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    pair = load_pair(arguments.pair)
    discover = load_task(str(pair.default_task)).split(16, 8, 8).discover
    shared, alone = worked(pair), sums(pair)
    few = HuggingFace(pair, shared, BUDGET)
    lone = HuggingFace(pair, alone, BUDGET)
    ranking = [str(m) for m in rank_modules(pair, discover, "gradient", "linear", batch_size=BATCH).module]
    sets = [tuple(ranking[:k]) for k in KS] + list(random_matched(pair, ranking[:16], arguments.random, 0).sets)

    def ours() -> np.ndarray:
        found = []
        for modules in sets:
            with Graft(modules).applied(pair):
                found.append(evaluate(pair.target, shared, max_new_tokens=BUDGET, batch_size=BATCH).accuracy)
        return np.array(found)

    told = HuggingFace(pair, shared, BUDGET, stops=True)
    if "verdicts" in arguments.only:
        verdicts(pair, ranking[:32], arguments.out / "verdicts.csv")
    if "stops" in arguments.only:
        beside = {"sweep, naive": lambda: naive(pair, told, sets), "sweep, ours": ours}
        in_turns(arguments.out / "sweep_stops.csv", arguments.repeats, beside, arguments.pair, described)
    if "answers" not in arguments.only:
        return
    functions: dict[str, Any] = {
        "short answers, generate": few.verdicts,
        "short answers, one forward": lambda: evaluate(pair.target, shared, max_new_tokens=BUDGET).correct,
        "short answers with nothing in common, generate": lone.verdicts,
        "short answers with nothing in common, one forward": (
            lambda: evaluate(pair.target, alone, max_new_tokens=BUDGET).correct
        ),
        "sweep, naive": lambda: naive(pair, few, sets),
        "sweep, ours": ours,
    }
    in_turns(arguments.out / "answers.csv", arguments.repeats, functions, arguments.pair, described)


def described(name: str, seconds: float, done: dict[str, Any]) -> dict[str, Any]:
    """Of our rows, how many verdicts or accuracies differ from those that they are compared with."""
    kind, _, which = name.partition(", ")
    if which not in ("one forward", "ours"):
        return {}
    other = done[f"{kind}, {'naive' if which == 'ours' else 'generate'}"]
    different = int((np.asarray(done[name]) != other).sum())
    return {"compared": len(other), "different": different, "accuracy": round(float(np.mean(done[name])), 4)}


if __name__ == "__main__":
    main()
