"""In a real browser: the report at two widths, light and dark; JupyterLab with notebook 01; the explorer.

Needs Chromium and Playwright's client (``pip install playwright``); skipped without them, but for CI, which sets
``MECHTRANSPLANT_BROWSER=required``. Screenshots are kept in ``build/screenshots`` (or
``$MECHTRANSPLANT_SCREENSHOTS``), to be looked at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mechtransplant.report import write_page

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = os.environ.get("MECHTRANSPLANT_BROWSER") == "required"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        if REQUIRED:
            raise
        pytest.skip("Playwright's client is not installed: pip install playwright")
    if CHROMIUM is None:
        assert not REQUIRED, "no Chromium on this machine"
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def screenshot() -> Any:
    folder = Path(os.environ.get("MECHTRANSPLANT_SCREENSHOTS") or ROOT / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)

    def take(page: Any, name: str, **options: Any) -> None:
        page.screenshot(path=folder / f"{name}.png", **options)

    return take


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_the_report(browser: Any, screenshot: Any, tmp_path: Path, width: int, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    path = write_page(ROOT / "runs" / "family-generations", tmp_path / "report.html")
    page.goto(path.as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    # nothing is wider than the page but what scrolls by itself
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(images) == len(list((ROOT / "runs" / "family-generations" / "figures").glob("*.svg")))
    assert all(done and natural > 0 and shown > 250 for done, natural, shown in images)
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, behind = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (text < behind) == (scheme == "light") and abs(text - behind) > 400
    # a click sorts by the column's numbers, down and then up, and a third puts the rows back
    table = page.locator("#controls table")
    rows = table.locator("tbody tr td:nth-child(2)")
    before = rows.all_inner_texts()
    heads = table.locator("th button")
    heads.nth(0).click()
    down = [float(t.split()[0]) for t in rows.all_inner_texts()]
    assert down == sorted(down, reverse=True) and table.locator("th[aria-sort=descending]").count() == 1
    heads.nth(0).click()
    up = [float(t.split()[0]) for t in rows.all_inner_texts()]
    assert up == sorted(up)
    heads.nth(0).click()
    assert rows.all_inner_texts() == before and said == []
    screenshot(page, f"report-{width}-{scheme}", full_page=True)
    page.close()


@pytest.mark.parametrize("run", ["smollm2-shifts", "family-effects", "family-heads-vs-mlps", "bench-planted"])
def test_the_report_of_every_kind(browser: Any, screenshot: Any, tmp_path: Path, run: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    path = write_page(ROOT / "runs" / run, tmp_path / "report.html")
    page.goto(path.as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shown = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(shown) == len(list((ROOT / "runs" / run / "figures").glob("*.svg"))) and all(shown)
    screenshot(page, f"report-{run}", full_page=True)
    # on paper: black on white, and the tables whole
    page.emulate_media(media="print", color_scheme="dark")
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, behind = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert text < 200 and (behind > 700 or behind == 0), colours
    assert page.pdf(format="A4")[:4] == b"%PDF"
    page.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """JupyterLab over a copy of the notebooks: (its address, the folder)."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder, dirs_exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", f"--notebook-dir={folder}"]
    command += ["--ServerApp.token=", "--expose-app-in-browser", "--allow-root", "--ServerApp.port_retries=0"]
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / ".config"), "MECHTRANSPLANT_SMOKE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1)
                break
            except OSError:
                assert process.poll() is None, "JupyterLab ended"
                time.sleep(0.5)
        yield address, folder
    finally:
        process.terminate()
        process.wait(20)


def opened(browser: Any, lab: tuple[str, Path], name: str) -> Any:
    """A page with the notebook, whose kernel is ready."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab[0]}/lab/tree/{name}?reset")
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.content?.widgets?.length > 1", timeout=120_000)
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.ready")
    return page


RUN_ALL = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
#: execution count of every code cell, and whether any of its outputs is an error
STATE = """
() => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === "code").map(c => [
  c.model.executionCount, [...Array(c.model.outputs.length).keys()].some(i => c.model.outputs.get(i).type === "error")
])
"""


@pytest.mark.slow
def test_jupyterlab_runs_notebook_01_to_its_end(browser: Any, screenshot: Any, lab: tuple[str, Path]) -> None:
    name = next(p.name for p in sorted((ROOT / "notebooks").glob("01-*.ipynb")))
    page = opened(browser, lab, name)
    page.evaluate(RUN_ALL)
    cells = page.evaluate(STATE)
    assert [count for count, _ in cells] == list(range(1, len(cells) + 1)) and not any(wrong for _, wrong in cells)
    assert page.locator(".jp-OutputArea-output img").count() >= 1
    screenshot(page, "notebook-01")
    page.close()


def explorer_of(run: Path, browser: Any, lab: tuple[str, Path]) -> tuple[Any, Any]:
    """JupyterLab with the explorer of a run, and an empty cell below it."""
    import nbformat

    cells = [
        nbformat.v4.new_code_cell(f"import mechtransplant as mt\nmt.explore({str(run)!r})"),
        nbformat.v4.new_code_cell(""),
    ]
    notebook = nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python"}}
    )
    (lab[1] / "explore.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    page = opened(browser, lab, "explore.ipynb")
    page.evaluate(RUN_ALL)
    said = page.locator(".jupyter-widgets.widget-html-content, .widget-html").last
    said.wait_for(timeout=60_000)
    return page, said


def has_changed(page: Any, before: str) -> None:
    page.wait_for_function("before => !document.querySelector('.jp-OutputArea').innerText.includes(before)", arg=before)


@pytest.mark.slow
def test_the_explorer_answers_a_click_and_sliders(browser: Any, screenshot: Any, lab: tuple[str, Path]) -> None:
    page, said = explorer_of(ROOT / "runs" / "family-strengths", browser, lab)
    first = said.inner_text()
    assert "highest by " in first
    buttons = page.locator("button.jupyter-button")
    assert buttons.count() == 28 and "score" in (buttons.first.get_attribute("title") or "")
    buttons.nth(3).click()
    has_changed(page, first)
    clicked = said.inner_text()
    assert "Your own" in clicked and "rank" in clicked
    # one step along the slider of K, and one along that of strength
    handles = page.locator(".widget-slider .noUi-handle, .ui-slider-handle")
    handles.nth(0).focus()
    page.keyboard.press("ArrowRight")
    has_changed(page, clicked)
    moved = said.inner_text()
    assert "highest by " in moved
    handles.nth(1).focus()
    page.keyboard.press("ArrowRight")
    has_changed(page, moved)
    stronger = said.inner_text()
    strengths = [float(re.search(r"strength ([\d.]+)", text)[1]) for text in (moved, stronger)]  # type: ignore[index]
    assert strengths[1] > strengths[0] and "accuracy on choose" in stronger
    screenshot(page, "explorer")
    page.close()
