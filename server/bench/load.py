"""A closed load on an engine in this process, every token timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from offramp.models.sampling_params import ExitMode, ExitSettings, KVFill, SamplingParams
from offramp.server.bench.errors import LoadError
from offramp.server.engine.bulk import run_all
from offramp.server.engine.engine import Engine
from offramp.server.engine.request import GenerationRequest


@dataclass(slots=True)
class Trace:
    """One answer as its client saw it; ``times`` [tokens] in seconds.

    ``layers_executed`` is summed over tokens, None where the target does not tell.
    """

    prompt: tuple[int, ...]
    submitted_at: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    layers_executed: int | None = None


class Target(Protocol):
    """Something that answers prompts."""

    def run(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        mode: str,
        concurrency: int,
        max_tokens: int,
        ignore_eos: bool = False,
    ) -> list[Trace]:
        """Greedy answers of at most ``max_tokens`` tokens, ``concurrency`` at a time.

        ``ignore_eos`` makes all of them that long; peers have no modes. Raises LoadError.
        """
        ...


class InProcess:
    """An engine on this thread: what the machine can do, without HTTP.

    ``threshold`` replaces the scores the exits were calibrated to.
    """

    def __init__(
        self, engine: Engine, threshold: float | None = None, kv_fill: str = "project"
    ) -> None:
        self.engine = engine
        self._fill = kv_fill
        self._threshold = threshold
        self._count = 0

    def run(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        mode: str,
        concurrency: int,
        max_tokens: int,
        ignore_eos: bool = False,
    ) -> list[Trace]:
        """See Target."""
        ends = () if ignore_eos else self.engine.info.eos_token_ids
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, stop_token_ids=frozenset(ends)
        )
        count = len(self.engine.info.exit_layers)
        thresholds = None if self._threshold is None else (self._threshold,) * count
        exits = ExitSettings(ExitMode(mode), thresholds=thresholds, kv_fill=KVFill(self._fill))
        requests = []
        for prompt in prompts:
            self._count += 1
            requests.append(GenerationRequest(str(self._count), prompt, sampling, exits))
        traces = []
        for item in run_all(self.engine, requests, concurrency=concurrency):
            if item.stats is None or not item.token_ids:
                raise LoadError(f"an answer ended early: {item.reason}")
            traces.append(
                Trace(
                    item.request.prompt,
                    item.submitted_at,
                    item.token_ids,
                    item.times,
                    item.stats.layers_executed,
                )
            )
        return traces
