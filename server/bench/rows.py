"""Results as rows of a report: figures, with agreement and what early exit brought."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any

from offramp.models.transformer import Transformer
from offramp.server.bench.reference import agreement
from offramp.server.bench.report import exit_efficiency, summarise
from offramp.server.bench.rounds import Result


def rows(
    results: Sequence[Result], judge: Transformer, without: Collection[int]
) -> list[dict[str, Any]]:
    """One row a result; ``without`` as in ``agreement``, which judges peers by the same rule."""
    off = {item.concurrency: item for item in results if item.entry.name == "off"}
    return [_row(item, off.get(item.concurrency), judge, without) for item in results]


def _row(
    result: Result, off: Result | None, judge: Transformer, without: Collection[int]
) -> dict[str, Any]:
    figures = summarise(result.rounds)
    row = {"mode": result.entry.name, "concurrency": result.concurrency, **figures}
    agreed = agreement(judge, result.traces, without)
    row["agreement"] = None if agreed is None else round(agreed, 4)
    if off is None or off is result or result.entry.is_peer:
        return row
    pairs = zip(result.rounds, off.rounds, strict=True)
    row["speed_up"] = round(statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs), 4)
    if row["mean_depth"] is not None:
        row["exit_efficiency"] = exit_efficiency(
            row["speed_up"], judge.config.num_layers, row["mean_depth"]
        )
    same = [a.token_ids == b.token_ids for a, b in zip(result.traces, off.traces, strict=True)]
    row["same_answers_as_off"] = sum(same) / len(same)
    return row
