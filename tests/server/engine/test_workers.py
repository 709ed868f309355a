"""The engine in a process of its own: what crosses to it, and whatever may become of it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from offramp.models.sampling_params import SamplingParams
from offramp.server.engine import driver as driver_module
from offramp.server.engine.driver import EngineDriver, EngineState, TokenStream
from offramp.server.engine.frames import frame
from offramp.server.engine.loop import EngineProtocol
from offramp.server.engine.request import FinishReason, GenerationRequest, TokenEvent
from offramp.server.engine.workers import ProcessWorker
from offramp.server.errors import EngineFailed, EngineLoading
from offramp.server.text.grammars import Form, GrammarCompiler, source_of
from offramp.server.text.tokenizer import Tokenizer
from tests.server.engine import faulty
from tests.server.fakes import byte_backend

PATIENCE_S = 40.0


def ask(name: str, deed: int = faulty.ANSWER, max_tokens: int = 3) -> GenerationRequest:
    return GenerationRequest(name, (deed, 7), SamplingParams(max_tokens=max_tokens))


async def ending(stream: TokenStream) -> TokenEvent:
    """The terminal event, which must be one, and the last."""
    events = [event async for event in stream]
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [
        True
    ]
    return events[-1]


@asynccontextmanager
async def driving(
    build: Callable[[], EngineProtocol] = faulty.build,
    *,
    restarts: int = 0,
    step_timeout: float = float("inf"),
) -> AsyncIterator[EngineDriver]:
    driver = EngineDriver(
        partial(ProcessWorker, build), restarts=restarts, step_timeout=step_timeout
    )
    driver.start()
    async with asyncio.timeout(PATIENCE_S):
        try:
            yield driver
        finally:
            await driver.stop(1.0)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_S / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come to that")


async def answering(driver: EngineDriver) -> int:
    """The process that answers a request, once one does."""
    await until(lambda: driver.state is EngineState.READY)
    events = [event async for event in driver.submit(ask("probe"))]
    assert events[-1].finish_reason is FinishReason.LENGTH
    (process,) = {token for event in events for token in event.token_ids}
    return process


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


async def test_requests_are_answered_by_another_process() -> None:
    async with driving() as driver:
        info = await driver.ready()
        assert info == faulty.FaultyEngine().info
        streams = [driver.submit(ask(str(length), max_tokens=length)) for length in (1, 5, 20)]
        for stream, length in zip(streams, (1, 5, 20), strict=True):
            events = [event async for event in stream]
            assert len(events) == length
            assert events[-1].finish_reason is FinishReason.LENGTH
        process = await answering(driver)
        assert process != os.getpid()
        assert not gone(process)
    assert gone(process)
    assert driver.state is EngineState.STOPPED


async def test_an_abort_crosses() -> None:
    async with driving() as driver:
        await driver.ready()
        stream = driver.submit(ask("endless", max_tokens=10**9))
        await anext(aiter(stream))
        stream.abort()
        assert driver.num_requests == 0
        # The endless one would have kept the engine from ever being idle.
        await answering(driver)


async def test_grammars_cross_by_their_source() -> None:
    backend = byte_backend()
    compiler = GrammarCompiler(Tokenizer(backend, None), backend.get_vocab_size(), (0,))
    async with driving() as driver:
        await driver.ready()
        # The vocabulary travels with the first one only.
        for word in ("x", "y"):
            grammar = compiler.compile(source_of(Form("choice", [word])))
            request = GenerationRequest(
                word, (faulty.ANSWER,), SamplingParams(max_tokens=1), grammar=grammar
            )
            (event,) = [event async for event in driver.submit(request)]
            assert event.token_ids == tuple(backend.encode(word).ids)


async def test_a_request_that_cannot_be_read_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with driving() as driver:
        await driver.ready()
        other = driver.submit(ask("other", max_tokens=200))
        # Known to this process only.
        monkeypatch.setattr(faulty, "Unknown", type("Unknown", (), {}), raising=False)
        faulty.Unknown.__module__ = faulty.__name__  # type: ignore[attr-defined]
        salt = faulty.Unknown()  # type: ignore[attr-defined]
        bad = GenerationRequest("bad", (0,), SamplingParams(max_tokens=1), cache_salt=salt)
        last = await ending(driver.submit(bad))
        assert last.finish_reason is FinishReason.ERROR
        assert "could not be handed" in str(last.error)
        assert (await ending(other)).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("deed", "says"),
    [
        (faulty.RAISE, "RuntimeError: a wire came off"),
        (faulty.KILL, "the engine's process ended by SIGKILL"),
        (faulty.EXIT, "the engine's process ended with status 3"),
    ],
)
async def test_a_dead_engine_is_built_anew(
    deed: int, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver_module, "_FIRST_WAIT_S", 0.01)
    async with driving(restarts=1) as driver:
        first = await answering(driver)
        streams = [driver.submit(ask("a", max_tokens=10**9)), driver.submit(ask("b", deed))]
        for stream in streams:
            last = await ending(stream)
            assert (last.finish_reason, last.error) == (FinishReason.ERROR, "The engine failed.")
        with pytest.raises(EngineLoading):
            driver.submit(ask("too soon"))
        second = await answering(driver)
        assert second != first
        assert gone(first)
        assert says in caplog.text
        # Out of restarts.
        await ending(driver.submit(ask("c", deed)))
        await driver.failed.wait()
        with pytest.raises(EngineFailed):
            driver.submit(ask("too late"))
    assert driver.state is EngineState.FAILED


@pytest.mark.parametrize("deed", [faulty.HANG, faulty.STOP])
async def test_a_stuck_engine_is_killed_and_built_anew(
    deed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step that does not end, or stopped as a whole, so that it says nothing any more."""
    monkeypatch.setattr(driver_module, "_FIRST_WAIT_S", 0.01)
    async with driving(restarts=1, step_timeout=1.0) as driver:
        first = await answering(driver)
        last = await ending(driver.submit(ask("a", deed)))
        assert last.finish_reason is FinishReason.ERROR
        assert await answering(driver) != first
        assert gone(first)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc")
@pytest.mark.parametrize("own", [None, "77"])
async def test_threads_of_the_engine_spin_for_a_short_time_unless_told(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if own is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", own)
    async with driving() as driver:
        process = await answering(driver)
        found = await asyncio.to_thread(Path(f"/proc/{process}/environ").read_bytes)
    assert f"GOMP_SPINCOUNT={own or 10000}".encode() in found.split(b"\0")


async def test_an_idle_engine_that_is_stopped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_FIRST_WAIT_S", 0.01)
    async with driving(restarts=1, step_timeout=1.0) as driver:
        first = await answering(driver)
        os.kill(first, signal.SIGSTOP)
        await until(lambda: driver.state is not EngineState.READY)
        assert await answering(driver) != first


async def test_signals_to_the_group_are_the_servers_business() -> None:
    async with driving() as driver:
        process = await answering(driver)
        os.kill(process, signal.SIGINT)
        os.kill(process, signal.SIGTERM)
        assert await answering(driver) == process


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (faulty.refuse, "the model is not to be had like this"),
        (faulty.break_down, "MemoryError: no room (OFFRAMP_LOG_LEVEL=DEBUG says where)"),
        (faulty.die, "the engine's process ended by SIGKILL (out of memory?)"),
        (faulty.write_nonsense, "the engine's process wrote nonsense"),
    ],
)
async def test_an_engine_that_cannot_be_built_is_a_failure(
    build: Callable[[], EngineProtocol], says: str
) -> None:
    async with driving(build, restarts=3) as driver:
        with pytest.raises(EngineFailed):
            await driver.ready()
        assert driver.failure is not None
        assert says in driver.failure


async def test_a_process_that_cannot_be_started_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many processes as the system allows may be there already, at the start or later."""
    monkeypatch.setattr(driver_module, "_FIRST_WAIT_S", 0.01)

    async def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    async with driving(restarts=1) as driver:
        await answering(driver)
        with monkeypatch.context() as full:
            full.setattr(asyncio, "create_subprocess_exec", refuse)
            await ending(driver.submit(ask("a", faulty.KILL)))
            await driver.failed.wait()
        assert driver.failure is not None
        assert "no process can be started" in driver.failure


async def test_stopping_does_not_wait_for_a_step_that_hangs() -> None:
    async with driving() as driver:
        process = await answering(driver)
        stream = driver.submit(ask("a", faulty.HANG))
        assert await driver.stop(0.1)
        assert gone(process)
        assert (await ending(stream)).finish_reason is FinishReason.ABORT
    assert driver.state is EngineState.STOPPED


_SERVER = """
import asyncio
from functools import partial
from offramp.server.engine.driver import EngineDriver
from offramp.server.engine.workers import ProcessWorker
from tests.server.engine import faulty
from tests.server.engine.test_workers import answering

async def main():
    driver = EngineDriver(partial(ProcessWorker, faulty.build))
    driver.start()
    print(await answering(driver), flush=True)
    await asyncio.sleep(1e6)

asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_the_engine_ends_with_a_killed_server(*, stopped: bool) -> None:
    """Even while it is stopped itself, where the system knows how to see to it."""
    if stopped and not sys.platform.startswith("linux"):
        pytest.skip("only Linux ends a stopped process with its parent")
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True, env=environ
    ) as server:
        assert server.stdout is not None
        engine = int(server.stdout.readline())
        if stopped:
            os.kill(engine, signal.SIGSTOP)
        server.kill()
    while not gone(engine):
        time.sleep(0.01)


_BEATING = """
import os, sys, time
from offramp.server.engine import engine_process

engine_process._BEAT_S = 0.001
status = engine_process.main(int(sys.argv[1]))
# A hundred beats that nobody waits for.
time.sleep(0.1)
os._exit(status)
"""


@pytest.mark.parametrize(
    ("build", "deaf", "status"),
    [(faulty.refuse, False, 1), (faulty.refuse, True, 1), (faulty.build, True, 0)],
)
def test_an_ending_process_beats_without_a_traceback(
    build: Callable[[], EngineProtocol], status: int, *, deaf: bool
) -> None:
    """Until it is gone, also while nobody reads what it sends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame((build, logging.INFO)) + frame(None))
        if deaf:
            ours.shutdown(socket.SHUT_RD)
        with subprocess.Popen(
            [sys.executable, "-c", _BEATING, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        ) as process:
            _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status
    assert "Traceback" not in told
