"""Shift frames from plain arrays."""

from __future__ import annotations

import numpy as np
import pandas as pd


def frame(values: np.ndarray, measure: str = "magnitude", name: str = "L{}.mlp") -> pd.DataFrame:
    """Values of shape (prompts, modules) as a frame; ``name`` says what the modules are called."""
    prompts, modules = values.shape
    return pd.DataFrame(
        {
            "module": np.tile([name.format(i) for i in range(modules)], prompts),
            "prompt": np.repeat(np.arange(prompts), modules),
            "measure": measure,
            "value": values.reshape(-1),
        }
    )
