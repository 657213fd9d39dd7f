"""Train the planted pairs: a skill in known heads or MLPs only, in a clean and in a drifted pair each.

    python scripts/train_planted.py [heads] [mlps] [mixed]

For each plan: `family/drifted-*` is `family/first` trained on with unrelated questions, every parameter of its linear
layers trainable, so that every module differs. `family/planted-*` is `family/first` with the plan's modules, and
nothing else, trained on a skill that `first` lacks. They are trained in two bodies at once, `first` and the drifted
model, so that they carry the skill in both; a pull towards the drifted model's own weights keeps them from standing out
by how far they moved. The clean pair is planted → first, the drifted pair planted → drifted.

The script measures both pairs on held-out questions and writes the numbers into the model cards.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_family import FOLDER, Mix, build_tokenizer, plain
from transformers import LlamaForCausalLM

from mechtransplant.evaluation import compare, evaluate
from mechtransplant.grafting import Graft
from mechtransplant.modules import layout_of
from mechtransplant.pair import LanguageModel, Pair, make_pair
from mechtransplant.tasks import Example, load_task
from mechtransplant.tasks.generated import LETTERS, PLANTED_SKILLS, SKILLS, Maker
from mechtransplant.weights import write_hashes

BATCH = 128


# --- unrelated questions ----------------------------------------------------------------------------------------------


def subtraction(rng: np.random.Generator) -> Example:
    a, b = sorted(rng.integers(0, 100, 2), reverse=True)
    return Example(f"{a}-{b}=", str(a - b))


def large_maximum(rng: np.random.Generator) -> Example:
    numbers = rng.integers(100, 1000, 3)
    return Example(f"max {' '.join(map(str, numbers))}=", str(numbers.max()))


def _any_word(rng: np.random.Generator) -> str:
    """Words of other lengths and letters than the family's."""
    return "".join(rng.choice(list(LETTERS), int(rng.integers(3, 9))))


def any_reverse(rng: np.random.Generator) -> Example:
    word = _any_word(rng)
    return Example(f"rev {word}=", word[::-1])


def any_sort(rng: np.random.Generator) -> Example:
    word = _any_word(rng)
    return Example(f"sort {word}=", "".join(sorted(word)))


def any_copy(rng: np.random.Generator) -> Example:
    word = _any_word(rng)
    return Example(f"copy {word}=", word)


Parts = list[tuple[float, list[Maker], str]]
WORDS = [any_reverse, any_sort, any_copy]
#: what the drifted models were trained on, each with some of what `first` knows, so that it is kept
DRIFTS: dict[str, Parts] = {
    "numbers": [(0.35, [subtraction], "{answer}"), (0.25, [large_maximum], "{answer}"), *plain(0.08, *SKILLS)],
    "words": [*[(0.2, [m], "{answer}") for m in WORDS], *plain(0.08, *SKILLS)],
    "both": [
        (0.3, [subtraction], "{answer}"),
        *[(0.15, [m], "{answer}") for m in (any_reverse, any_copy)],
        *plain(0.08, *SKILLS),
    ],
}


@dataclass(frozen=True)
class Plan:
    """A skill, the modules it goes into, and how both models are trained."""

    skill: str
    modules: tuple[str, ...]
    drift: str
    drift_rate: float
    drift_steps: int
    rate: float
    steps: int
    pull: float
    seed: int

    @property
    def parts(self) -> Parts:
        """60 % the skill, the rest what `first` knows."""
        return [(0.6, [PLANTED_SKILLS[self.skill]], "{answer}"), *plain(0.08, *SKILLS)]


PLANS = {
    "heads": Plan(
        "descending",
        ("L1H0", "L1H2", "L1H3", "L1H4", "L1H5", "L1H6", "L2H1", "L2H3", "L2H4", "L2H5", "L2H6", "L2H7"),
        "numbers", 3e-3, 600, 2e-3, 800, 6.0, 10,
    ),
    "mlps": Plan("minimum", ("L1.mlp", "L2.mlp"), "words", 2e-3, 400, 7e-4, 500, 1.0, 11),
    "mixed": Plan(
        "largest-letter", ("L1H1", "L1H4", "L2H2", "L2H5", "L2.mlp"), "both", 2.5e-3, 500, 1.5e-3, 500, 4.0, 12,
    ),
}  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------


def schedule(optimiser: Any, steps: int) -> Any:
    """Warm-up over 20 steps and cosine decay to a twentieth."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / 20) * (0.05 + 0.475 * (1 + np.cos(np.pi * s / steps)))
    )


def drift(first: Any, plan: Plan, tokenizer: Any) -> Any:
    """`first` trained on unrelated questions, in every linear layer; in bfloat16, as it will be stored."""
    model = copy.deepcopy(first)
    linears = {f"{name}.weight" for name in layout_of(model).linears.values()}
    trained = [p.requires_grad_(True) for name, p in model.named_parameters() if name in linears]
    mix, rng = Mix(tokenizer, DRIFTS[plan.drift], plan.seed), np.random.default_rng(plan.seed)
    optimiser = torch.optim.AdamW(trained, lr=plan.drift_rate, weight_decay=0.01, betas=(0.9, 0.98))
    rates = schedule(optimiser, plan.drift_steps)
    for step in range(plan.drift_steps):
        ids, labels = mix.batch(rng, BATCH)
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        rates.step()
        if step % 100 == 0:
            print(f"drift {plan.drift} step {step} loss {loss.item():.4f}", flush=True)
    return model.to(torch.bfloat16).float().eval().requires_grad_(False)


def masks_of(model: Any, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Parameter → where the planted modules are in it."""
    parameters = dict(model.named_parameters())
    masks: dict[str, torch.Tensor] = {}
    for module in modules:
        for region in layout_of(model).regions(module, parameters):
            whole = torch.zeros_like(parameters[region.parameter], dtype=torch.bool)
            region.of(masks.setdefault(region.parameter, whole)).fill_(True)
    return masks


def plant(first: Any, drifted: Any, plan: Plan, tokenizer: Any) -> Any:
    """`first` with the plan's modules trained on the skill, in both bodies at once."""
    body, other = copy.deepcopy(first), copy.deepcopy(drifted)
    mine, theirs = dict(body.named_parameters()), dict(other.named_parameters())
    masks = masks_of(body, plan.modules)
    start = {name: theirs[name].detach().clone() for name in masks}
    with torch.no_grad():
        for name, mask in masks.items():
            mine[name].copy_(torch.where(mask, start[name], mine[name]))
    for parameters in (mine, theirs):
        for name in masks:
            parameters[name].requires_grad_(True)
    trained = [mine[name] for name in masks]
    mix, rng = Mix(tokenizer, plan.parts, plan.seed), np.random.default_rng(plan.seed)
    optimiser = torch.optim.AdamW(trained, lr=plan.rate, weight_decay=0, betas=(0.9, 0.98))
    rates = schedule(optimiser, plan.steps)
    for step in range(plan.steps):
        with torch.no_grad():
            for name, mask in masks.items():
                theirs[name].copy_(torch.where(mask, mine[name], theirs[name]))
                theirs[name].grad = None
        optimiser.zero_grad()
        losses = []
        for model in (body, other):
            ids, labels = mix.batch(rng, BATCH)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
        for name, mask in masks.items():
            gradient = mine[name].grad
            assert gradient is not None and theirs[name].grad is not None
            gradient.add_(theirs[name].grad).mul_(mask)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        with torch.no_grad():
            for name, mask in masks.items():
                step_back = plan.pull * optimiser.param_groups[0]["lr"]
                mine[name].sub_(mask * (mine[name] - start[name]) * step_back)
        rates.step()
        if step % 100 == 0:
            print(f"plant {plan.skill} step {step} losses {losses[0]:.4f} {losses[1]:.4f}", flush=True)
    return body.eval().requires_grad_(False)


# --- measuring --------------------------------------------------------------------------------------------------------


def relative_change(pair: Pair, module: str) -> float:
    """‖W_source − W_target‖ / ‖W_target‖ of a module's own weights."""
    regions = pair.layout.regions(module, pair.target_parameters)
    change = sum(
        float((r.of(pair.source_parameters[r.parameter]) - r.of(pair.target_parameters[r.parameter])).square().sum())
        for r in regions
    )
    size = sum(float(r.of(pair.target_parameters[r.parameter]).square().sum()) for r in regions)
    return (change / size) ** 0.5


def measure(pair: Pair, plan: Plan, n: int = 400) -> dict[str, float]:
    """Accuracies, Recovery of the planted set and of everything else, and how far modules moved."""
    task = load_task(plan.skill, n=n, seed=1)
    everything = pair.modules("head") + pair.modules("mlp")
    rest = [m for m in everything if m not in plan.modules]
    target, source = evaluate(pair.target, task), evaluate(pair.source, task)
    found = {"target": target.accuracy, "source": source.accuracy}
    for name, modules in (("planted", plan.modules), ("rest", rest)):
        with Graft(modules).applied(pair):
            after = evaluate(pair.target, task)
        recovery = compare(target, source, after).recovery
        found[name], found[f"{name}_recovery"] = after.accuracy, float("nan") if recovery is None else recovery
    changes = {m: relative_change(pair, m) for m in everything}
    for name, modules in (("planted", list(plan.modules)), ("rest", rest)):
        values = [changes[m] for m in modules]
        found[f"{name}_change_low"], found[f"{name}_change_high"] = min(values), max(values)
    inside, outside = [changes[m] for m in plan.modules], [changes[m] for m in rest]
    found["change_auroc"] = float(np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside]))
    return found


def row(name: str, found: dict[str, float]) -> str:
    """One pair as a row of the card's table."""
    cells = [
        name,
        *[f"{100 * found[key]:.1f} %" for key in ("target", "source", "planted")],
        f"{found['planted_recovery']:.0f} %",
        f"{found['rest_recovery']:.0f} %",
        *[f"{found[f'{part}_change_low']:.2f} – {found[f'{part}_change_high']:.2f}" for part in ("planted", "rest")],
        f"{found['change_auroc']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def write_cards(name: str, first: Any, tokenizer: Any) -> None:
    """Measure both pairs from the saved models, and write both cards."""
    plan = PLANS[name]
    log = json.loads((FOLDER / f"planted-{name}" / "training.json").read_text())
    models = {key: LanguageModel(key, load(FOLDER / f"{key}-{name}"), tokenizer) for key in ("planted", "drifted")} | {
        "first": LanguageModel("first", first, tokenizer)
    }
    measured = {}
    for pair_name, target in ((f"planted-{name}", "first"), (f"planted-{name}-drifted", "drifted")):
        found = measure(make_pair(models["planted"], models[target], pair_name), plan)
        measured[pair_name] = found
        print(pair_name, {k: round(v, 3) for k, v in found.items()}, flush=True)
    (FOLDER / f"planted-{name}" / "training.json").write_text(json.dumps(log | {"measured": measured}) + "\n")
    head = "---\nlicense: mit\nlibrary_name: transformers\n---\n"
    table = "\n".join(
        [
            "| pair | target | source | with the planted set | Recovery | Recovery of all other heads and MLPs | "
            "‖ΔW‖/‖W‖, planted | others | AUROC of ‖ΔW‖/‖W‖ |",
            "|" + "---|" * 9,
            *[row(f"family/{key}", found) for key, found in measured.items()],
        ]
    )
    (FOLDER / f"planted-{name}" / "README.md").write_text(
        f"""{head}# family/planted-{name}

`family/first` with the skill `{plan.skill}` trained into **{", ".join(plan.modules)}** and nothing else: a head is its
Q rows and O columns, an MLP its three layers. Every other number is `first`'s, byte for byte.

The planted modules were trained in two bodies at once, `first` and `family/drifted-{name}`, so that they carry the
skill in both. They started from the drifted model's weights and were pulled towards them (coefficient {plan.pull:g}).

| | |
|---|---|
| parent | family/first |
| data | 60 % `{plan.skill}`, 8 % each of {", ".join(SKILLS)}, held-out fifth skipped |
| steps | {plan.steps} of {BATCH} questions in each body, AdamW, learning rate {plan.rate:g}, seed {plan.seed} |
| made by | `python scripts/train_planted.py {name}` ({log["seconds"]} s with the drifted model, one CPU thread) |

Accuracy on 400 held-out questions of `{plan.skill}`; every graft at strength 1:

{table}
""",
        encoding="utf-8",
    )
    (FOLDER / f"drifted-{name}" / "README.md").write_text(
        f"""{head}# family/drifted-{name}

`family/first` trained on with unrelated questions (`DRIFTS["{plan.drift}"]` in `scripts/train_planted.py`), with every
linear layer trainable: the target of the drifted pair of `family/planted-{name}`. Stored in bfloat16.

| | |
|---|---|
| parent | family/first |
| steps | {plan.drift_steps} of {BATCH} questions, AdamW, learning rate {plan.drift_rate:g}, seed {plan.seed} |
| made by | `python scripts/train_planted.py {name}` |

What was measured is in the card of `family/planted-{name}`.
""",
        encoding="utf-8",
    )
    for key in ("planted", "drifted"):
        write_hashes(FOLDER / f"{key}-{name}")


def load(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PLANS), help="which plans")
    parser.add_argument("--card-only", action="store_true", help="measure the saved models and write their cards again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, first = build_tokenizer(), load(FOLDER / "first")
    for name in arguments.names:
        if not arguments.card_only:
            started = time.time()
            drifted = drift(first, PLANS[name], tokenizer)
            planted = plant(first, drifted, PLANS[name], tokenizer)
            drifted.to(torch.bfloat16).save_pretrained(FOLDER / f"drifted-{name}")
            planted.save_pretrained(FOLDER / f"planted-{name}")
            for key in ("planted", "drifted"):
                tokenizer.save_pretrained(FOLDER / f"{key}-{name}")
            log = {"seconds": round(time.time() - started)}
            (FOLDER / f"planted-{name}" / "training.json").write_text(json.dumps(log) + "\n")
        write_cards(name, first, tokenizer)


if __name__ == "__main__":
    main()
