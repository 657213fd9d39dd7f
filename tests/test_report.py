"""A finished folder as one web page: whole, self-contained, the same every time; and what is refused."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from mechtransplant import cli
from mechtransplant.errors import UsageError
from mechtransplant.report import write_page
from mechtransplant.report.captions import caption_of
from mechtransplant.report.finished import read_finished

RUNS = Path(__file__).resolve().parents[1] / "runs"
FOLDERS = {
    "family-generations": "run",
    "smollm2-instruct": "run",
    "smollm2-shifts": "shifts",
    "family-effects": "effects",
    "family-heads-vs-mlps": "heads-vs-mlps",
    "bench-planted": "bench planted",
    "family-screen": "screen",
}
#: elements that have no end
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes; raises AssertionError for one that is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_kind_of_folder_has_a_page(name: str, tmp_path: Path) -> None:
    finished = read_finished(RUNS / name)
    assert finished.kind == FOLDERS[name]
    text = write_page(RUNS / name, tmp_path / "a.html").read_text(encoding="utf-8")
    assert write_page(RUNS / name, tmp_path / "b.html").read_text(encoding="utf-8") == text
    page = Page(text)
    # nothing comes from elsewhere
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text) and not page.all("link")[1:]
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    # every figure, in its own bytes, with words for those who cannot see it
    images = page.all("img")
    assert len(images) == len(list((RUNS / name / "figures").glob("*.svg"))) > 0
    drawn = {base64.b64decode(i["src"].partition(",")[2]) for i in images}
    assert drawn == {p.read_bytes() for p in (RUNS / name / "figures").glob("*.svg")}
    assert all(len(i["alt"]) > 40 for i in images)
    # every table of the page in words, and every section, which links lead to
    lines = (RUNS / name / "summary.md").read_text(encoding="utf-8").splitlines()
    tables = sum(line.startswith("| -") or line.startswith("|-") for line in lines)
    assert text.count('class="sortable"') == tables + ("what differs" in text) and tables > 0
    ids = [e["id"] for e in page.all("section") if "id" in e]
    links = [a["href"][1:] for a in page.all("a")]
    assert (
        len(ids) == len(set(ids))
        and set(ids) <= set(links)
        and sum(line.startswith("## ") for line in lines) <= len(ids)
    )
    assert finished.config.splitlines()[0] in text and str(RUNS.parent) not in text


def test_the_page_says_what_matches_between_the_two_models() -> None:
    checks = pd.read_csv(RUNS / "family-generations" / "compatibility.csv", dtype=str, keep_default_na=False)
    section = read_finished(RUNS / "family-generations").sections[0]
    assert section.title == "The pair"
    assert section.text.startswith("28 linear layers of equal name and shape, of which 28 differ in weights")
    differ = checks[~checks.verdict.isin(["same"]) & (checks.what != "linear layers")]
    rows = [line for line in section.text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(differ) > 0
    assert all(row.split(" | ")[0] == f"| {what}" for row, what in zip(rows, differ.what, strict=True))
    for row in checks[checks.verdict == "same"].itertuples():
        assert f"{row.what} `{row.source}`" in section.text


def test_the_page_of_a_run_says_what_the_run_says(tmp_path: Path) -> None:
    folder = RUNS / "family-generations"
    text = write_page(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    chosen = read_finished(folder).graft
    assert chosen is not None and all(f'"{module}"' in text for module in chosen["modules"])
    assert "<strong>Verdict.</strong>" in text and "beats 12 of 100 matched random sets" in text
    for title in ("Controls", "Side effects", "Rules", "How to reproduce", "The graft"):
        assert re.search(rf"<h2>{title}", text), title
    curve = text.index(caption_of("rule_curves").text)
    assert text.index('id="rules') < curve < text.index('id="side-effects')


def test_what_makes_the_folder_again(tmp_path: Path) -> None:
    assert read_finished(RUNS / "family-generations").command == "mechtransplant run config.yaml --out again"
    assert read_finished(RUNS / "bench-planted").command.startswith("mechtransplant bench planted --config config.yaml")
    # every option is one that the command has
    for name in ("smollm2-shifts", "family-effects", "family-heads-vs-mlps"):
        command = read_finished(RUNS / name).command.split()
        config = yaml.safe_load((RUNS / name / "config.yaml").read_text())
        assert command[:3] == ["mechtransplant", FOLDERS[name], config["pair"]]
        said = CliRunner().invoke(cli.app, [command[1], "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
        assert all(option in said.output for option in command if option.startswith("--")), said.output


@pytest.mark.parametrize("lost", ["folder", "config.yaml", "summary.md", "outcome.json"])
def test_what_is_no_finished_folder_is_refused(lost: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if lost != "folder":
        shutil.copytree(RUNS / "family-generations", folder, ignore=shutil.ignore_patterns("figures", lost))
    expected = {"folder": "is no folder", "config.yaml": "holds no config.yaml"}.get(lost, "is not finished")
    with pytest.raises(UsageError, match=expected):
        write_page(folder)
    assert not list(tmp_path.rglob("*.html"))


def test_where_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(RUNS / "family-effects", folder)
    said = CliRunner().invoke(cli.app, ["report", str(folder)])
    assert said.exit_code == 0 and (folder / "report.html").exists() and "report.html in a browser" in said.output
    for out, message in (
        (folder, "is a folder: give --out the name"),
        (tmp_path / "no" / "x.html", "there is no folder"),
    ):
        with pytest.raises(UsageError, match=message):
            write_page(folder, out)


def test_names_are_text_and_no_markup(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(RUNS / "family-effects", folder)
    page = (folder / "summary.md").read_text(encoding="utf-8")
    (folder / "summary.md").write_text(
        page.replace("# Patch", "# <script>alert(1)</script> Patch", 1) + "\n<b>bold</b>\n"
    )
    text = write_page(folder).read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<b>bold" not in text and "&lt;script&gt;alert" in text


def test_notebooks_are_found_or_the_command_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert CliRunner().invoke(cli.app, ["lab", "--no-browser"]).exit_code == 0
    assert started[0][:3] == [sys.executable, "-m", "jupyterlab"] and "--no-browser" in started[0]
    assert Path(started[0][3].partition("=")[2]).name == "notebooks"
    # options that are JupyterLab's own are passed on
    assert CliRunner().invoke(cli.app, ["lab", "--port", "9", "--allow-root"]).exit_code == 0
    assert started[1][-2:] == ["--port=9", "--allow-root"]
    with pytest.raises(UsageError, match="is no folder"):
        cli.pages._notebooks(tmp_path / "none")
