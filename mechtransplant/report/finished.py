"""What a finished folder holds: the page in words, its figures, its graft, and how it can be made again."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError
from mechtransplant.experiment.drawing import kind_of
from mechtransplant.report.captions import caption_of

#: kinds whose command reads a config file; of the others every key of the config is an option
_FROM_FILE = {"run": "", "bench planted": "--config ", "screen": ""}


@dataclass(frozen=True)
class Section:
    """A part of the page, in Markdown."""

    title: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A figure of the folder; ``data``: the name of the CSV file that it was drawn from, if there is one."""

    name: str
    svg: bytes
    data: str | None

    @property
    def caption(self) -> str:
        """What it shows."""
        return caption_of(self.name).text

    @property
    def section(self) -> str:
        """How the title of its section begins."""
        return caption_of(self.name).section


@dataclass(frozen=True)
class Finished:
    """A finished folder; ``lead`` is what stands above the first section, ``graft`` what a run chose."""

    folder: Path
    kind: str
    title: str
    lead: str
    sections: tuple[Section, ...]
    pictures: tuple[Picture, ...]
    config: str
    environment: dict[str, Any]
    graft: dict[str, Any] | None

    @property
    def command(self) -> str:
        """What makes the folder again, from its ``config.yaml``."""
        import yaml

        if self.kind in _FROM_FILE:
            return f"mechtransplant {self.kind} {_FROM_FILE[self.kind]}config.yaml --out again"
        options = []
        for key, value in yaml.safe_load(self.config).items():
            if key == "pair" or value is None:
                continue
            listed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            options.append(f"--{key.replace('_', '-')} {shlex.quote(listed)}")
        pair = shlex.quote(str(yaml.safe_load(self.config)["pair"]))
        return " ".join([f"mechtransplant {self.kind} {pair}", *options, "--out again"])


def read_finished(folder: str | Path) -> Finished:
    """Read a folder that a command finished.

    Raises UsageError for what is no such folder, and for one whose command has not come to its end.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: give one that mechtransplant run (or shifts, effects, …) wrote")
    kind = kind_of(folder)
    if not (folder / "config.yaml").exists():
        raise UsageError(f"{folder} holds no config.yaml: give a folder that mechtransplant run (or shifts, …) wrote")
    if kind is None or not (folder / "summary.md").exists():
        raise UsageError(f"{folder} is not finished: start its command again")
    title, lead, sections = _parts((folder / "summary.md").read_text(encoding="utf-8"))
    if (folder / "compatibility.csv").exists():
        sections = (_the_pair(folder / "compatibility.csv"), *sections)
    environment = folder / "environment.json"
    return Finished(
        folder,
        kind,
        title,
        lead,
        sections,
        tuple(_pictures(folder / "figures")),
        (folder / "config.yaml").read_text(encoding="utf-8"),
        json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {},
        _graft(folder / "outcome.json"),
    )


def _parts(page: str) -> tuple[str, str, tuple[Section, ...]]:
    """(title, lead, sections) of a page in Markdown."""
    first, *rest = page.split("\n## ")
    title, _, lead = first.removeprefix("# ").partition("\n")
    return (
        title.strip(),
        lead.strip(),
        tuple(Section(t.strip(), text) for t, _, text in (r.partition("\n") for r in rest)),
    )


def _the_pair(path: Path) -> Section:
    """The compatibility of the two models: what differs as a table, what is the same in a sentence."""
    import pandas as pd

    checks = pd.read_csv(path, dtype=str, keep_default_na=False)
    layers, checks = checks.iloc[-1], checks.iloc[:-1]
    same = checks[checks.verdict == "same"]
    lines = [
        f"{layers.target} {layers.what} of equal name and shape, of which {layers.verdict}: those can be grafted.",
        "",
    ]
    if len(same) < len(checks):
        lines += ["| what differs | source | target | in any graft |", "|---|---|---|---|"]
        for row in checks[checks.verdict != "same"].itertuples():
            source, target = (_code(value).replace("|", "\\|") for value in (row.source, row.target))
            lines.append(f"| {row.what} | {source} | {target} | {row.verdict} |")
    else:
        lines.append("Nothing else differs.")
    same_in_both = ", ".join(f"{row.what} {_code(row.source)}" for row in same.itertuples())
    return Section("The pair", "\n".join([*lines, "", f"The same in both: {same_in_both}."]))


def _code(value: Any) -> str:
    """A setting's value, that Markdown leaves as it is."""
    return "`" + str(value).replace("`", "'") + "`"


def _pictures(folder: Path) -> list[Picture]:
    found = []
    for path in sorted(folder.glob("*.svg")):
        data = path.with_suffix(".csv")
        found.append(Picture(path.stem, path.read_bytes(), data.name if data.exists() else None))
    return found


def _graft(path: Path) -> dict[str, Any] | None:
    """What a run chose at its largest token budget."""
    if not path.exists():
        return None
    chosen = json.loads(path.read_text(encoding="utf-8"))
    graft = dict(chosen[max(chosen, key=int)])
    # folders from before there were several operators
    operator = graft.get("operator", "replace")
    return {**graft, "operator": {"name": operator} if isinstance(operator, str) else operator}
