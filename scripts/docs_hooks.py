"""Hooks of the documentation's build: pages that lie beside docs/ (measurements, runs, figures) come along.

Links from ``docs/`` to ``../benchmarks``, ``../runs`` and ``../figures`` lead to the files themselves where pages are
read in the repository. In the site those files are pages below ``measured/``, with the same folders, so that links
among them hold.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = "measured"
_OUT = re.compile(r"(\]\(|src=\")\.\./((?:benchmarks|runs|figures)/[^)#\s\"]+)")
_LINK = re.compile(r"(?:\]\(|src=\")([^)#\s\"]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to, and what those pages link to."""
    from mkdocs.structure.files import File

    wanted = [
        path for page in (ROOT / "docs").glob("*.md") for _, path in _OUT.findall(page.read_text(encoding="utf-8"))
    ]
    known: set[str] = set()
    while wanted:
        path = wanted.pop()
        if path in known or not (ROOT / path).is_file():
            continue
        known.add(path)
        files.append(File.generated(config, f"{PLACE}/{path}", abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            for link in _LINK.findall((ROOT / path).read_text(encoding="utf-8")):
                target = (ROOT / path).parent.joinpath(link).resolve()
                if "://" not in link and target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs"):
                    wanted.append(target.relative_to(ROOT).as_posix())
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Have links lead to where the files are in the site."""
    if page.file.src_uri.startswith(f"{PLACE}/"):
        # from measured/benchmarks/README.md to statistics.md
        depth = page.file.src_uri.count("/")
        return re.sub(r"\]\((?:\.\./)+docs/", "](" + "../" * depth, markdown)
    return _OUT.sub(rf"\g<1>{PLACE}/\g<2>", markdown)
