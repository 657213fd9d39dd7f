"""Train the small model family in the repo: first (all skills), second (regressed on sums), instruct (boxed answers).

    python scripts/train_family.py [first] [second] [instruct]

Each model is a 4-layer Llama of about 0.9 M parameters, trained on the CPU from a seed on generated questions that
are not held out (mechtransplant/tasks/generated.py). The script writes Hugging Face folders with safetensors, the
tokenizer and a model card whose numbers it has just measured on held-out questions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechtransplant.evaluation import evaluate
from mechtransplant.pair import LanguageModel
from mechtransplant.tasks import Example, load_task
from mechtransplant.tasks.generated import LETTERS, SKILLS, boxed_skill, draw
from mechtransplant.weights import write_hashes

FOLDER = Path(__file__).resolve().parent.parent / "models" / "family"
POOL = 24_000
WORDS = ["\\boxed{", "boxed", "box", "put", "in", "rev", "sort", "copy", "max"]
Maker = Callable[[np.random.Generator], Example]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for each word of the questions; a begin-of-sequence token is prepended."""
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS, *"0123456789", *LETTERS, *" =+-:,.}"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    pattern = "|".join([r"\\boxed\{", *WORDS[1:], "."])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A fresh 4-layer Llama: d_model 128, 8 heads, 4 key-value heads, d_mlp 384."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@dataclass
class Mix:
    """A weighted mixture of encoded question pools."""

    tokenizer: PreTrainedTokenizerFast
    parts: list[tuple[float, list[Maker], str]]
    seed: int
    pools: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, (_, makers, completion) in enumerate(self.parts):
            examples = list(draw(makers, POOL, self.seed + index, held=False))
            self.pools.append(self._encode(examples, completion))

    def _encode(self, examples: list[Example], completion: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows, masks = [], []
        for example in examples:
            prompt = self.tokenizer(example.question)["input_ids"]
            gold = self.tokenizer(completion.replace("{answer}", example.answer), add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor([*prompt, *gold, 2]))
            masks.append(torch.tensor([False] * len(prompt) + [True] * (len(gold) + 1)))
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True), pad(masks, batch_first=True)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input ids, labels); labels are -100 outside the answer."""
        weights = np.array([w for w, _, _ in self.parts])
        counts = rng.multinomial(size, weights / weights.sum())
        longest = max(pool[0].shape[1] for pool, c in zip(self.pools, counts, strict=True) if c)
        ids = torch.zeros(size, longest, dtype=torch.long)
        answer = torch.zeros(size, longest, dtype=torch.bool)
        start = 0
        for (tokens, mask), count in zip(self.pools, counts, strict=True):
            if not count:
                continue
            pick = torch.from_numpy(rng.integers(0, len(tokens), count))
            ids[start : start + count, : tokens.shape[1]] = tokens[pick]
            answer[start : start + count, : tokens.shape[1]] = mask[pick]
            start += count
        return ids, ids.masked_fill(~answer, -100)


def train(model: LlamaForCausalLM, mix: Mix, steps: int, lr: float, seed: int, batch: int = 256) -> list[float]:
    """AdamW with warm-up and cosine decay to a tenth; returns the loss at every 50th step and at the last."""
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warm = min(100, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / warm) * (0.1 + 0.45 * (1 + np.cos(np.pi * s / steps)))
    )
    model.train()
    losses, started = [], time.time()
    for step in range(steps):
        ids, labels = mix.batch(rng, batch)
        # right padding under a causal mask: no real position sees a pad
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            losses.append(loss.item())
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - started:.0f} s", flush=True)
    return losses


def skills(model: Any, tokenizer: Any, n: int = 400) -> dict[str, float]:
    """Accuracy on held-out questions of every family task."""
    model.eval()
    wrapped = LanguageModel("measured", model, tokenizer)
    return {
        name: evaluate(wrapped, load_task(name, n=n, seed=1)).accuracy for name in [*SKILLS, "boxed", "boxed-addition"]
    }


def plain(weight: float, *names: str) -> list[tuple[float, list[Maker], str]]:
    return [(weight, [SKILLS[name]], "{answer}") for name in names]


def easy_addition(rng: np.random.Generator) -> Example:
    """Sums of a number below 20 and one below 10, in either order: the shifted mix of the second generation."""
    a, b = int(rng.integers(0, 20)), int(rng.integers(0, 10))
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    return Example(f"{a}+{b}=", str(a + b))


BOX = "\\boxed{{answer}}"
#: name → (parent, parts of the mix, steps, learning rate, seed, what it is)
RECIPES: dict[str, tuple[str | None, list[tuple[float, list[Maker], str]], int, float, int, str]] = {
    "first": (
        None,
        [
            *plain(0.4, "addition"),
            *plain(0.14, "reverse", "sort", "copy", "max"),
            (0.04, [boxed_skill(s, 0) for s in SKILLS], BOX),
        ],
        2000,
        2e-3,
        0,
        "the first generation: five skills, and boxed answers for one phrasing of the request",
    ),
    "second": (
        "first",
        [
            (0.3, [easy_addition], "{answer}"),
            *plain(0.165, "reverse", "sort", "copy", "max"),
            (0.04, [boxed_skill(s, 0) for s in SKILLS if s != "addition"], BOX),
        ],
        600,
        2e-3,
        1,
        "the second generation: `first` trained on with easy sums only, which cost it the other sums",
    ),
    "instruct": (
        "first",
        [
            (0.6, [boxed_skill(s) for s in SKILLS], BOX),
            (0.15, [boxed_skill("addition")], BOX),
            *plain(0.05, "addition", "reverse", "sort", "copy", "max"),
        ],
        600,
        1e-3,
        2,
        "the instruction-tuned sibling: `first` tuned to answer in a box, whichever way it is asked",
    ),
}


def write_card(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Measure a saved model and its parent on held-out questions, and write the model card from that."""
    folder = FOLDER / name
    log = json.loads((folder / "training.json").read_text())
    losses, seconds = log["loss_every_50_steps"], log["seconds"]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    after = skills(model, tokenizer)
    parent = RECIPES[name][0]
    start = build_model(len(tokenizer), RECIPES[name][4]) if parent is None else None
    before = skills(start or LlamaForCausalLM.from_pretrained(FOLDER / str(parent), dtype=torch.float32), tokenizer)
    parent, parts, steps, lr, seed, purpose = RECIPES[name]
    mix = "; ".join(
        f"{w / sum(p[0] for p in parts):.0%} "
        + ", ".join(("boxed skill" if m.__name__ == "make" else m.__name__) for m in makers[:1])
        + (f" ({len(makers)} kinds)" if len(makers) > 1 else "")
        for w, makers, _ in parts
    )
    rows = "\n".join(f"| {t} | {before[t]:.1%} | {after[t]:.1%} |" for t in after)
    count = sum(p.numel() for p in model.parameters())
    (folder / "README.md").write_text(f"""---
license: mit
library_name: transformers
---
# family/{name}

{purpose[0].upper() + purpose[1:]}.

| | |
|---|---|
| parent | {parent or "none, trained from a random start"} |
| parameters | {count:,} (Llama, 4 layers, d_model 128, 8 heads, 4 key-value heads, d_mlp 384), float32 |
| seed | {seed} |
| data | generated (`mechtransplant/tasks/generated.py`), held-out fifth skipped: {mix} |
| steps | {steps} of 256 questions, AdamW, learning rate {lr}, {seconds:.0f} s on one CPU thread |
| loss | {losses[0]:.3f} at the start, {losses[-1]:.4f} at the end |
| made by | `python scripts/train_family.py {name}` |

Accuracy on 400 held-out questions of each skill, before (the parent) and after:

| skill | before | after |
|---|---|---|
{rows}
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(RECIPES), help="which models, in order")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--card-only", action="store_true", help="measure the saved models and write their cards again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    for name in arguments.names:
        folder = FOLDER / name
        if not arguments.card_only:
            parent, parts, steps, lr, seed, _ = RECIPES[name]
            if parent is None:
                model = build_model(len(tokenizer), seed)
            else:
                model = LlamaForCausalLM.from_pretrained(FOLDER / parent, dtype=torch.float32)
            started = time.time()
            losses = train(model, Mix(tokenizer, parts, seed), steps, lr, seed)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            log = {"loss_every_50_steps": losses, "seconds": round(time.time() - started)}
            (folder / "training.json").write_text(json.dumps(log) + "\n")
        write_card(name, tokenizer)
        write_hashes(folder)


if __name__ == "__main__":
    main()
