"""Write the tables of the study into docs/, from the committed runs.

    python scripts/update_study.py [--check]

Between two markers of a page stands what the runs say, and nothing else; ``--check`` writes nothing and fails where a
page says something else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechtransplant.experiment import reported_power

ROOT = Path(__file__).resolve().parent.parent


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def power() -> str:
    """The paper's ten rows, and how likely 50 or 500 questions are to show them."""
    rows = []
    for row in reported_power().to_dict("records"):
        chance = [f"{100 * row[f'{what}_{n}']:.0f} %" for n in (50, 500) for what in ("kept", "independent")]
        shares = [f"{row[f'{role}_accuracy']:.0f}" for role in ("target", "source", "after")]
        rows.append(
            [row["pair"].capitalize(), row["max_new_tokens"], row["direction"], *shares, row["best_k"], *chance]
        )
    columns = ["pair", "tokens", "direction", "target, %", "source, %", "after, %", "best K"]
    return markdown([*columns, *(f"{what}, n = {n}" for n in (50, 500) for what in ("kept", "independent"))], rows)


#: page → marker → what stands there
SECTIONS: dict[str, dict[str, Callable[[], str]]] = {"paper-recipes.md": {"power": power}}


def updated(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """A page with its sections as the runs have them now."""
    for name, make in sections.items():
        begin, end = f"<!-- {name}: scripts/update_study.py -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + "\n" + make() + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    wrong = []
    for page, sections in SECTIONS.items():
        path = ROOT / "docs" / page
        text = path.read_text(encoding="utf-8")
        new = updated(text, sections)
        if "--check" not in sys.argv:
            path.write_text(new, encoding="utf-8")
        elif new != text:
            wrong.append(f"docs/{page}")
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not what the runs say: python scripts/update_study.py")


if __name__ == "__main__":
    main()
