"""Figures of a measured load and their table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from offramp.server.bench.load import Trace


@dataclass(frozen=True, slots=True)
class Round:
    """Figures of one mode at one concurrency in one round; times in milliseconds.

    ``mean_depth`` is in layers, None where the target does not tell.
    """

    tokens_per_s: float
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    e2e_p99_ms: float
    mean_depth: float | None


def measure(traces: Sequence[Trace]) -> Round:
    """Throughput over the wall time of all answers, latencies over their tokens.

    At least one answer has two tokens or more.
    """
    begun = min(trace.submitted_at for trace in traces)
    ended = max(trace.times[-1] for trace in traces)
    tokens = sum(len(trace.token_ids) for trace in traces)
    layers = [trace.layers_executed for trace in traces if trace.layers_executed is not None]
    gaps = [b - a for trace in traces for a, b in pairwise(trace.times)]
    return Round(
        tokens_per_s=tokens / (ended - begun),
        ttft_ms=1000 * statistics.median(t.times[0] - t.submitted_at for t in traces),
        itl_p50_ms=1000 * statistics.median(gaps),
        itl_p99_ms=1000 * _percentile(gaps, 0.99),
        e2e_p99_ms=1000 * _percentile([t.times[-1] - t.submitted_at for t in traces], 0.99),
        mean_depth=sum(layers) / tokens if len(layers) == len(traces) else None,
    )


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Median of every figure over the rounds, with the spread of the throughput."""
    columns = [asdict(item) for item in rounds]
    row: dict[str, Any] = {}
    for name in columns[0]:
        values = [column[name] for column in columns]
        row[name] = None if None in values else round(statistics.median(values), 3)
    speeds = [item.tokens_per_s for item in rounds]
    row["tokens_per_s_min"], row["tokens_per_s_max"] = round(min(speeds), 3), round(max(speeds), 3)
    return row


def exit_efficiency(speed_up: float, num_layers: int, mean_depth: float) -> float | None:
    """How much of the skipped work came back as time: (speed-up - 1) / (L / depth - 1).

    None when nothing was skipped.
    """
    possible = num_layers / mean_depth - 1
    return (speed_up - 1) / possible if possible > 1e-6 else None


# Title, key in a row, format.
Column = tuple[str, str, str]
COLUMNS: tuple[Column, ...] = (
    ("mode", "mode", "{}"),
    ("streams", "concurrency", "{}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("x off", "speed_up", "{:.3f}"),
    ("TTFT ms", "ttft_ms", "{:.0f}"),
    ("ITL p50", "itl_p50_ms", "{:.1f}"),
    ("ITL p99", "itl_p99_ms", "{:.1f}"),
    ("depth", "mean_depth", "{:.2f}"),
    ("efficiency", "exit_efficiency", "{:.2f}"),
    ("agreement", "agreement", "{:.4f}"),
)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column] = COLUMNS) -> str:
    """Rows as a Markdown table; a figure that does not apply is a dash."""
    head = [title for title, _, _ in columns]
    body = [
        [form.format(row[key]) if row.get(key) is not None else "-" for _, key, form in columns]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
