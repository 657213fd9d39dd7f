"""What a start of a run depends on besides its config: versions, machine, threads."""

from __future__ import annotations

import os
import platform
from typing import Any

PACKAGES = ("torch", "transformers", "transformer-lens", "peft", "numpy", "scipy", "pandas")


def versions() -> dict[str, Any]:
    """The versions, machine and threads of this process."""
    import torch

    from mechtransplant import __version__

    return {
        "mechtransplant": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _version(package: str) -> str | None:
    """A package's version; None where it is not installed (the bridge's alone is not needed by every computation)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
