"""The seed paper's shift: how far two models' activation magnitudes lie apart while they decode.

The seed paper's layer-wise activation evaluation (LAE, eqs. 5–6) is the absolute difference of two models' activation
magnitudes, averaged over decoding steps and prompts. The two models soon write different texts, so a step must be
aligned; two ways are offered:

* ``own-text``: each model decodes its own text, and step t of one is compared with step t of the other, up to the
  shorter of the two. This is the paper's reading, "during autoregressive decoding". It mixes what the modules do with
  what the texts say.
* ``teacher-forced``: both models read one text, the target's own greedy text (or the source's, or the gold answer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from mechtransplant.activations import Text, decoding_magnitudes, forced_magnitudes, written_texts
from mechtransplant.errors import UsageError
from mechtransplant.modules import module_frame
from mechtransplant.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import Pair

Alignment = Literal["own-text", "teacher-forced"]


def decoding_shifts(
    pair: Pair,
    task: Task,
    alignment: Alignment = "own-text",
    text: Text = "target",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
    relative: bool = False,
) -> pd.DataFrame:
    """The shift of every linear layer's magnitude on every prompt: mean over steps of |a_source(t) − a_target(t)|.

    Args:
        relative: divide every step's difference by ½(a_source(t) + a_target(t)).
        alignment: how the two models' steps are matched (see the module's docstring).
        text: for "teacher-forced", whose text both models read.

    Returns:
        a tidy frame: module, kind, layer, head, prompt (the question's number in the task), measure ("lae", or
        "lae_relative"), value.
    """
    if alignment == "own-text":
        source, _ = decoding_magnitudes(pair.source, task, max_new_tokens, batch_size, progress)
        target, _ = decoding_magnitudes(pair.target, task, max_new_tokens, batch_size, progress)
    elif alignment == "teacher-forced":
        texts = written_texts(pair.source, pair.target, task, text, max_new_tokens, batch_size, progress)
        source = forced_magnitudes(pair.source, task, texts, batch_size, progress)
        target = forced_magnitudes(pair.target, task, texts, batch_size, progress)
    else:
        raise UsageError(f"unknown alignment {alignment!r}: expected own-text or teacher-forced")
    # a step that only one of the two reached is NaN in the difference and does not count
    steps = min(source.shape[2], target.shape[2])
    source, target = source[..., :steps], target[..., :steps]
    gaps = np.abs(source - target)
    if relative:
        sizes = (source + target) / 2
        gaps = np.divide(gaps, sizes, out=np.where(np.isnan(sizes), np.nan, 0.0), where=sizes > 0)
    values = np.nanmean(gaps, axis=2)
    frame = module_frame(pair.layout.linears).merge(_prompt_numbers(len(task)), how="cross")
    return frame.assign(measure="lae_relative" if relative else "lae", value=values.reshape(-1))


def _prompt_numbers(n: int) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({"prompt": np.arange(n)})
