"""The loop that owns an engine: it takes requests in, steps, and hands outputs out.

It runs on a thread of the server, or in a process of its own (workers.py).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from offramp.server.engine.request import (
    DecisionRequest,
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    RequestStats,
    TokenEvent,
)

# Steps whose output may wait to be delivered together; bounds how old a gauge can get.
_MAX_OUTPUTS = 16

EngineRequest = GenerationRequest | DecisionRequest
# A request with the monotonic time it was submitted at, or the id of one to abort.
EngineInput = tuple[EngineRequest, float] | str
# Facts of an engine once it is built, then what its steps hand out.
Report = EngineInfo | Sequence[EngineOutput]


class EngineProtocol(Protocol):
    """What the loop needs of an engine; all of it runs on the loop's thread."""

    info: EngineInfo

    def add(self, request: EngineRequest, submitted_at: float) -> None:
        """Accept a request; its events come out of `step`."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        ...

    def step(self) -> EngineOutput:
        """Plan, run and commit once."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        ...


class EngineLoop:
    """Builds an engine and runs it until it is stopped; ``send`` takes what there is to report.

    `run` belongs to one thread; the other methods may be called on any.
    """

    def __init__(self, send: Callable[[Report], None]) -> None:
        self._send = send
        self._inbox: deque[EngineInput] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._step_since: float | None = None

    @property
    def stuck_for(self) -> float:
        """Seconds that the step under way has taken so far; 0 while there is none."""
        since = self._step_since
        return 0.0 if since is None else time.monotonic() - since

    def post(self, item: EngineInput) -> None:
        """Hand a request, or an abort, to the engine before its next step."""
        with self._wake:
            self._inbox.append(item)
            self._wake.notify()

    def stop(self) -> None:
        """End `run` after the step in flight."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self, build: Callable[[], EngineProtocol]) -> None:
        """Build the engine and run it; raises what building or a step raises."""
        engine = build()
        self._send(engine.info)
        outputs: list[EngineOutput] = []
        while self._intake(engine):
            self._step_since = time.monotonic()
            outputs.append(engine.step())
            self._step_since = None
            # Waking the event loop costs more than a thin segment's bookkeeping, so steps
            # without events wait for the next one that has some.
            if outputs[-1].events or len(outputs) >= _MAX_OUTPUTS or not engine.has_work:
                self._send(outputs)
                outputs = []

    def _intake(self, engine: EngineProtocol) -> bool:
        """Empty the inbox into the engine, sleeping while there is nothing to do."""
        with self._wake:
            while not self._inbox and not self._stopping and not engine.has_work:
                self._wake.wait()
            items = list(self._inbox)
            self._inbox.clear()
            if self._stopping:
                return False
        for item in items:
            if isinstance(item, str):
                engine.abort(item)
            else:
                engine.add(*item)
        return True


def ended(request_id: str, reason: FinishReason, message: str | None = None) -> EngineOutput:
    """The terminal event of a request that no engine ends."""
    stats = RequestStats(submitted_at=time.monotonic())
    return EngineOutput((TokenEvent(request_id, (), (), stats, reason, message),))
