"""What runs cost, compared fairly on a machine whose speed drifts.

Each run made certain steps (kind, segment, rows). Priced by the median time of equal steps over all
runs, two runs differ by the steps they made and not by when they made them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from offramp.server.engine.request import StepStats

Kind = tuple[str, int, int, int]
"""Kind and segment of a step, prompt rows (up to a power of two) and answer rows in it."""


@dataclass(slots=True)
class StepLog:
    """Seconds of the steps of one run, the engine's own time included."""

    seconds: dict[Kind, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, stats: StepStats) -> None:
        """Note one step."""
        # Prompts cut into chunks give every row count; exact ones would hardly meet again.
        prompt = 1 << (stats.prefill_rows - 1).bit_length() if stats.prefill_rows else 0
        kind = (stats.kind, stats.segment, prompt, stats.decode_rows)
        self.seconds[kind].append(stats.seconds + stats.host_seconds)


def priced(runs: Sequence[StepLog]) -> list[float]:
    """Seconds of each run at the common price of its steps."""
    pooled: dict[Kind, list[float]] = defaultdict(list)
    for log in runs:
        for kind, seconds in log.seconds.items():
            pooled[kind] += seconds
    prices = {kind: statistics.median(seconds) for kind, seconds in pooled.items()}
    return [
        sum(prices[kind] * len(seconds) for kind, seconds in log.seconds.items()) for log in runs
    ]
