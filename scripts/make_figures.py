"""Draw every figure of the committed runs again, from their tables, and copy those that are published into figures/.

    python scripts/make_figures.py [RUN …] [--check]

``--check`` writes nothing, draws into a temporary folder, and fails where a file differs from the committed one. Files
are equal to the byte with the versions of constraints.txt.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from mechtransplant.experiment.drawing import draw, kind_of

ROOT = Path(__file__).resolve().parent.parent
RUNS, FIGURES = ROOT / "runs", ROOT / "figures"
SUFFIXES = ("png", "pdf", "svg")
#: name in figures/ → (run, figure)
PUBLISHED = {
    "k_curve": ("family-generations", "k_curve"),
    "rule_curves": ("family-generations", "rule_curves"),
    "gain_against_kl": ("family-generations", "gain_against_kl"),
    "planted_benchmark": ("bench-planted", "planted_benchmark"),
    "shift_heatmap_smollm2": ("smollm2-shifts", "heatmap_magnitude"),
    "patch_versus_graft": ("family-effects", "patch_versus_graft"),
    "heads_against_mlps": ("family-heads-vs-mlps", "heads_against_mlps"),
}


def finished(names: list[str]) -> list[Path]:
    """The runs of these names, or all that are finished."""
    folders = [RUNS / name for name in names] or sorted(p for p in RUNS.iterdir() if p.is_dir())
    return [folder for folder in folders if names or kind_of(folder) is not None]


def differing(folder: Path) -> list[str]:
    """The committed figures of a run that are not what its tables give, and those that are missing or too many."""
    with tempfile.TemporaryDirectory() as out:
        draw(folder, out)
        made = {p.name: p.read_bytes() for p in Path(out).iterdir()}
    kept = {p.name: p.read_bytes() for p in (folder / "figures").iterdir()}
    return sorted(name for name in {*made, *kept} if made.get(name) != kept.get(name))


def published(folders: list[Path]) -> dict[Path, Path]:
    """Where the published figures of some runs come from → where they go."""
    names = {folder.name for folder in folders}
    return {
        RUNS / run / "figures" / f"{figure}.{suffix}": FIGURES / f"{name}.{suffix}"
        for name, (run, figure) in PUBLISHED.items()
        if run in names
        for suffix in SUFFIXES
    }


def main() -> None:
    check = "--check" in sys.argv
    folders = finished([a for a in sys.argv[1:] if not a.startswith("--")])
    wrong = []
    for folder in folders:
        if check:
            wrong += [f"runs/{folder.name}/figures/{name}" for name in differing(folder)]
        else:
            names = draw(folder)
            for stale in (p for p in (folder / "figures").iterdir() if p.stem not in names):
                stale.unlink()
            print(f"{folder.name}: {', '.join(names)}")
    for source, target in published(folders).items():
        if not check:
            shutil.copy(source, target)
        elif not target.exists() or source.read_bytes() != target.read_bytes():
            wrong.append(str(target.relative_to(ROOT)))
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not what the tables give; run python scripts/make_figures.py")


if __name__ == "__main__":
    main()
