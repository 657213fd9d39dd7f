"""The web page of a finished folder: one file of HTML with its style, its figures and a sorting script inside."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any

from mechtransplant import __version__
from mechtransplant.errors import UsageError
from mechtransplant.experiment.cells import write_atomically
from mechtransplant.report.finished import Finished, Picture, Section, read_finished

_ASSETS = Path(__file__).parent / "assets"


def write_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write a finished folder's page, ``report.html`` in the folder by default, and return its path.

    The page needs no network and no other file, follows the reader's light or dark setting, and can be printed. Equal
    folders give equal bytes.

    Raises UsageError for what is no finished folder, and where nothing can be written.
    """
    finished = read_finished(folder)
    path = Path(out) if out is not None else finished.folder / "report.html"
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give --out the name of a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}: make it first, or choose another --out")
    try:
        write_atomically(path, page_of(finished))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    return path


def page_of(finished: Finished) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    placed, last = _placed(finished)
    sections = [
        {"id": _slug(section.title), "title": section.title, "body": _html(section.text), "pictures": pictures}
        for section, pictures in placed
    ]
    return environment.get_template("page.html").render(
        title=finished.title,
        lead=_html(finished.lead),
        sections=sections,
        pictures=last,
        graft=finished.graft,
        command=finished.command,
        kind=finished.kind,
        config=finished.config,
        facts=_facts(finished.environment),
        version=__version__,
        made_with=(finished.environment.get("starts") or [{}])[-1].get("mechtransplant", __version__),
        style=(_ASSETS / "page.css").read_text(encoding="utf-8"),
        script=(_ASSETS / "sort.js").read_text(encoding="utf-8"),
    )


def _placed(finished: Finished) -> tuple[list[tuple[Section, list[dict[str, Any]]]], list[dict[str, Any]]]:
    """Every section with its figures, and the figures that belong to none."""
    placed: list[tuple[Section, list[dict[str, Any]]]] = [(section, []) for section in finished.sections]
    last: list[dict[str, Any]] = []
    for picture in finished.pictures:
        where = [p for section, p in placed if picture.section and section.title.startswith(picture.section)]
        (where[0] if where else last).append(_shown(picture))
    return placed, last


def _shown(picture: Picture) -> dict[str, Any]:
    source = base64.b64encode(picture.svg).decode()
    width = re.search(rb'<svg[^>]*\swidth="([\d.]+)pt"', picture.svg)
    # points → CSS pixels; text of 8 points is small on a screen, and smaller than 7 is not read
    printed = float(width[1]) * 4 / 3 if width else 640
    sizes = {"width": round(1.4 * printed), "least": round(0.85 * printed)}
    return {"name": picture.name, "source": source, "caption": picture.caption, "data": picture.data, **sizes}


def _html(text: str) -> Any:
    """Markdown as HTML; tables can be sorted, and scroll by themselves where the page is narrow."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    rendered = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    rendered = rendered.replace("<table>", '<div class="scroll" tabindex="0"><table class="sortable">')
    # every page of this project is made of our own words and of names, which MarkdownIt escapes
    return Markup(rendered.replace("</table>", "</table></div>"))


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", html.unescape(title).lower()).strip("-") or "section"


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of what the numbers depend on: weights, questions, versions, machines."""
    found = [(f"weights, {role}", value) for role, value in environment.get("weights", {}).items()]
    asked = environment.get("splits") or environment.get("questions") or {}
    # one set of questions, or several by their part
    for role, split in ({"all": asked} if "fingerprint" in asked else asked).items():
        found.append((f"questions, {role}", f"{split['n']} ({split['fingerprint']})"))
    for at, start in enumerate(environment.get("starts", []), 1):
        packages = ", ".join(f"{name} {version}" for name, version in start.get("packages", {}).items())
        machine = ", ".join(f"{key} {start[key]}" for key in ("python", "machine", "threads") if start.get(key))
        found.append((f"start {at}", f"mechtransplant {start.get('mechtransplant', '?')}; {packages}; {machine}"))
    return found
