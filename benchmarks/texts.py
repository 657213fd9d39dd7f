"""Generation under a graft, texts that end at unequal lengths, and short answers, beside Hugging Face's ``generate``.

    python benchmarks/texts.py [--pair smollm2/generations] [--repeats 7] [--questions 32] [--out benchmarks/results]

Float32, two threads, greedy, batches of 16; rows are interleaved in one process; every repeat is added to the CSV file.
Tokens are counted up to a text's own end. *Generation* is of the pair's own task. *Sentences* go on from 16 texts that
the target sampled, up to a full stop, 96 tokens at most; *short answers* are sums after worked examples, up to the end
of the line, 16 tokens at most. Where it says so, ``generate`` is given the stop strings and stops when every row has.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import BATCH, BUDGET, HuggingFace, worked
from tables import in_turns

from mechtransplant.evaluation import evaluate, generate
from mechtransplant.evaluation.generation import Generation, end_tokens
from mechtransplant.grafting import Graft
from mechtransplant.pair import Pair, load_pair
from mechtransplant.ranking import rank_modules
from mechtransplant.side_effects import neutral_texts
from mechtransplant.tasks import Example, PromptFormat, Task, load_task

ROOT = Path(__file__).resolve().parent.parent


def sentences(pair: Pair, questions: int) -> Task:
    """Beginnings of texts, each to be continued up to its full stop."""
    texts = neutral_texts(pair.target, questions, 24, seed=3).texts
    return Task(
        "sentences",
        tuple(Example(text, ".") for text in texts),
        format=PromptFormat(question="{question}"),
        max_new_tokens=96,
        stop=(".",),
    )


def theirs(model: HuggingFace, pair: Pair) -> list[tuple[int, ...]]:
    """What ``generate`` wrote, up to every text's own end."""
    ends, found = set(end_tokens(pair.target)), []
    for tokens in model.written():
        end = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = Generation(tuple(tokens[:end]), False)
        found.append(text.tokens[: text.steps(pair.target.tokenizer, model.task.stop)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2/generations")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    pair = load_pair(arguments.pair)
    splits = load_task(str(pair.default_task)).split(16, 8, arguments.questions)
    ranking = rank_modules(pair, splits.discover, "gradient", "linear", batch_size=BATCH)
    graft = Graft([str(m) for m in ranking.module[:16]])
    own, sums, long = splits.test, worked(pair), sentences(pair, BATCH)

    def ours(task: Task, grafted: bool) -> list[tuple[int, ...]]:
        with graft.applied(pair) if grafted else Graft([]).applied(pair):
            return [g.tokens for g in generate(pair.target, task, batch_size=BATCH)]

    plain, told = HuggingFace(pair, sums, BUDGET), HuggingFace(pair, sums, BUDGET, stops=True)
    whole, stopped = (
        HuggingFace(pair, own, own.max_new_tokens),
        HuggingFace(pair, long, long.max_new_tokens, stops=True),
    )
    functions: dict[str, Any] = {
        "short answers, generate": plain.verdicts,
        "short answers, generate with stop strings": told.verdicts,
        "short answers, one forward": lambda: evaluate(pair.target, sums, max_new_tokens=BUDGET).correct,
        "generation, generate": lambda: theirs(whole, pair),
        "generation, ours": lambda: ours(own, False),
        "generation, ours with a graft": lambda: ours(own, True),
        "sentences, generate with stop strings": lambda: theirs(stopped, pair),
        "sentences, ours": lambda: ours(long, False),
        "sentences, ours with a graft": lambda: ours(long, True),
    }
    in_turns(arguments.out / "texts.csv", arguments.repeats, functions, arguments.pair, described)


def described(name: str, seconds: float, done: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, and how many texts or verdicts differ from those of the first of their kind."""
    found, kind = done[name], name.partition(", ")[0]
    first = next(texts for other, texts in done.items() if other.partition(", ")[0] == kind)
    row: dict[str, Any] = {}
    if kind != "short answers":
        tokens = sum(map(len, found))
        row |= {"tokens": tokens, "tokens_a_second": round(tokens / seconds, 2)}
    if "graft" not in name:
        different = int(sum(a != b for a, b in zip(found, first, strict=True)))
        row |= {"compared": len(found), "different": different}
    if kind == "short answers":
        row["accuracy"] = float(np.mean(found))
    return row


if __name__ == "__main__":
    main()
