"""What a start of a run depends on besides its config (versions, machine, threads), and how a folder notes it."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError
from mechtransplant.experiment.cells import write_atomically

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


def begin(folder: Path, began: dict[str, Any]) -> None:
    """Note what the numbers depend on; refuse a folder that holds something else."""
    import yaml

    path, now = folder / "environment.json", versions()
    starts = [now]
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        for what, value in began.items():
            if saved.get(what) != value:
                raise UsageError(f"{folder} was begun with another {what}: choose another --out folder, or remove it")
        starts = saved["starts"] + [now] * (now not in saved["starts"])
    elif any(p.name != ".lock" for p in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no such analysis: choose another --out folder")
    write_atomically(path, json.dumps({**began, "starts": starts}, indent=1) + "\n")
    write_atomically(folder / "config.yaml", str(yaml.safe_dump(began["config"], sort_keys=False)))
