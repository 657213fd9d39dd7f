"""What a start of a run depends on besides its config: versions, machine, threads."""

from __future__ import annotations

import os
import platform
from typing import Any

PACKAGES = ("torch", "transformers", "transformer-lens", "peft", "numpy", "scipy", "pandas")


def versions() -> dict[str, Any]:
    """The versions, machine and threads of this process."""
    from importlib.metadata import version

    import torch

    return {
        "mechtransplant": version("mechtransplant"),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }
