"""The thread that owns the engine, and the only way to reach it from the event loop.

An engine that fails is built anew, a few times; one that hangs cannot be ended and is given up.

Public methods are called on the event loop. They never touch sequences, queues or blocks: requests
and aborts go into an inbox the engine thread empties between steps, and each step's output comes
back with one `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum
from typing import Protocol, Self

from offramp.server.config import EngineConfigError
from offramp.server.engine.request import (
    DecisionRequest,
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    RequestStats,
    StepStats,
    TokenEvent,
)
from offramp.server.errors import EngineFailed, EngineLoading, QueueFull, ShuttingDown

logger = logging.getLogger("offramp.engine")

# Seconds before an engine that failed is built anew, the first time and at most; the wait doubles.
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
# An engine that ran so long before it failed has its restarts again.
_GOOD_AGAIN_S = 3600.0
# Steps whose output may wait to be delivered together; bounds how old a gauge can get.
_MAX_OUTPUTS = 16

EngineRequest = GenerationRequest | DecisionRequest


class EngineProtocol(Protocol):
    """What the driver needs of an engine; all of it runs on the engine thread."""

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


class EngineState(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


Observer = Callable[[EngineOutput], None]


class TokenStream:
    """Events of one request. Iterate it; call `abort` (or leave the `async with`) to give it up.

    A reader that waits for an event at that moment gets the terminal one of an abort.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._finished = False

    def push(self, event: TokenEvent) -> None:
        """Deliver an event (event loop only)."""
        self._events.put_nowait(event)

    def abort(self) -> None:
        """Tell the engine to forget the request unless it ended by itself."""
        if not self._finished:
            self._finished = True
            self._abort(self.request_id)
            # The engine's own event comes too late: this stream is forgotten by then.
            stats = RequestStats(submitted_at=time.monotonic())
            self.push(TokenEvent(self.request_id, (), (), stats, FinishReason.ABORT))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while not self._finished:
            event = await self._events.get()
            self._finished = event.finish_reason is not None
            yield event


class EngineDriver:
    """Runs an engine on a thread of its own.

    ``build`` makes the engine (slow: it loads the model) on that thread. ``observe`` sees every
    output on the event loop, before the streams do. ``max_waiting`` bounds the requests accepted
    beyond ``max_num_seqs``, ``max_waiting_tokens`` those of prompts without an answer yet; more
    raise QueueFull. An engine that fails ends its requests with an
    error and is built anew, ``restarts`` times.
    """

    def __init__(
        self,
        build: Callable[[], EngineProtocol],
        observe: Observer | None = None,
        *,
        max_waiting: int = 256,
        max_waiting_tokens: int | None = None,
        restarts: int = 0,
    ) -> None:
        self._max_waiting_tokens = max_waiting_tokens
        self._unread: dict[str, int] = {}
        """Tokens of each prompt that the engine has not answered yet."""
        self._restarts = restarts
        self._build = build
        self._observe = observe
        self._max_waiting = max_waiting
        self._inbox: deque[tuple[EngineRequest, float] | str] = deque()
        self._wake = threading.Condition()
        self._streams: dict[str, TokenStream] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._info: EngineInfo | None = None
        self._settled = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self.state = EngineState.LOADING
        self.failure: str | None = None
        self.failed = asyncio.Event()
        """Set when the engine has failed and will not be built anew."""
        self._step_since: float | None = None
        self._built = False
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

    @property
    def stuck_for(self) -> float:
        """Seconds that the step under way has taken so far; 0 while there is none."""
        since = self._step_since
        return 0.0 if since is None else time.monotonic() - since

    def give_up(self, message: str) -> None:
        """The engine hangs: end all requests with an error and take no more."""
        self._became_failed(message)

    def start(self) -> None:
        """Start the thread; returns at once, `ready` waits for the model."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="offramp-engine", daemon=True)
        self._thread.start()

    async def ready(self) -> EngineInfo:
        """Wait until the engine is loaded; raises EngineFailed if that failed."""
        await self._settled.wait()
        return self.info

    def submit(self, request: EngineRequest) -> TokenStream:
        """Queue a request. Raises EngineLoading, ShuttingDown, EngineFailed or QueueFull."""
        if self.state is not EngineState.READY:
            raise self._unavailable()
        if len(self._streams) >= self.capacity:
            raise QueueFull(
                f"{len(self._streams)} requests are running or waiting; try again later.",
                headers={"Retry-After": "1"},
            )
        if isinstance(request, GenerationRequest):
            self._count_unread(request)
        stream = TokenStream(request.request_id, self._abort)
        self._streams[request.request_id] = stream
        self._idle.clear()
        self._post((request, time.monotonic()))
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
        """End the thread after the step in flight; open streams get an abort event.

        False if the thread has not ended after ``patience_s`` seconds.
        """
        if self.state is not EngineState.FAILED:
            self.state = EngineState.STOPPED
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, patience_s)
        self._end_streams(FinishReason.ABORT, "The server was stopped.")
        return self._thread is None or not self._thread.is_alive()

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
        self._post(request_id)

    def _post(self, item: tuple[EngineRequest, float] | str) -> None:
        with self._wake:
            self._inbox.append(item)
            self._wake.notify()

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._unread.pop(request_id, None)
        if not self._streams:
            self._idle.set()

    def _deliver(self, outputs: Sequence[EngineOutput]) -> None:
        self.last_step_at = time.monotonic()
        for output in outputs:
            self._hand_out(output)

    def _hand_out(self, output: EngineOutput) -> None:
        if self._observe is not None:
            try:
                self._observe(output)
            except Exception:
                # A fault in the accounting must not cost a client its tokens.
                logger.exception("observer failed")
        for event in output.events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            self._unread.pop(event.request_id, None)
            if event.finish_reason is not None:
                self._forget(event.request_id)
            stream.push(event)

    def _end_streams(self, reason: FinishReason, message: str) -> None:
        stats = RequestStats(submitted_at=time.monotonic())
        for request_id in list(self._streams):
            event = TokenEvent(request_id, (), (), stats, reason, message)
            self._hand_out(EngineOutput((event,)))

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
        with self._wake:
            self._inbox.clear()
        if self._info is not None:
            queues = (0,) * self._info.num_segments
            total = self._info.num_blocks
            idle = StepStats("idle", 0, kv_total_blocks=total, segment_queue=queues)
            self._hand_out(EngineOutput((), idle))

    def _call(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        left, wait = self._restarts, _FIRST_WAIT_S
        while True:
            begun = time.monotonic()
            try:
                self._serve()
            except EngineConfigError as error:
                # The configuration is at fault, so a traceback would not help.
                logger.debug("engine refused", exc_info=error)
                self._call(self._became_failed, str(error))
                return
            except BaseException as error:
                logger.exception("engine thread failed")
                failure = f"{type(error).__name__}: {error}"
            else:
                return
            self._step_since = None
            if time.monotonic() - begun > _GOOD_AGAIN_S:
                left, wait = self._restarts, _FIRST_WAIT_S
            if not left or not self._built:
                self._call(self._became_failed, failure)
                return
            self._call(self._became_restarting)
            logger.warning("the engine is built anew in %.1f s; %d restarts are left", wait, left)
            if self._stops_within(wait):
                return
            left, wait = left - 1, min(2 * wait, _LONGEST_WAIT_S)
            # What was loaded was kept from the garbage collector, which now has to find it.
            gc.unfreeze()
            gc.collect()

    def _serve(self) -> None:
        """Build an engine and run it until the driver is stopped."""
        engine = self._build()
        self._built = True
        self._call(self._became_ready, engine.info)
        outputs: list[EngineOutput] = []
        while self._intake(engine):
            self._step_since = time.monotonic()
            outputs.append(engine.step())
            self._step_since = None
            # Waking the event loop costs more than a thin segment's bookkeeping, so steps
            # without events wait for the next one that has some.
            if outputs[-1].events or len(outputs) >= _MAX_OUTPUTS or not engine.has_work:
                self._call(self._deliver, outputs)
                outputs = []

    def _stops_within(self, seconds: float) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: self._stopping, seconds)

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
