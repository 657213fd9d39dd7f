"""What a folder's figures show, in a sentence, and the section that each belongs to."""

from __future__ import annotations

import re
from typing import NamedTuple


class Caption(NamedTuple):
    """``section``: how the title of a figure's section begins; empty for the figures at the end."""

    section: str
    text: str


#: pattern of a figure's name → its caption; the first that matches
_CAPTIONS: dict[str, Caption] = {
    "k_curve": Caption(
        "Result of",
        "Accuracy on the test questions against K, the number of grafted modules, with 95 % intervals. Dashed and "
        "dotted: source and target as they are. The band, where there is one, is the range of random "
        "orders, as many at every K, and the bar that of the sets matched to the chosen K; both are matched to the "
        "rule's own modules.",
    ),
    "against_chance": Caption(
        "Controls",
        "How many random sets, or draws of as many changes, reach which accuracy and which log-probability of the gold "
        "answer on the test questions. Line: the graft; dashed and dotted: source and target as they are.",
    ),
    "rule_curves": Caption(
        "Rules",
        "Accuracy against K by every rule. Dashed and dotted: source and target as they are. The band, where there is "
        "one, is the range of the random orders of every rule that has its own.",
    ),
    "budget_grid": Caption(
        "Token budgets",
        "Change of accuracy on the test questions over token budget and K, graft less target, in points, at one "
        "strength; the last column is the source. Dots: the K that was chosen, on other questions.",
    ),
    "strength_curve": Caption(
        "K sweep",
        "Accuracy on the choose questions against the strength of the graft, a line a K, with 95 % intervals.",
    ),
    "gain_against_harm": Caption(
        "Side effects",
        "What grafts gain on the task (up) against the accuracy that they lose on other tasks (right), in points, with "
        "95 % intervals. Joined: no other graft gains more and harms less. Grey: random sets.",
    ),
    "gain_against_kl": Caption(
        "Side effects",
        "What grafts gain on the task (up) against how far they move the distribution of the next token on neutral "
        "text (right; KL divergence, nats a token). Joined: no other graft gains more and moves less.",
    ),
    "score_heatmap": Caption(
        "Feed-forward",
        "The headline rule's score of every linear layer; marked are the layers of the chosen graft.",
    ),
    r"heatmap_(\w+)_control": Caption(
        "", "Shifts of every head and MLP ({0}), task prompts less control prompts; marked where adjusted p ≤ 0.05."
    ),
    r"heatmap_(\w+)": Caption(
        "", "Shifts of every head and MLP ({0}), source less target; marked where adjusted p ≤ 0.05."
    ),
    "volcano": Caption("", "Size of every module's shift against how sure it is."),
    "consistency": Caption("", "How alike every module's shift is from prompt to prompt, against its size."),
    "lorenz": Caption(
        "", "How concentrated the shifts are: the share of the whole that the largest modules hold together."
    ),
    "own_against_inherited": Caption(
        "", "What a module's own weights do (own shift) against what it passes on from below (inherited)."
    ),
    "patch_versus_graft": Caption(
        "",
        "Effect of moving a module's activations (patch) against that of moving its weights (graft), in nats of the "
        "gold answer's log-probability: what carries the signal, and what computes it.",
    ),
    "heads_against_mlps_by_depth": Caption(
        "Within a third", "Change of the changed model by third of the layers, and the range of random sets."
    ),
    "heads_against_mlps.*": Caption(
        "Anywhere", "Change of the changed model with 95 % intervals, and beside each bar the range of random sets."
    ),
    "recipe_curves": Caption(
        "The best of",
        "Mean log-probability of the gold answers to the choose questions against the share of parameters that is "
        "grafted, by kind of module and rule (of more than six, those that reach highest, and lae); every point is the "
        "best strength and operator. Grey: target (dotted) and source (dashed).",
    ),
    "planted_benchmark": Caption(
        "AUROC, pair", "How well every rule finds modules that were planted (AUROC; 0.5 is chance), pair by pair."
    ),
}


def caption_of(name: str) -> Caption:
    """A figure's caption; its name in words where it is not one of ours."""
    for pattern, caption in _CAPTIONS.items():
        found = re.fullmatch(pattern, name)
        if found:
            return caption._replace(text=caption.text.format(*found.groups()))
    return Caption("", name.replace("_", " ").capitalize() + ".")
