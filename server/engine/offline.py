"""Run many requests through an engine on the calling thread: no HTTP, no driver.

For generating training answers, for measuring, and for tests. The load is closed: a fixed number of
requests is in flight, the next one enters when one ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from offramp.models.sampling_params import TokenSource
from offramp.models.step import TokenLogprobs
from offramp.server.engine.loop import EngineProtocol
from offramp.server.engine.request import (
    EngineOutput,
    FinishReason,
    GenerationRequest,
    RequestStats,
)


@dataclass(slots=True)
class Finished:
    """One request's whole answer; ``times`` [tokens] are seconds on the monotonic clock."""

    request: GenerationRequest
    submitted_at: float
    token_ids: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    stats: RequestStats | None = None
    reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    sources: list[TokenSource] = field(default_factory=list)


def run_all(
    engine: EngineProtocol,
    requests: Iterable[GenerationRequest],
    *,
    concurrency: int,
    observe: Callable[[EngineOutput], None] | None = None,
) -> list[Finished]:
    """Answers in the order of ``requests``; ``observe`` sees every step's output."""
    queue = iter(requests)
    order: list[Finished] = []
    in_flight: dict[str, Finished] = {}

    def submit_next() -> None:
        request = next(queue, None)
        if request is not None:
            now = time.monotonic()
            finished = Finished(request, now)
            order.append(finished)
            in_flight[request.request_id] = finished
            engine.add(request, now)

    for _ in range(concurrency):
        submit_next()
    while in_flight:
        output = engine.step()
        now = time.monotonic()
        for event in output.events:
            finished = in_flight[event.request_id]
            finished.token_ids += event.token_ids
            finished.exit_layers += event.exit_layers
            own = (TokenSource.MODEL,) * len(event.token_ids)
            finished.sources += event.sources or own
            finished.times += [now] * len(event.token_ids)
            finished.logprobs += event.logprobs
            finished.prompt_logprobs = finished.prompt_logprobs or event.prompt_logprobs
            if event.finish_reason is not None:
                finished.stats, finished.reason = event.stats, event.finish_reason
                del in_flight[event.request_id]
                submit_next()
        if observe is not None:
            observe(output)
    return order
