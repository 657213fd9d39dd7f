"""Write the table of docs/rules.md from the registry.

python scripts/update_rules.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from mechtransplant.ranking import rules_frame

PATH = Path(__file__).resolve().parent.parent / "docs" / "rules.md"
BEGIN, END = "<!-- rules: scripts/update_rules.py -->\n", "<!-- end of rules -->\n"


def table() -> str:
    """Every rule as a row."""
    head = ["rule", "score", "needs", "cost", "high means", "ranks on", "kinds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rules_frame().to_dict("records"):
        what = f"{row['what']} {row['equation']}".replace("|", "\\|").replace("``", "`")
        cells = [f"`{row['rule']}`", what, row["needs"], row["cost"], row["high"], f"`{row['split']}`", row["kinds"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n" + "\n".join(lines) + "\n\n"


def updated(text: str) -> str:
    """The page with the table as the registry has it now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main() -> None:
    text = PATH.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if updated(text) == text else "docs/rules.md is not what the registry says: scripts/update_rules.py")
    PATH.write_text(updated(text), encoding="utf-8")


if __name__ == "__main__":
    main()
