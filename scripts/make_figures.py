"""Draw every figure of the committed runs again, from their tables, and copy those that are published into figures/.

    python scripts/make_figures.py [RUN …] [--check]

``--check`` writes nothing, draws into a temporary folder, and fails where a file differs from the committed one. Files
are equal to the byte with the versions of constraints.txt.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from study_runs import study_rows

from mechtransplant.experiment import beside_reported, runs_table
from mechtransplant.experiment.drawing import draw, fingerprint_of, kind_of
from mechtransplant.figures import reported_rows, run_rows, save_figure
from mechtransplant.ranking import get_rule

ROOT = Path(__file__).resolve().parent.parent
RUNS, FIGURES = ROOT / "runs", ROOT / "figures"
SUFFIXES = ("png", "pdf", "svg", "csv")
#: runs whose rows stand beside the paper's
BESIDE_THE_PAPER = ("family-generations", "family-instruct", "smollm2-generations", "smollm2-instruct")
#: name in figures/ → (run, figure)
PUBLISHED = {
    "k_curve": ("family-generations", "k_curve"),
    "against_chance": ("study-generations-best-0", "against_chance"),
    "rule_curves": ("family-generations", "rule_curves"),
    "gain_against_kl": ("family-generations", "gain_against_kl"),
    "planted_benchmark": ("bench-planted", "planted_benchmark"),
    "shift_heatmap_smollm2": ("smollm2-shifts", "heatmap_magnitude"),
    "volcano_smollm2": ("smollm2-shifts", "volcano"),
    "consistency_smollm2": ("smollm2-shifts", "consistency"),
    "lorenz_smollm2": ("smollm2-shifts", "lorenz"),
    "patch_versus_graft": ("family-effects", "patch_versus_graft"),
    "heads_against_mlps": ("family-heads-vs-mlps", "heads_against_mlps"),
    "strength_curve": ("family-strengths", "strength_curve"),
    "budget_grid": ("family-strengths", "budget_grid"),
}


def finished(names: list[str]) -> list[Path]:
    """The runs of these names, or all that are finished."""
    folders = [RUNS / name for name in names] or sorted(p for p in RUNS.iterdir() if p.is_dir())
    return [folder for folder in folders if names or kind_of(folder) is not None]


def differing(kept: Path, make: Callable[[Path], object], alone: bool = True) -> list[str]:
    """The files of a folder that are not what ``make`` writes, that it lacks, and, where none are there but such
    (``alone``), that it has too many."""
    with tempfile.TemporaryDirectory() as out:
        make(Path(out))
        made = {p.name: p.read_bytes() for p in Path(out).iterdir()}
    there = {p.name: p.read_bytes() for p in kept.iterdir() if alone or p.name in made}
    return [
        str((kept / name).relative_to(ROOT)) for name in sorted({*made, *there}) if made.get(name) != there.get(name)
    ]


def published(folders: list[Path]) -> dict[Path, Path]:
    """Where the published figures of some runs come from → where they go."""
    names = {folder.name for folder in folders}
    return {
        RUNS / run / "figures" / f"{figure}.{suffix}": FIGURES / f"{name}.{suffix}"
        for name, (run, figure) in PUBLISHED.items()
        if run in names
        for suffix in SUFFIXES
    }


def draw_across(folder: Path) -> None:
    """The figures of several runs: the paper's rows beside our own, and rules over their random sets."""
    runs = [RUNS / name for name in BESIDE_THE_PAPER]
    rows = beside_reported(runs)
    title = "arXiv 2602.16189, as reported, and this project's runs"
    known = ", ".join(f"{run.name} {fingerprint_of(run)}" for run in runs)
    save_figure(reported_rows(rows, title=title)[0], folder, "reported_rows", rows, run=known)
    table = runs_table(runs)
    table = table[table.random_n.notna()]
    # searches learned on the questions that chose K: a ceiling, and no rule that ranks beforehand
    table = table[[get_rule(rule).splits[0] != "choose" for rule in table["rule"]]]
    table["label"] = (
        table.run + ": " + table["rule"] + ", " + table.k.astype(str) + " of " + table.candidates.astype(str)
    )
    figure, _ = run_rows(table, title="Rules against their matched random sets, on test")
    save_figure(figure, folder, "run_rows", table, run=known)
    study = study_rows()
    if len(study):
        known = ", ".join(f"{name} {fingerprint_of(RUNS / name)}" for name in dict.fromkeys(study.run))
        # a graft behind a gate, and one whose answers are scored otherwise, is another row's
        study = study[~study.run.str.contains("gated|number")]
        figure, _ = run_rows(study, title="The study: grafts and their controls, on test")
        save_figure(figure, folder, "study", study, run=known)


def main() -> None:
    check = "--check" in sys.argv
    folders = finished([a for a in sys.argv[1:] if not a.startswith("--")])
    wrong = []
    for folder in folders:
        if check:
            wrong += differing(folder / "figures", partial(draw, folder))
            continue
        names = draw(folder)
        for stale in (p for p in (folder / "figures").iterdir() if p.stem not in names):
            stale.unlink()
        print(f"{folder.name}: {', '.join(names)}")
    if check:
        wrong += differing(FIGURES, draw_across, alone=False)
    else:
        draw_across(FIGURES)
    for source, target in published(folders).items():
        if not check:
            shutil.copy(source, target)
        elif not target.exists() or source.read_bytes() != target.read_bytes():
            wrong.append(str(target.relative_to(ROOT)))
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not what the tables give; run python scripts/make_figures.py")


if __name__ == "__main__":
    main()
