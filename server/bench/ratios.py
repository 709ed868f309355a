"""Offramp's figures over its peer's, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from offramp.server.bench.report import Column, table
from offramp.server.bench.rounds import Result

FIGURES = ("ttft_ms", "itl_p50_ms", "tokens_per_s")
_COLUMNS: tuple[Column, ...] = (
    ("Offramp / peer", "mode", "{}"),
    ("streams", "concurrency", "{}"),
    ("figure", "figure", "{}"),
    ("min", "min", "{:.3f}"),
    ("median", "median", "{:.3f}"),
    ("max", "max", "{:.3f}"),
)


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


def ratios(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each mode of Offramp, concurrency and figure; none without a peer."""
    peers = {result.concurrency: result for result in results if result.entry.is_peer}
    return [
        {
            "mode": result.entry.name,
            "concurrency": result.concurrency,
            "figure": figure,
            **spread(
                [getattr(item, figure) for item in result.rounds],
                [getattr(item, figure) for item in peers[result.concurrency].rounds],
            ),
        }
        for result in results
        if not result.entry.is_peer and result.concurrency in peers
        for figure in FIGURES
    ]


def ratio_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    return table(rows, _COLUMNS)
