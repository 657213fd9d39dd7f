"""Two models on one text: negative log-likelihood of its tokens under each, and KL(target || grafted) at each token.

Both read whole texts in one forward a batch. For p = target's and q = grafted model's distribution at a position,
KL = Σ p log(p/q), computed as Σ p (e^{−d} − 1 + d) with d = log p − log q: equal, because Σ q − Σ p = 0, and no term is
below 0, so that small values keep their digits.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError, check_count
from mechtransplant.evaluation.batches import check_lengths, length_sorted, make_ready, pad
from mechtransplant.evaluation.interventions import interventions_on
from mechtransplant.side_effects.neutral import NeutralText

if TYPE_CHECKING:
    from mechtransplant.grafting import Graft
    from mechtransplant.pair import LanguageModel, Pair

#: of a longer text only so many tokens are read: with a large vocabulary its logits would fill the memory
LONGEST = 256
#: bytes of a batch's logits in float32: with 262,144 tokens in the vocabulary, four texts of 64 tokens
BATCH_BYTES = 1 << 28
#: bytes of the target's logits that are kept for the next graft; what does not fit is computed again
KEEP_BYTES = 1 << 29
#: numbers of a chunk of positions whose distributions are compared at once
CHUNK = 1 << 22


@dataclass(frozen=True)
class Divergence:
    """Sums over the predicted tokens of each text, in nats, each of shape (texts,); ``tokens`` counts them.

    ``before``, ``after``: negative log-likelihood under the target and under the grafted model; ``kl``:
    KL(target || grafted).
    """

    tokens: NDArray[np.int64]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    kl: NDArray[np.float64]

    def only(self, open_for: NDArray[np.bool_]) -> Divergence:
        """Of a graft that is in place for some of the texts, and for the others is not."""
        return replace(self, after=np.where(open_for, self.after, self.before), kl=np.where(open_for, self.kl, 0.0))

    @property
    def perplexity_before(self) -> float:
        """exp(Σ NLL / Σ tokens) of the target."""
        return math.exp(self.before.sum() / self.tokens.sum())

    @property
    def perplexity_after(self) -> float:
        """exp(Σ NLL / Σ tokens) of the grafted model; infinite where it gives a token no probability."""
        return float(np.exp(self.after.sum() / self.tokens.sum()))

    @property
    def perplexity_change(self) -> float:
        """Perplexity after over before, minus 1: 0.05 is a perplexity 5 % higher."""
        return float(np.expm1((self.after - self.before).sum() / self.tokens.sum()))

    @property
    def mean_kl(self) -> float:
        """Σ KL / Σ tokens: nats a token."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def kl_by_text(self) -> NDArray[np.float64]:
        """KL a token, averaged over each text's positions."""
        return self.kl / self.tokens


@dataclass
class Reading:
    """Texts as token batches, with the logits that the target gave them as far as they are kept.

    ``cut`` counts the texts of which only the first ``LONGEST`` tokens are read.
    """

    rows: list[list[int]]
    batches: list[list[int]]
    cut: int = 0
    kept: dict[int, Any] = field(default_factory=dict)
    keep_bytes: int = KEEP_BYTES

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Predicted tokens a text."""
        return np.array([len(row) - 1 for row in self.rows])

    def logits(self, model: LanguageModel, batch: int) -> Any:
        """The model's logits at the positions that predict a token, shape (rows, longest − 1, vocabulary)."""
        import torch

        make_ready(model)
        ids, mask = pad([self.rows[i] for i in self.batches[batch]], 0, "right")
        hf = model.hf
        with torch.no_grad():
            return hf(input_ids=ids.to(hf.device), attention_mask=mask.to(hf.device), use_cache=False).logits[:, :-1]

    def target_logits(self, model: LanguageModel, batch: int) -> Any:
        """The target's logits, kept or computed now; call it while no graft is in place."""
        if batch in self.kept:
            return self.kept[batch]
        logits = self.logits(model, batch)
        held = sum(t.numel() * t.element_size() for t in self.kept.values())
        if held + logits.numel() * logits.element_size() <= self.keep_bytes:
            self.kept[batch] = logits
        return logits


def read_text(model: LanguageModel, text: NeutralText, batch_size: int = 64, keep_bytes: int = KEEP_BYTES) -> Reading:
    """The text's tokens in batches of similar lengths, whose logits fit into ``BATCH_BYTES``."""
    check_count("batch_size", batch_size)
    whole = text.rows(model)
    rows = [row[:LONGEST] for row in whole]
    longest = max(map(len, rows))
    check_lengths(model.hf, longest)
    fitting = BATCH_BYTES // (4 * longest * model.hf.get_input_embeddings().num_embeddings)
    size = max(1, min(batch_size, fitting))
    batches = list(length_sorted([len(row) for row in rows], size))
    return Reading(rows, batches, sum(len(row) > LONGEST for row in whole), keep_bytes=keep_bytes)


def text_divergence(pair: Pair, graft: Graft, text: NeutralText | Reading, batch_size: int = 64) -> Divergence:
    """NLL of the text under the target and under the grafted target, and the KL between them, text by text.

    Args:
        text: neutral text, or a reading of it by this target (whose kept logits are used again).

    Raises:
        UsageError: something acts on the target already, or the graft is a conditional one, which asks for questions.
    """
    from mechtransplant.grafting import Graft

    check_untouched(pair)
    if not isinstance(graft, Graft):
        raise UsageError(f"neutral text has no prompt and no question: give a plain Graft, got {type(graft).__name__}")
    reading = text if isinstance(text, Reading) else read_text(pair.target, text, batch_size, keep_bytes=0)
    sums = np.zeros((3, len(reading.rows)))
    for batch, rows in enumerate(reading.batches):
        before = reading.target_logits(pair.target, batch)
        block: AbstractContextManager[Any] = graft.applied(pair)
        with block:
            after = reading.logits(pair.target, batch)
        sums[:, rows] = _compare(before, after, [reading.rows[i] for i in rows])
    return Divergence(reading.tokens, *sums)


def check_untouched(pair: Pair) -> None:
    """Raise UsageError if anything acts on the target: a change would then be measured from another model."""
    if not hasattr(pair, "target"):
        raise UsageError(f"side effects are measured between two models: pass the pair, got {type(pair).__name__}")
    if pair.applied or pair.conditional or interventions_on(pair.target.hf):
        raise UsageError(
            "a graft or patch is in place on this pair's target: leave its block first, side effects apply the graft"
        )


def _compare(before: Any, after: Any, rows: list[list[int]]) -> NDArray[np.float64]:
    """Sums of (NLL before, NLL after, KL) over each row's predicted tokens, shape (3, rows)."""
    import torch

    gold, mask = pad([row[1:] for row in rows], 0, "right")
    flat = [logits.reshape(-1, logits.shape[-1]) for logits in (before, after)]
    chosen = gold.reshape(-1, 1).to(before.device)
    found = torch.zeros((3, len(chosen)), dtype=torch.float64)
    step = max(1, CHUNK // flat[0].shape[1])
    for start in range(0, len(chosen), step):
        part = slice(start, start + step)
        p, q = (_log_probabilities(logits[part].float()) for logits in flat)
        for at, scores in enumerate((p, q)):
            found[at, part] = -scores.gather(-1, chosen[part])[:, 0].double().cpu()
        d = p - q
        # far below, e^{−d} would overflow where p vanishes: there p e^{−d} is q itself
        terms = torch.where(d > -30, p.exp() * (torch.expm1(-d.clamp_min(-30)) + d), q.exp() + p.exp() * (d - 1))
        # a token that the target rules out adds what the other gives it; one that only the other rules out, infinity
        terms = terms.masked_fill(q.isneginf(), math.inf)
        terms = torch.where(p.isneginf(), q.exp(), terms)
        found[2, part] = terms.clamp_min(0).sum(-1).double().cpu()
    shaped = found.reshape(3, *gold.shape).masked_fill(mask[None] == 0, 0)
    return np.asarray(shaped.sum(-1).numpy())


def _log_probabilities(scores: Any) -> Any:
    """log softmax; torch's own is up to 4e-5 nats off in float32 on a CPU, with a vocabulary of 49,152."""
    return scores - scores.logsumexp(-1, keepdim=True)
