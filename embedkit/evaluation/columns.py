"""Columns: rows of cells as aligned lines of a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from embedkit.text import printable

NAME_WIDTH = 40


def align_columns(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Return rows of cells as aligned lines.

    Parameters
    ----------
    rows : sequence of sequence of str
        As many cells in each row, the header among them.
    alignment : str
        ``<`` or ``>`` for each column.

    Returns
    -------
    list of str
        One line a row, without blanks at its end.

    Examples
    --------
    >>> from embedkit.evaluation.columns import align_columns
    >>> align_columns([["class", "rows"], ["cat", "7"]], "<>")
    ['class  rows', 'cat       7']
    """
    widths = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text + " " * (width - _cells(text)) if side == "<" else " " * (width - _cells(text)) + text
            for text, width, side in zip(row, widths, alignment, strict=True)
        ).rstrip()
        for row in rows
    ]


def short_name(text: str) -> str:
    """Return a name from a file fit for a table: printable, and not longer than a column."""
    escaped = printable(text)
    return escaped if len(escaped) <= NAME_WIDTH else escaped[: NAME_WIDTH - 3] + "..."


def _cells(text: str) -> int:
    """Return how many terminal cells a text takes: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
