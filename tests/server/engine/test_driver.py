"""The driver: one terminal event for each request, whatever races with it.

The engine under it is a puppet: it does nothing until the test gives it a permit, so every order of
events is made on purpose and nothing is left to a clock.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from offramp.models.sampling_params import SamplingParams
from offramp.server.engine import driver as driver_module
from offramp.server.engine.driver import EngineDriver, EngineState, TokenStream
from offramp.server.engine.loop import EngineProtocol, EngineRequest
from offramp.server.engine.request import (
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    RequestStats,
    TokenEvent,
)
from offramp.server.engine.workers import ThreadWorker, Worker
from offramp.server.errors import EngineFailed, EngineLoading, QueueFull, ShuttingDown

STATS = RequestStats(0.0)
PATIENCE_S = 10.0


class Puppet:
    """Emits one token per live request and permit; the last of ``max_tokens`` is terminal."""

    def __init__(self) -> None:
        self.info = EngineInfo("puppet", 4, (2,), (0.5,), 50, 64, 8, 8, 2, "none")
        self.seen: deque[str] = deque()
        self._left: dict[str, int] = {}
        self._events: list[TokenEvent] = []
        self._permits = threading.Semaphore(0)
        self._broken: BaseException | None = None

    def allow(self, steps: int = 1) -> None:
        """Let the engine take steps."""
        self._permits.release(steps)

    def fail(self, error: BaseException | None = None) -> None:
        """Make the next step raise."""
        self._broken = error or RuntimeError("a wire came off")
        self.allow()

    def add(self, item: EngineRequest, submitted_at: float) -> None:
        assert isinstance(item, GenerationRequest)
        self.seen.append(f"add {item.request_id}")
        self._left[item.request_id] = item.sampling.max_tokens

    def abort(self, request_id: str) -> None:
        self.seen.append(f"abort {request_id}")
        if self._left.pop(request_id, None) is not None:
            self._events.append(TokenEvent(request_id, (), (), STATS, FinishReason.ABORT))

    @property
    def has_work(self) -> bool:
        return bool(self._left or self._events)

    def step(self) -> EngineOutput:
        assert self._permits.acquire(timeout=PATIENCE_S)
        if self._broken is not None:
            raise self._broken
        events, self._events = self._events, []
        for request_id in list(self._left):
            self._left[request_id] -= 1
            reason = None if self._left[request_id] else FinishReason.LENGTH
            if reason is not None:
                del self._left[request_id]
            events.append(TokenEvent(request_id, (7,), (4,), STATS, reason))
        return EngineOutput(tuple(events))


def on_thread(puppet: Puppet) -> Callable[[], Worker]:
    return lambda: ThreadWorker(lambda: puppet)


@asynccontextmanager
async def driving(puppet: Puppet, max_waiting: int = 2) -> AsyncIterator[EngineDriver]:
    """A started driver; the puppet is let loose at the end so that the thread can go."""
    driver = EngineDriver(on_thread(puppet), max_waiting=max_waiting)
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        await driver.ready()
        try:
            yield driver
        finally:
            puppet.allow(10_000)
            await driver.stop()


def ask(name: str, max_tokens: int = 3) -> GenerationRequest:
    return GenerationRequest(name, (1, 2), SamplingParams(max_tokens=max_tokens))


async def events_of(stream: TokenStream) -> list[TokenEvent]:
    return [event async for event in stream]


def reasons(events: list[TokenEvent]) -> list[FinishReason]:
    """Terminal events among these; there must be one, at the end."""
    found = [event.finish_reason for event in events if event.finish_reason is not None]
    assert events
    assert events[-1].finish_reason is not None
    return found


async def test_a_request_runs_to_its_end() -> None:
    puppet = Puppet()
    async with driving(puppet) as driver:
        stream = driver.submit(ask("a"))
        assert driver.num_requests == 1
        puppet.allow(3)
        events = await events_of(stream)
        assert [event.token_ids for event in events] == [(7,)] * 3
        assert reasons(events) == [FinishReason.LENGTH]
        assert driver.num_requests == 0


async def test_an_abort_ends_the_stream_and_reaches_the_engine() -> None:
    puppet = Puppet()
    async with driving(puppet) as driver:
        stream = driver.submit(ask("a", 50))
        puppet.allow()
        seen = []
        async for event in stream:
            seen.append(event)
            stream.abort()
        assert len(seen) == 1
        assert driver.num_requests == 0
        puppet.allow(2)
        other = driver.submit(ask("b", 1))
        assert reasons(await events_of(other)) == [FinishReason.LENGTH]
        assert list(puppet.seen).count("abort a") == 1


async def test_an_abort_wakes_who_waits_for_events() -> None:
    """Another task gave the request up while this one waited: it must not wait for ever."""
    puppet = Puppet()
    async with driving(puppet) as driver:
        stream = driver.submit(ask("a", 50))
        waiter = asyncio.create_task(events_of(stream))
        puppet.allow()
        await asyncio.sleep(0)
        stream.abort()
        assert reasons(await waiter) == [FinishReason.ABORT]


async def test_an_abort_after_the_end_is_nothing() -> None:
    """The terminal event is on its way when the client gives up: nothing comes twice."""
    puppet = Puppet()
    async with driving(puppet) as driver:
        stream = driver.submit(ask("a", 1))
        puppet.allow()
        other = driver.submit(ask("b", 1))
        puppet.allow()
        await events_of(other)
        stream.abort()
        stream.abort()
        assert await events_of(stream) == []
        assert driver.num_requests == 0


async def test_leaving_the_block_gives_the_request_up() -> None:
    puppet = Puppet()
    async with driving(puppet) as driver:
        with pytest.raises(ZeroDivisionError):
            async with driver.submit(ask("a", 50)):
                raise ZeroDivisionError
        assert driver.num_requests == 0
        puppet.allow(2)
        await events_of(driver.submit(ask("b", 1)))
        assert "abort a" in puppet.seen


async def test_a_full_queue_refuses_before_any_work() -> None:
    puppet = Puppet()
    async with driving(puppet, max_waiting=1) as driver:
        streams = [driver.submit(ask(str(index))) for index in range(3)]
        with pytest.raises(QueueFull) as refused:
            driver.submit(ask("one too many"))
        assert refused.value.headers == {"Retry-After": "1"}
        assert driver.num_requests == 3
        puppet.allow(3)
        for stream in streams:
            assert reasons(await events_of(stream)) == [FinishReason.LENGTH]
        puppet.allow(3)
        assert reasons(await events_of(driver.submit(ask("later")))) == [FinishReason.LENGTH]
        assert "add one too many" not in puppet.seen


async def test_tokens_of_waiting_prompts_are_bounded() -> None:
    puppet = Puppet()
    driver = EngineDriver(on_thread(puppet), max_waiting=9, max_waiting_tokens=5)
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        await driver.ready()
        first = driver.submit(ask("a", 9))
        second = driver.submit(ask("b", 9))
        with pytest.raises(QueueFull) as caught:
            driver.submit(ask("c"))
        assert caught.value.headers == {"Retry-After": "1"}
        # A prompt that was given up waits no more, nor one that has its first token.
        second.abort()
        third = driver.submit(ask("d", 9))
        puppet.allow()
        await anext(aiter(first))
        await anext(aiter(third))
        driver.submit(ask("e"))
        long = GenerationRequest("long", (1,) * 50, SamplingParams(max_tokens=1))
        with pytest.raises(QueueFull):
            driver.submit(long)
        puppet.allow(100)
        await until(lambda: not driver.num_requests)
        # Alone it is taken however long it is.
        assert reasons(await events_of(driver.submit(long))) == [FinishReason.LENGTH]
        await driver.stop()


async def test_a_failing_engine_tells_every_stream(caplog: pytest.LogCaptureFixture) -> None:
    puppet = Puppet()
    async with driving(puppet) as driver:
        streams = [driver.submit(ask(str(index), 9)) for index in range(3)]
        puppet.fail()
        for stream in streams:
            events = await events_of(stream)
            assert reasons(events) == [FinishReason.ERROR]
            assert events[-1].error == "The engine failed."
        assert driver.state is EngineState.FAILED
        assert driver.failure == "RuntimeError: a wire came off"
        with pytest.raises(EngineFailed):
            driver.submit(ask("late"))
    assert driver.state is EngineState.FAILED
    assert "the engine failed: RuntimeError: a wire came off" in caplog.text


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(driver_module, "_LONGEST_WAIT_S", 0.01)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_S / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not come to that")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("error", [RuntimeError("a wire came off"), SystemExit(3), MemoryError()])
async def test_a_failed_engine_is_built_anew(error: BaseException) -> None:
    """Also where what ended it is no ordinary exception."""
    puppets = [Puppet(), Puppet()]
    gate = threading.Event()
    built: list[Puppet] = []
    outputs: list[EngineOutput] = []

    def build() -> EngineProtocol:
        if built:
            assert gate.wait(PATIENCE_S)
        built.append(puppets[len(built)])
        return built[-1]

    driver = EngineDriver(partial(ThreadWorker, build), outputs.append, restarts=1)
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        await driver.ready()
        stream = driver.submit(ask("a", 9))
        puppets[0].fail(error)
        assert reasons(await events_of(stream)) == [FinishReason.ERROR]
        await until(lambda: driver.state is EngineState.RESTARTING)
        assert not driver.failed.is_set()
        assert driver.num_restarts == 1
        # The gauges fall with the requests.
        assert outputs[-1].stats is not None
        assert outputs[-1].stats.running == outputs[-1].stats.kv_used_blocks == 0
        with pytest.raises(EngineLoading):
            driver.submit(ask("too soon"))
        gate.set()
        await until(lambda: driver.state is EngineState.READY)
        puppets[1].allow(3)
        assert reasons(await events_of(driver.submit(ask("b")))) == [FinishReason.LENGTH]
        assert list(puppets[1].seen) == ["add b"]
        stream = driver.submit(ask("c", 9))
        puppets[1].fail(error)
        assert reasons(await events_of(stream)) == [FinishReason.ERROR]
        await driver.failed.wait()
        assert driver.state is EngineState.FAILED
        await driver.stop()


@pytest.mark.usefixtures("no_waiting")
async def test_an_engine_that_cannot_be_built_again_is_a_failure() -> None:
    puppet = Puppet()
    builds = 0

    def build() -> EngineProtocol:
        nonlocal builds
        builds += 1
        if builds > 1:
            raise OSError("the disk is gone")
        return puppet

    driver = EngineDriver(partial(ThreadWorker, build), restarts=2)
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        await driver.ready()
        stream = driver.submit(ask("a", 9))
        puppet.fail()
        await events_of(stream)
        await driver.failed.wait()
        await driver.stop()
    assert builds == 3
    assert driver.failure == "OSError: the disk is gone"


async def test_a_driver_that_waits_to_build_anew_can_be_stopped() -> None:
    puppet = Puppet()
    driver = EngineDriver(on_thread(puppet), restarts=9)
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        await driver.ready()
        stream = driver.submit(ask("a", 9))
        puppet.fail()
        await events_of(stream)
        assert await driver.stop()
    assert driver.state is EngineState.STOPPED


async def test_a_step_that_hangs_on_a_thread_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_WATCH_S", 0.01)
    puppet = Puppet()
    driver = EngineDriver(on_thread(puppet), restarts=9, step_timeout=0.05)
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        await driver.ready()
        stream = driver.submit(ask("a", 9))
        assert reasons(await events_of(stream)) == [FinishReason.ERROR]
        assert driver.failed.is_set()
        assert driver.failure is not None
        assert "has not ended after 0.05 s" in driver.failure
        with pytest.raises(EngineFailed):
            driver.submit(ask("b"))
        # The thread cannot be ended, and nobody waits for it longer than wished.
        assert not await driver.stop(0.05)
        puppet.allow(100)
        assert await driver.stop(PATIENCE_S)


async def test_a_model_that_does_not_load_is_a_failure() -> None:
    def build() -> EngineProtocol:
        raise FileNotFoundError("no such model")

    driver = EngineDriver(partial(ThreadWorker, build))
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(EngineFailed):
            await driver.ready()
        assert driver.failure is not None
        assert driver.failure.startswith("FileNotFoundError: no such model (")
        await driver.stop()


async def test_nothing_is_taken_before_the_model_is_there() -> None:
    gate = threading.Event()
    puppet = Puppet()

    def build() -> EngineProtocol:
        gate.wait(PATIENCE_S)
        return puppet

    driver = EngineDriver(partial(ThreadWorker, build))
    driver.start()
    with pytest.raises(EngineLoading):
        driver.submit(ask("early"))
    with pytest.raises(EngineLoading):
        assert driver.info is None
    gate.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await driver.ready() is puppet.info
        await driver.stop()
    assert driver.state is EngineState.STOPPED


async def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    puppet = Puppet()
    async with driving(puppet) as driver:
        stream = driver.submit(ask("a"))
        drained = asyncio.create_task(driver.drain(PATIENCE_S))
        await asyncio.sleep(0)
        assert driver.state is EngineState.DRAINING
        with pytest.raises(ShuttingDown):
            driver.submit(ask("late"))
        puppet.allow(3)
        assert reasons(await events_of(stream)) == [FinishReason.LENGTH]
        assert await drained


async def test_draining_gives_up_after_its_grace() -> None:
    puppet = Puppet()
    async with driving(puppet) as driver:
        stream = driver.submit(ask("a"))
        assert not await driver.drain(0.0)
        puppet.allow(3)
        assert reasons(await events_of(stream)) == [FinishReason.LENGTH]


async def test_draining_an_idle_engine_ends_at_once() -> None:
    async with driving(Puppet()) as driver:
        assert await driver.drain(0.0)


async def test_stopping_ends_open_streams() -> None:
    puppet = Puppet()
    async with driving(puppet) as driver:
        streams = [driver.submit(ask(str(index), 10**6)) for index in range(3)]
        puppet.allow(10_000)
        await driver.stop()
        for stream in streams:
            assert reasons(await events_of(stream)) == [FinishReason.ABORT]
        with pytest.raises(ShuttingDown):
            driver.submit(ask("late"))


@pytest.mark.parametrize("ending", ["stop", "fail"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
async def test_one_terminal_event_in_every_race(ending: str, steps: int) -> None:
    """Requests of several lengths, one given up, and the engine ends under all of them."""
    puppet = Puppet()
    async with driving(puppet, max_waiting=10) as driver:
        streams = [driver.submit(ask(str(length), length)) for length in (1, 2, 3, 40)]
        given_up = driver.submit(ask("given up", 2))
        tasks = [asyncio.create_task(events_of(stream)) for stream in (*streams, given_up)]
        for _ in range(steps):
            puppet.allow()
        await asyncio.sleep(0)
        given_up.abort()
        if ending == "fail":
            puppet.fail()
        else:
            puppet.allow(10_000)
            await driver.stop()
        for task in tasks:
            assert len(reasons(await task)) == 1
        assert driver.num_requests == 0


async def test_the_observer_sees_outputs_before_the_streams_do() -> None:
    puppet = Puppet()
    seen: list[str] = []
    driver = EngineDriver(
        on_thread(puppet),
        lambda output: seen.append(output.events[0].request_id),
    )
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        await driver.ready()
        stream = driver.submit(ask("a", 2))
        puppet.allow(2)
        counts = [len(seen) async for _ in stream]
        assert counts[0] >= 1
        assert seen == ["a", "a"]
        puppet.allow(10)
        await driver.stop()
