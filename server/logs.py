"""Log format, and the throughput line of a busy server. Prompts and answers are never logged."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.server.engine.request import EngineOutput, StepStats

logger = logging.getLogger("offramp.stats")


def setup(uvicorn_level: str) -> None:
    """Send all logs to standard error; OFFRAMP_LOG_LEVEL sets ours (default INFO)."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(levelname)s %(asctime)s %(name)s: %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    logging.getLogger("offramp").setLevel(os.environ.get("OFFRAMP_LOG_LEVEL", "INFO").upper())
    logging.getLogger("uvicorn").setLevel(uvicorn_level.upper())


class StatsLog:
    """Sums up engine output between two lines; used on the event loop only."""

    def __init__(self) -> None:
        self._num_layers = 0
        self._last: StepStats | None = None
        self._clear()

    def configure(self, num_layers: int) -> None:
        """Learn the depth of the model, to tell how much of it was skipped."""
        self._num_layers = num_layers

    def observe(self, output: EngineOutput) -> None:
        """Add one engine step."""
        for event in output.events:
            self._generated += len(event.token_ids)
            self._depth += sum(event.exit_layers)
        stats = output.stats
        if stats is None:
            return
        self._last = stats
        # Later segments see the same rows again.
        if stats.segment == 0:
            self._prompt += stats.prefill_rows
        self._prefix_queries += stats.prefix_queries
        self._prefix_hits += stats.prefix_hits

    def line(self) -> str | None:
        """The line about the time since the last one; None if nothing happened."""
        stats, seconds = self._last, time.monotonic() - self._since
        text = None
        if stats is not None and (self._generated or self._prompt):
            text = ", ".join((*self._throughput(seconds), *_state(stats), *self._shares()))
        self._clear()
        return text

    async def run(self, interval_s: float) -> None:
        """Log a line every ``interval_s`` seconds while there is something to say."""
        while True:
            await asyncio.sleep(interval_s)
            line = self.line()
            if line is not None:
                logger.info(line)

    def _clear(self) -> None:
        self._since = time.monotonic()
        self._prompt = self._generated = self._depth = 0
        self._prefix_queries = self._prefix_hits = 0

    def _throughput(self, seconds: float) -> tuple[str, ...]:
        return (
            f"prompt {self._prompt / seconds:.1f} tokens/s",
            f"generation {self._generated / seconds:.1f} tokens/s",
        )

    def _shares(self) -> tuple[str, ...]:
        queries = self._prefix_queries
        hits = 100 * self._prefix_hits / queries if queries else 0.0
        if not self._generated or not self._num_layers:
            return (f"prefix hits {hits:.0f}%",)
        mean = self._depth / self._generated
        saved = 100 * (1 - mean / self._num_layers)
        return (f"prefix hits {hits:.0f}%", f"mean exit layer {mean:.2f} ({saved:.1f}% saved)")


def _state(stats: StepStats) -> tuple[str, ...]:
    usage = 100 * stats.kv_used_blocks / stats.kv_total_blocks if stats.kv_total_blocks else 0.0
    return (
        f"running {stats.running}",
        f"waiting {stats.waiting}",
        f"KV use {usage:.1f}%",
        f"KV debt {stats.debt_tokens} tokens",
    )
