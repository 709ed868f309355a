"""What all benchmarks share and what needs no torch: errors, figures, tables and reports."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Say = Callable[[str], None]
"""Takes one line of progress."""
Columns = Sequence[tuple[str, str, str]]
"""Title, key in a row and format of each of a table's columns; see columns."""


class BenchError(Exception):
    """The benchmark cannot be run as asked, or a server or request of it failed."""


class UsageError(Exception):
    """An option has a value that is not known; the command ends with its usage and status 2."""


class Refused(Exception):
    """Nothing is reported: results are wrong, or the machine was too busy to measure on."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a benchmark prints: ``text`` for people, then ``document`` as one line of JSON.

    ``page`` is what --markdown writes to a file, None if there is nothing to write.
    """

    text: str
    document: Mapping[str, Any]
    page: str | None = None

    def output(self) -> str:
        """All of it, as printed."""
        return f"{self.text}{json.dumps(self.document)}\n"


def today() -> str:
    """Date and time in UTC, as reports give it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def columns(header: str) -> Columns:
    """Columns of a table from its header: each title with the key and format of its values.

    Such as "mode {mode} | x off {speed_up:.3f}".
    """
    cells = [cell.rpartition(" ") for cell in header.split(" | ")]
    return [
        (title, form[form.index("{") + 1 :].split(":")[0].rstrip("}"), form)
        for title, _, form in cells
    ]


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """Rows as a Markdown table; a figure that does not apply is a dash."""
    head = [title for title, _, _ in columns]
    body = [
        [form.format_map(row) if row.get(key) is not None else "-" for _, key, form in columns]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def exit_efficiency(speed_up: float, num_layers: int, mean_depth: float) -> float | None:
    """How much of the skipped work came back as time: (speed-up - 1) / (L / depth - 1).

    None when less than a hundredth was skipped: the quotient would be noise.
    """
    possible = num_layers / mean_depth - 1
    return (speed_up - 1) / possible if possible > 0.01 else None


def spread(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Smallest, median and largest ratio of pairs; None where a peer's figure is 0."""
    if 0 in theirs:
        return {"min": None, "median": None, "max": None}
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "min": round(min(found), 4),
        "median": round(statistics.median(found), 4),
        "max": round(max(found), 4),
    }
