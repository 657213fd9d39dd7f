"""Values per module and prompt as a tidy frame, in twenty bytes a row: names are categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechtransplant.modules import module_frame

if TYPE_CHECKING:
    import pandas as pd

#: measures that a batch gives at once, and those that need the shift vectors of all prompts
DIRECT = ("magnitude", "distance", "own", "inherited", "lae", "lae_relative")
FROM_VECTORS = ("alignment", "projection")
MEASURES = (*DIRECT, *FROM_VECTORS)


def shift_frame(
    modules: Sequence[str], measure: str, values: NDArray[np.float64], prompts: NDArray[np.int64] | None = None
) -> pd.DataFrame:
    """Columns module, kind, layer, head (-1 where there is none), prompt, measure, value.

    Args:
        values: shape (modules, prompts).
        prompts: the prompts' numbers; 0, 1, … by default.
    """
    import pandas as pd

    numbers = np.arange(values.shape[1]) if prompts is None else prompts
    addresses = module_frame(modules)
    kinds = list(dict.fromkeys(addresses.kind))
    each, rows = len(numbers), len(modules) * len(numbers)

    def spread(column: Any, kind: Any) -> NDArray[Any]:
        return np.repeat(np.asarray(column, dtype=kind), each)

    def category(codes: NDArray[Any], names: Sequence[str]) -> Any:
        return pd.Categorical.from_codes(codes, categories=pd.Index(list(names)))

    return pd.DataFrame(
        {
            "module": category(spread(np.arange(len(modules)), np.int32), modules),
            "kind": category(spread([kinds.index(k) for k in addresses.kind], np.int8), kinds),
            "layer": spread(addresses.layer, np.int16),
            "head": spread(addresses["head"], np.int16),
            "prompt": np.tile(numbers.astype(np.int32), len(modules)),
            "measure": category(np.full(rows, MEASURES.index(measure), np.int8), MEASURES),
            "value": values.reshape(-1),
        }
    )
