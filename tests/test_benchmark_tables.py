"""Results of benchmarks: noted where they come from, and a page of another folder's results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import performance  # noqa: E402
import tables  # noqa: E402


def test_results_say_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.save(pd.DataFrame({"seconds": [1 / 3]}), tmp_path / "new" / "b.csv", "%.3g")
    tables.note(tmp_path / "new" / "a.csv")
    assert (tmp_path / "new" / "b.csv").read_text() == "seconds\n0.333\n"
    made = json.loads((tmp_path / "new" / tables.MADE).read_text())
    assert list(made) == ["a.csv", "b.csv"]
    assert made["b.csv"]["cores"] == os.cpu_count() and made["b.csv"]["commit"] == tables.COMMIT
    monkeypatch.setattr(performance, "RESULTS", tmp_path / "new")
    assert f"| `b.csv` | {made['b.csv']['date']} | {tables.COMMIT} |" in performance.made()
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    assert performance.made() == ""


def test_a_commit_is_marked_where_code_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.commit() == "no repository"

    def git(*words: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "a.csv").write_text("x\n1\n")
    (tmp_path / "code.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    at = git("rev-parse", "--short=7", "HEAD").strip()
    assert tables.commit() == at
    (results / "a.csv").write_text("x\n2\n")
    assert tables.commit() == at
    (tmp_path / "code.py").write_text("x = 2\n")
    assert tables.commit() == at + "+"


def test_totals_beyond_the_measured_prompts_go_on_as_the_last_ones(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {"shape": ["large"] * 2 + ["small"] * 2, "device": "gpu", "dtype": "bfloat16", "prompts": [16, 128, 128, 1024],
         "total": [6.0, 20.0, 8.0, 60.0]}
    )  # fmt: skip
    said = performance.extrapolated(rows)
    # 20 s + 896 prompts at 14 s for 112 of them
    assert said == (
        "large (gpu, bfloat16) with 1,024 prompts about 132 s, each prompt beyond 128 at the cost of those between 16 "
        "and 128"
    )
    assert performance.extrapolated(rows[rows["shape"] == "small"]) == ""


def test_another_folders_results_have_a_page_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", folder)
    before = (ROOT / "benchmarks" / "README.md").read_bytes()
    cost = pd.read_csv(folder / "cost.csv")
    cost["total"] = 4242.0
    cost.to_csv(folder / "cost.csv", index=False)
    command = [sys.executable, "benchmarks/report.py", "--results", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "4242.0" in page and page in done.stdout and "](../" not in page
    pictures = [line.partition("](")[2].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert len(pictures) == 4 and all((folder / picture).exists() for picture in pictures)
    assert (ROOT / "benchmarks" / "README.md").read_bytes() == before
