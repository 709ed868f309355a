"""The way from the event loop to the engine: requests in, events out, and what if the engine fails.

An engine that dies is built anew, a few times. One that hangs is killed and counts as dead; on a
thread, where it cannot be killed, it is given up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from enum import StrEnum
from typing import Protocol, Self

from offramp.server.engine.loop import EngineRequest, ended
from offramp.server.engine.request import (
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    StepStats,
    TokenEvent,
)
from offramp.server.engine.workers import EngineDied, Worker
from offramp.server.errors import (
    EngineConfigError,
    EngineFailed,
    EngineLoading,
    QueueFull,
    ShuttingDown,
)

logger = logging.getLogger("offramp.engine")

# Seconds before an engine that failed is built anew, the first time and at most; the wait doubles.
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
# An engine that ran so long before it failed has its restarts again.
_GOOD_AGAIN_S = 3600.0
# How often the engine is looked at. A look that comes this much later says nothing about the
# engine: the whole machine, or this process, stood still.
_WATCH_S = 0.5
_LATE_S = 2.0
# Events delivered before their readers run: each reader takes the loop for about 0.07 ms.
_AT_ONCE = 32


class EngineState(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


Observer = Callable[[EngineOutput], None]


class EventSink(Protocol):
    """Takes events, as a queue does."""

    def put_nowait(self, item: TokenEvent, /) -> None:
        """Take an event."""
        ...


class TokenStream:
    """Events of one request. Iterate it; call `abort` (or leave the `async with`) to give it up.

    A reader that waits for an event at that moment gets the terminal one of an abort. The events
    of streams that are read together go into one ``sink``, which is read instead.
    """

    def __init__(
        self,
        request_id: str,
        abort: Callable[[str], None],
        sink: EventSink | None = None,
    ) -> None:
        self.request_id = request_id
        self.submitted_at = time.monotonic()
        self._abort = abort
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._sink = self._events if sink is None else sink
        self._ended = self._read = False
        """Whether the terminal event was pushed, and whether nothing is to be read any more."""

    def push(self, event: TokenEvent) -> None:
        """Deliver an event (event loop only)."""
        self._ended |= event.finish_reason is not None
        self._sink.put_nowait(event)

    def abort(self) -> None:
        """Tell the engine to forget the request unless it ended by itself."""
        self._read = True
        if not self._ended:
            self._abort(self.request_id)
            # The engine's own event comes too late: this stream is forgotten by then.
            self.push(ended(self.request_id, FinishReason.ABORT).events[0])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while not self._read:
            event = await self._events.get()
            self._read = event.finish_reason is not None
            yield event


class EngineDriver:
    """Owns the requests that are open, and the worker that an engine runs in.

    ``make`` makes a worker; each builds one engine. ``observe`` sees every output before the
    streams do. ``max_waiting`` bounds the requests accepted beyond ``max_num_seqs``,
    ``max_waiting_tokens`` those of prompts without an answer yet; more raise QueueFull. An engine
    that fails, or whose step takes longer than ``step_timeout`` seconds, ends its requests with an
    error and is built anew, ``restarts`` times. All methods belong to the event loop.
    """

    def __init__(
        self,
        make: Callable[[], Worker],
        observe: Observer | None = None,
        *,
        max_waiting: int = 256,
        max_waiting_tokens: int | None = None,
        restarts: int = 0,
        step_timeout: float = float("inf"),
    ) -> None:
        self._make = make
        self._observe = observe
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._restarts = restarts
        self._step_timeout = step_timeout
        self._worker: Worker | None = None
        self._streams: dict[str, TokenStream] = {}
        self._unread: dict[str, int] = {}
        """Tokens of each prompt that the engine has not answered yet."""
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._info: EngineInfo | None = None
        self._settled = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stop = asyncio.Event()
        self.state = EngineState.LOADING
        self.failure: str | None = None
        self.failed = asyncio.Event()
        """Set when the engine has failed and will not be built anew."""
        self.last_step_at = time.monotonic()
        self.num_restarts = 0

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded engine; raises EngineLoading before it is ready."""
        if self._info is None:
            raise self._unavailable()
        return self._info

    @property
    def num_requests(self) -> int:
        """Requests accepted and not yet ended."""
        return len(self._streams)

    @property
    def capacity(self) -> int:
        """Requests that may run or wait at once."""
        return self.info.max_num_seqs + self._max_waiting

    def start(self) -> None:
        """Start the first worker; returns at once, `ready` waits for the model."""
        run, watch = asyncio.create_task(self._run()), asyncio.create_task(self._watch())
        self._tasks = run, watch

    async def ready(self) -> EngineInfo:
        """Wait until the engine is loaded; raises EngineFailed if that failed."""
        await self._settled.wait()
        return self.info

    def submit(self, request: EngineRequest, sink: EventSink | None = None) -> TokenStream:
        """Queue a request; see TokenStream for ``sink``.

        Raises EngineLoading, ShuttingDown, EngineFailed or QueueFull.
        """
        if self.state is not EngineState.READY:
            raise self._unavailable()
        if len(self._streams) >= self.capacity:
            raise QueueFull(
                f"{len(self._streams)} requests are running or waiting; try again later.",
                headers={"Retry-After": "1"},
            )
        if isinstance(request, GenerationRequest):
            self._count_unread(request)
        stream = TokenStream(request.request_id, self._abort, sink)
        self._streams[request.request_id] = stream
        self._idle.clear()
        assert self._worker is not None
        self._worker.post((request, stream.submitted_at))
        return stream

    def _count_unread(self, request: GenerationRequest) -> None:
        limit, waiting = self._max_waiting_tokens, sum(self._unread.values())
        # A prompt alone is always taken: it would never be, otherwise.
        if limit is not None and waiting and waiting + len(request.prompt) > limit:
            raise QueueFull(
                f"{waiting} tokens of prompts are waiting; try again later.",
                headers={"Retry-After": "1"},
            )
        self._unread[request.request_id] = len(request.prompt)

    async def drain(self, grace_s: float) -> bool:
        """Take nothing new; wait up to ``grace_s`` seconds for what runs. True if all ended."""
        if self.state is EngineState.READY:
            self.state = EngineState.DRAINING
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self, patience_s: float | None = None) -> bool:
        """End the engine after the step in flight; open streams get an abort event.

        What has not ended after ``patience_s`` seconds is killed. False where it cannot be.
        """
        if self.state is not EngineState.FAILED:
            self.state = EngineState.STOPPED
        self._stop.set()
        over = True
        if self._worker is not None:
            self._worker.stop()
            run, watch = self._tasks
            watch.cancel()
            done, _ = await asyncio.wait({run}, timeout=patience_s)
            over = bool(done) or self._worker.kill("it did not stop in time")
            if over:
                await asyncio.wait({run})
        self._end_streams(FinishReason.ABORT, "The server was stopped.")
        return over

    def _unavailable(self) -> EngineFailed | EngineLoading | ShuttingDown:
        if self.state is EngineState.FAILED:
            return EngineFailed("The engine failed; the server must be restarted.")
        if self.state is EngineState.LOADING:
            return EngineLoading("The model is being loaded.", headers={"Retry-After": "2"})
        if self.state is EngineState.RESTARTING:
            return EngineLoading("The engine is being restarted.", headers={"Retry-After": "2"})
        return ShuttingDown("The server is shutting down.", headers={"Retry-After": "5"})

    def _abort(self, request_id: str) -> None:
        self._forget(request_id)
        if self._worker is not None:
            self._worker.post(request_id)

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._unread.pop(request_id, None)
        if not self._streams:
            self._idle.set()

    async def _deliver(self, outputs: Sequence[EngineOutput]) -> None:
        self.last_step_at = time.monotonic()
        for output in outputs:
            self._account(output)
            for number, event in enumerate(output.events, 1):
                self._push(event)
                if number % _AT_ONCE == 0:
                    # Their readers first: all at once they would hold the loop for too long.
                    await asyncio.sleep(0)

    def _account(self, output: EngineOutput) -> None:
        if self._observe is not None:
            try:
                self._observe(output)
            except Exception:
                # A fault in the accounting must not cost a client its tokens.
                logger.exception("observer failed")

    def _push(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        self._unread.pop(event.request_id, None)
        if event.finish_reason is not None:
            self._forget(event.request_id)
        stream.push(event)

    def _end_streams(self, reason: FinishReason, message: str) -> None:
        for request_id in list(self._streams):
            output = ended(request_id, reason, message)
            self._account(output)
            self._push(output.events[0])

    def _became_ready(self, info: EngineInfo) -> None:
        self._info = info
        if self.state in {EngineState.LOADING, EngineState.RESTARTING}:
            self.state = EngineState.READY
        self.last_step_at = time.monotonic()
        self._settled.set()

    def _became_failed(self, message: str) -> None:
        self.state = EngineState.FAILED
        self.failure = message
        self._end_requests()
        self._settled.set()
        self.failed.set()

    def _became_restarting(self) -> None:
        if self.state is EngineState.READY:
            self.state = EngineState.RESTARTING
        self.num_restarts += 1
        self._end_requests()

    def _end_requests(self) -> None:
        """The engine is gone, and its requests with it; gauges say so."""
        self._end_streams(FinishReason.ERROR, "The engine failed.")
        if self._info is not None:
            queues = (0,) * self._info.num_segments
            total = self._info.num_blocks
            idle = StepStats("idle", 0, kv_total_blocks=total, segment_queue=queues)
            self._account(EngineOutput((), idle))

    async def _run(self) -> None:
        """Run one engine after another, until stopped or out of restarts."""
        left, wait = self._restarts, _FIRST_WAIT_S
        while True:
            begun = time.monotonic()
            try:
                await self._serve()
            except EngineConfigError as error:
                self._became_failed(str(error))
                return
            except EngineDied as error:
                failure = str(error)
                self._log(error)
            else:
                return
            if self.state is EngineState.STOPPED:
                return
            if time.monotonic() - begun > _GOOD_AGAIN_S:
                left, wait = self._restarts, _FIRST_WAIT_S
            serving = self.state in {EngineState.READY, EngineState.RESTARTING}
            if self.state is EngineState.LOADING:
                failure += " (OFFRAMP_LOG_LEVEL=DEBUG says where)"
            if not left or not serving:
                self._became_failed(failure)
                return
            self._became_restarting()
            logger.warning("the engine is built anew in %.1f s; %d restarts are left", wait, left)
            if await self._stops_within(wait):
                return
            left, wait = left - 1, min(2 * wait, _LONGEST_WAIT_S)

    async def _serve(self) -> None:
        """Build an engine and take its reports until it is stopped."""
        self._worker = worker = self._make()
        async with aclosing(worker.run()) as reports:
            async for report in reports:
                if isinstance(report, EngineInfo):
                    self._became_ready(report)
                else:
                    await self._deliver(report)

    async def _stops_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    async def _watch(self) -> None:
        """Notice an engine that hangs."""
        looked = time.monotonic()
        while not self.failed.is_set():
            await asyncio.sleep(_WATCH_S)
            late = time.monotonic() - looked > _LATE_S
            looked = time.monotonic()
            serving = self.state in {EngineState.READY, EngineState.DRAINING}
            # Building takes as long as it takes.
            if late or not serving or self._worker is None:
                continue
            if self._worker.stuck_for > self._step_timeout:
                reason = f"a step of the engine has not ended after {self._step_timeout:g} s"
                if not self._worker.kill(reason):
                    logger.error(reason)
                    self._became_failed(reason)

    def _log(self, error: EngineDied) -> None:
        """Say why an engine is gone; of one that was never there, whoever waits for it does."""
        level = logging.DEBUG if self._info is None else logging.ERROR
        logger.log(level, "the engine failed: %s", error, exc_info=error.__cause__)
