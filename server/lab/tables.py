"""Rows of figures as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Column = tuple[str, str, str]
"""Title, key in the row, and format of the value."""


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of ``rows``; a figure a row lacks is a dash."""
    head = [title for title, _, _ in columns]
    body = [
        [form.format(row[key]) if row.get(key) is not None else "-" for _, key, form in columns]
        for row in rows
    ]
    widths = [max(3, *(len(line[i]) for line in [head, *body])) for i in range(len(head))]
    lines = [head, ["-" * (width - 1) + ":" for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
