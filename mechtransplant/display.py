"""What notebooks show of this project's objects: small tables in the notebook's own style, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def html_table(
    rows: Iterable[Sequence[Any]], head: Sequence[str] = (), title: str = "", notes: Sequence[str] = ()
) -> str:
    """A table whose rows begin with their name; everything is text, and nothing in it is taken for markup."""
    lines = [f"<p><strong>{escape(title)}</strong></p>"] if title else []
    lines.append("<table>")
    if head:
        lines.append("<thead><tr>" + "".join(f"<th>{_text(h)}</th>" for h in head) + "</tr></thead>")
    lines.append("<tbody>")
    for name, *cells in rows:
        shown = "".join(f'<td style="text-align: left">{_text(cell)}</td>' for cell in cells)
        lines.append(f'<tr><th scope="row" style="text-align: left">{_text(name)}</th>{shown}</tr>')
    lines.append("</tbody></table>")
    lines += [f"<p>{escape(note)}</p>" for note in notes]
    return "\n".join(lines)


def percent(share: float, interval: tuple[float, float] | None = None) -> str:
    """``0.25`` → "25.0 %", with its interval where there is one."""
    said = f"{100 * share:.1f} %"
    return said if interval is None else f"{said} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _text(value: Any) -> str:
    return escape("–" if value is None else str(value))
