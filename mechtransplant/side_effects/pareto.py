"""Grafts that no other graft beats in both gain and harm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mechtransplant.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


def pareto_front(frame: pd.DataFrame, gain: str = "gain", harm: str = "harm") -> pd.DataFrame:
    """The frame with a boolean column ``front``: no other row has at least its gain and at most its harm, one strictly.

    The untouched target, of gain 0 and harm 0, counts as another row: a graft that it beats is on no front. Rows that
    are equal in both are on the front together. Raises UsageError for a column that is missing, is no number
    or holds NaN, which can be compared with nothing.
    """
    lacking = [c for c in (gain, harm) if c not in getattr(frame, "columns", [])]
    if lacking:
        raise UsageError(f"the frame lacks the column {lacking[0]!r}: name the columns with gain= and harm=")
    try:
        gains, harms = (frame[c].to_numpy(dtype=float) for c in (gain, harm))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{gain} and {harm} must be numbers ({error})") from error
    for name, values in ((gain, gains), (harm, harms)):
        if np.isnan(values).any():
            raise UsageError(f"row {int(np.isnan(values).argmax())} has no {name}: drop rows that were not measured")
    others = np.append(gains, 0.0), np.append(harms, 0.0)
    front = [
        not ((others[0] >= g) & (others[1] <= h) & ((others[0] > g) | (others[1] < h))).any()
        for g, h in zip(gains, harms, strict=True)
    ]
    return frame.assign(front=np.array(front, dtype=bool))
