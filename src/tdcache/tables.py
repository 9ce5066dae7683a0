"""Tables of selections, contexts and hook points, as text for a terminal and as HTML for a notebook.

All printing goes through here so that tables look the same everywhere and user-chosen names are always escaped in HTML.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from html import escape

__all__ = ["html_note", "html_table", "shorten", "text_table", "without_addresses"]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> list[str]:
    r"""A header line and one line per row; columns are as wide as their widest cell.

    Args:
        head: the names of the columns.
        rows: cells, as many as there are names.
        right: the names of the columns that are set to the right.

    >>> print(*text_table(("path", "n"), [("a.b", "1"), ("c", "10")], right=("n",)), sep="\n")
    path   n
    a.b    1
    c     10
    """
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    pad = [str.rjust if name in right else str.ljust for name in head]
    return [
        "  ".join(to(cell, width) for to, cell, width in zip(pad, row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def html_table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = (), limit: int = 60
) -> str:
    """The same as HTML for a notebook; every cell is escaped, and rows past ``limit`` are counted instead of shown."""
    styles = [f"text-align:{'right' if name in right else 'left'}" for name in head]
    lines = [_row("th", head, styles), *(_row("td", row, styles) for row in rows[:limit])]
    if len(rows) > limit:
        lines.append(f'<tr><td colspan="{len(head)}">and {len(rows) - limit} more</td></tr>')
    return f"<div>{html_note(title)}<table>{''.join(lines)}</table></div>"


def html_note(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def _row(tag: str, cells: Sequence[str], styles: Sequence[str]) -> str:
    inner = "".join(f'<{tag} style="{style}">{escape(cell)}</{tag}>' for cell, style in zip(cells, styles, strict=True))
    return f"<tr>{inner}</tr>"


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters, so that the repr of what a user passed does not fill a message."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def without_addresses(text: str) -> str:
    """A repr that reads the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)
