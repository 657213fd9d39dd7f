"""Text that no task is about: sampled by the target itself, or a user's own file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError, check_count, check_seed, finite_number
from mechtransplant.evaluation.batches import check_lengths, make_ready
from mechtransplant.evaluation.generation import end_tokens

if TYPE_CHECKING:
    from mechtransplant.pair import LanguageModel

#: numbers of one step's probabilities in float64, so that a large vocabulary is sampled in smaller batches
_STEP = 1 << 24


@dataclass(frozen=True)
class NeutralText:
    """Texts and where they come from; ``ids`` are the tokens of sampled ones, start token first (files have none)."""

    texts: tuple[str, ...]
    origin: str
    ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.texts:
            raise UsageError("neutral text needs at least one text")
        if self.ids and len(self.ids) != len(self.texts):
            raise UsageError(f"{len(self.ids)} rows of tokens for {len(self.texts)} texts: give one a text")

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"NeutralText({len(self)} texts, {self.origin}, first {self.texts[0][:40]!r})"

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the texts and their tokens."""
        return hashlib.sha256(json.dumps([self.texts, self.ids]).encode()).hexdigest()[:16]

    def rows(self, model: LanguageModel) -> list[list[int]]:
        """Token ids a text, with the tokenizer's begin token where it writes one by itself.

        Raises UsageError for a text with no token to predict, and for tokens that the model does not have.
        """
        rows = [list(row) for row in self.ids] or [list(model.tokenizer(text)["input_ids"]) for text in self.texts]
        words = model.hf.get_input_embeddings().num_embeddings
        for text, row in zip(self.texts, rows, strict=True):
            if len(row) < 2:
                raise UsageError(f"the text {text[:40]!r} becomes {len(row)} token(s), none of them predicted: drop it")
            if max(row) >= words:
                raise UsageError(f"this text was sampled with another tokenizer: {model.name} has {words} tokens")
        return rows


def neutral_texts(
    model: LanguageModel, n: int = 64, tokens: int = 64, seed: int = 0, temperature: float = 1.0, batch_size: int = 64
) -> NeutralText:
    """Texts that a model writes by itself, from its begin token (or end token, or a space) to its end token.

    Sampled from softmax(logits / temperature) by inverting the distribution function at uniform numbers that the seed
    alone fixes, so that the batch size does not matter. Call it outside of a graft's block.

    Args:
        model: for example ``pair.target``.
        tokens: the most tokens a text, without the one it starts from.

    Raises:
        UsageError: counts, a seed or a temperature that make no sense; a tokenizer without any token to start from.
    """
    import torch
    from transformers import DynamicCache

    make_ready(model)
    for name, value in (("n", n), ("tokens", tokens), ("batch_size", batch_size)):
        check_count(name, value)
    check_seed(seed)
    temperature = finite_number("temperature", temperature)
    if temperature <= 0:
        raise UsageError(f"temperature must be above 0, got {temperature:g}")
    hf, tokenizer = model.hf, model.tokenizer
    check_lengths(hf, tokens + 1)
    start, ends = start_token(tokenizer), set(end_tokens(model))
    uniform = torch.rand((n, tokens), generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64)
    batch_size = max(1, min(batch_size, _STEP // hf.get_input_embeddings().num_embeddings))
    rows: list[list[int]] = []
    with torch.no_grad():
        for begin in range(0, n, batch_size):
            draws = uniform[begin : begin + batch_size]
            written = [[start] for _ in range(len(draws))]
            open_rows = set(range(len(draws)))
            last, cache = torch.full((len(draws), 1), start), DynamicCache(config=hf.config)
            for step in range(tokens):
                # rows that have ended run on, unread, until the last one ends
                out = hf(input_ids=last.to(hf.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
                sums = (out.logits[:, -1].cpu().double() / temperature).softmax(-1).cumsum(-1)
                at = draws[:, step, None] * sums[:, -1:]
                last = torch.searchsorted(sums, at, right=True).clamp_max(sums.shape[1] - 1)
                for row in sorted(open_rows):
                    token = int(last[row])
                    written[row].append(token)
                    if token in ends:
                        open_rows.remove(row)
                if not open_rows:
                    break
            rows += written
    texts = tuple(str(tokenizer.decode(row[1:], skip_special_tokens=True)) for row in rows)
    origin = f"sampled from {model.name}, at most {tokens} tokens each, temperature {temperature:g}, seed {seed}"
    return NeutralText(texts, origin, tuple(map(tuple, rows)))


def start_token(tokenizer: Any) -> int:
    """The token that a sampled text starts from: begin, else end, else a space; raises UsageError without any."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    if not space:
        raise UsageError("the tokenizer has no begin token, no end token and no space: give texts from a file")
    return int(space[0])


def load_texts(path: str | Path) -> NeutralText:
    """A user's texts: ``.txt``, one text a line (blank lines are skipped), or ``.jsonl`` with a ``text`` field.

    Raises UsageError for a missing, empty or broken file, naming the line. Texts with line breaks need ``.jsonl``.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"neutral text comes from a .txt or a .jsonl file, got {path}")
    if not path.is_file():
        raise UsageError(f"no text file at {path}: give a .txt file with one text a line, or a .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    numbered = [(at, line.strip("\r")) for at, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        numbered = [(at, _text_field(path, at, line)) for at, line in numbered]
    if not numbered:
        raise UsageError(f"{path} has no text: expected one text a line")
    return NeutralText(tuple(text for _, text in numbered), path.name)


def _text_field(path: Path, at: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} line {at}: broken JSON ({error.msg} at column {error.colno})") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f'{path} line {at}: expected an object with a "text" field that is not empty')
    return text
