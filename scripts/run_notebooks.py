"""Run the notebooks from top to bottom in fresh kernels.

python scripts/run_notebooks.py [NOTEBOOK …]            # small sizes; nothing is written; fails at an error
python scripts/run_notebooks.py --write [NOTEBOOK …]    # full sizes; outputs are kept in the notebooks
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
#: seconds that one cell may take, and all notebooks at small sizes together
LIMIT, ALL = 1800, 600
#: a progress bar, or another widget, which is dead in a file
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path, write: bool) -> float:
    """Seconds that a notebook took; raises CellExecutionError for a cell that fails."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    NotebookClient(
        notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    ).execute()
    seconds = time.perf_counter() - started
    if write:
        cleaned(notebook)
        nbformat.write(notebook, path)
    return seconds


def cleaned(notebook: Any) -> None:
    """Without what differs from run to run, or belongs to this machine: progress, times, the state of widgets."""
    notebook.metadata = {
        key: notebook.metadata[key] for key in ("kernelspec", "language_info") if key in notebook.metadata
    }
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]


def main() -> None:
    write = "--write" in sys.argv
    if not write:
        os.environ["MECHTRANSPLANT_SMOKE"] = "1"
    named = [Path(a).resolve() for a in sys.argv[1:] if not a.startswith("--")]
    whole = 0.0
    for path in named or sorted(NOTEBOOKS.glob("*.ipynb")):
        seconds = run(path, write)
        whole += seconds
        print(f"{path.name}: {seconds:.0f} s", flush=True)
    if not write and whole > ALL:
        sys.exit(f"the notebooks took {whole:.0f} s at small sizes: {ALL} s at most")


if __name__ == "__main__":
    main()
