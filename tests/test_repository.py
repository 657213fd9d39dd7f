"""The repository keeps its own promises: versions agree, nothing leaks from a machine, floors hold, import is cheap."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}

FLOORS = {
    "errors": 0,
    "display": 0,
    "notebook": 0,
    "progress": 0,
    "interrupts": 0,
    "modules": 1,
    "weights": 1,
    "tasks": 1,
    "significance": 1,
    "figures": 2,
    "engine": 1,
    "pair": 2,
    "evaluation": 2,
    "localization": 2,
    "activations": 3,
    "grafting": 3,
    "shifts": 4,
    "patching": 4,
    "export": 4,
    "side_effects": 4,
    "ranking": 5,
    "controls": 6,
    "experiment": 7,
    "selection": 0,
    "cli": 9,
    "report": 8,
    "explorer": 8,
}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(CONDA_NAMES.get(r.name, r.name)): r for r in found}


def test_environment_yml_agrees_with_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [d for d in environment["dependencies"] if isinstance(d, str) and not re.match(r"(python|pip)\b", d)]
    pip = [d for part in environment["dependencies"] if isinstance(part, dict) for d in part["pip"]]
    assert "-e ." in pip
    given = requirements(conda + [d for d in pip if not d.startswith("-")])
    for name, wanted in requirements(project()["dependencies"]).items():
        assert name in given, f"environment.yml lacks {name}"
        assert given[name].specifier == wanted.specifier, f"{name}: {given[name]} against {wanted}"


def test_constraints_satisfy_pyproject() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
            assert match, f"not a plain pin: {line}"
            pins[canonicalize_name(match[1])] = match[2]
    wanted = requirements(project()["dependencies"] + project()["optional-dependencies"]["dev"])
    for name, requirement in wanted.items():
        assert name in pins, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} against {pins[name]}"


def test_tracked_files_name_no_machine_path_and_no_registry() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # put together here, so that this file does not contain them
    paths = "|".join(["work", "root", "opt/" + "pypi", "opt/" + "wheels"])
    hosts = "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "download" + r"\.pytorch\.org", "index" + "-url"])
    banned = re.compile(rf"(?<![\w.~*\-])/(?:{paths})/|{hosts}".encode())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    hits = []
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        if not path.is_file() or path.suffix in {".safetensors", ".gguf", ".png", ".parquet"}:
            continue
        data = path.read_bytes()
        hits += [f"{name}:{data[: m.start()].count(10) + 1}: {m[0].decode()}" for m in banned.finditer(data)]
    assert not hits, "\n".join(hits)


def sources() -> list[tuple[str, Path]]:
    """(name on its floor, file) of every file of the package but its front door."""
    package = ROOT / "mechtransplant"
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts not in {("__init__",), ("__main__",)} and "_models" not in parts:
            found.append((parts[0], path))
    return found


def imported(path: Path) -> set[str]:
    """The package's own files that a file needs when it runs: imports for type checkers alone do not count."""
    sys.path.insert(0, str(ROOT))
    import mechtransplant

    home = mechtransplant._HOME
    found = set()
    relative = path.relative_to(ROOT).with_suffix("").parts
    package = relative[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {id(inner) for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, a.name] for a in node.names]
        else:
            continue
        for name in names:
            if name[0] == "mechtransplant" and len(name) > 1 and name[1] != "__version__":
                found.add(home.get(name[1], name[1]) if len(name) == 2 else name[1])
    return found


@pytest.mark.parametrize(("name", "path"), sources(), ids=lambda v: v.stem if isinstance(v, Path) else v)
def test_file_imports_only_from_floors_below(name: str, path: Path) -> None:
    assert name in FLOORS, f"{path.name} has no floor: give it one in FLOORS and in the design"
    for other in imported(path) - {name}:
        assert other in FLOORS, f"{path.name} imports mechtransplant.{other}, which has no floor"
        assert FLOORS[other] < FLOORS[name], f"{path.name} (floor {FLOORS[name]}) imports {other} ({FLOORS[other]})"


def test_import_is_cheap() -> None:
    code = "import mechtransplant, sys; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]"
    cost = re.search(r"\|\s*(\d+) \| mechtransplant$", run.stderr, re.MULTILINE)
    assert cost, run.stderr
    assert int(cost[1]) < 300_000


def test_readme_has_the_numbers_of_the_committed_runs() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/update_readme.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_rank_among_the_same_projections_is_that_of_the_graft_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from update_readme import same_projections

    run = ROOT / "runs" / "smollm2-generations"
    said = "72.3 (68.0 – 76.6), thirds: 100 of 100; at strength 1.5 77.3 (75.0 – 81.2): 72 of 100"
    assert same_projections(run, "integrated_gradient", 32) == said
    # whose sets the graft's strength suits best has them once
    assert same_projections(run, "lae", 128) == "77.3 (74.2 – 79.7), thirds: 0 of 100"
    # another K is another graft, and `greedy` has no random sets there
    assert same_projections(run, "integrated_gradient", 64) == same_projections(run, "greedy", 32) == "–"
    assert same_projections(run.with_name("family-strengths"), "lae", 14) == "–"


def test_the_rules_page_is_what_the_registry_says() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/update_rules.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_study_has_the_numbers_of_the_committed_runs() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/update_study.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_benchmark_page_has_the_numbers_of_the_committed_results() -> None:
    done = subprocess.run([sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_notebook_way_in_the_readme_works(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in text.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "README.md", "exec"), names)
    assert "TIR" in capsys.readouterr().out
    assert len(names["table"]) == 36 and (names["specific"].test == "control").all()


def test_the_tutorial_works(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in text.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "tutorial.md", "exec"), names)
    assert "McNemar" in capsys.readouterr().out and len(names["table"]) == 36
    assert names["outcome"].after_accuracy > names["before"].accuracy


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[str(p.relative_to(ROOT / "configs").with_suffix("")) for p in CONFIGS])
def test_every_config_is_read_and_says_what_it_is_for(path: Path) -> None:
    from mechtransplant.experiment import read_config, read_screen
    from mechtransplant.experiment.planted_report import read_planted_config

    kinds = {"screen": read_screen, "bench": read_planted_config}
    read = next((read for part, read in kinds.items() if part in path.stem), read_config)
    read(path)
    assert path.read_text(encoding="utf-8").startswith("# "), "its first line says what it is for"


def test_every_page_is_in_the_site_and_every_link_leads_somewhere() -> None:
    import yaml

    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    listed = re.findall(r"([\w-]+\.md)", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(listed) == sorted(pages)
    for name, text in {**pages, "../README.md": (ROOT / "README.md").read_text(encoding="utf-8")}.items():
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if not re.match(r"[a-z]+:", link):
                assert (ROOT / "docs" / name).parent.joinpath(link).exists(), f"{name} links to {link}"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_committed_notebooks_were_run_and_show_their_figures(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    counts = [c["execution_count"] for c in cells]
    assert counts == list(range(1, len(cells) + 1)), "run from top to bottom in a fresh kernel"
    for cell in cells:
        assert all(o["output_type"] != "error" for o in cell["outputs"])
        if "".join(cell["source"]).splitlines()[-1] == "figure":
            assert any("image/png" in o.get("data", {}) for o in cell["outputs"]), "the figure is not in the notebook"


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_a_notebook_has_a_figure_and_ends_with_what_was_found(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    heads = [at for at, c in enumerate(cells) if "## What it says" in "".join(c["source"])]
    (last,) = heads
    said = "".join(
        text for c in cells[last:] if c["cell_type"] == "code" for o in c["outputs"] for text in o.get("text", [])
    )
    assert re.search(r"\d", said) and len(said.split()) > 10, "the last cells print no finding"
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])), "no figure"


def test_the_reference_has_every_public_name() -> None:
    import mechtransplant as mt

    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = {line.rsplit(".", 1)[1] for line in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    assert set(mt._HOME) <= named and {n for n in mt.figures.__all__ if n.islower()} <= named


def test_the_configuration_page_names_every_key() -> None:
    import yaml

    from mechtransplant.experiment.config import RunConfig, parse_config

    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = text.split("## A task as a mapping")[0]
    named = {name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(RunConfig.model_fields)
    example = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert parse_config({"pair": "family/generations", **example}).task == parse_config({"pair": "x", **example}).task
