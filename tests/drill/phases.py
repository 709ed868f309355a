"""The phases of the drill: each does something to a loaded server and says how requests may end."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from hypothesis import HealthCheck, given, settings

from tests.drill.ledger import Ledger, ask
from tests.drill.server import PATIENCE_S, DrillServer, drill_server, until
from tests.server.bodies import GOOD, bodies, check
from tests.server.process import running

CONNECTIONS = 2000
STREAMS = 12
LEAVERS = 300
BODIES = 10_000
_PIDFD_GETFD = 438
_DAY_S = 86400
_SERVER_FAULT = 500
_CLOCK = Path(__file__).with_name("clock.c")


class Skipped(Exception):
    """The phase cannot be done here; the message says why."""


def body(tokens: int, mode: str = "adaptive", prompt: str = "Once upon a time") -> dict[str, Any]:
    """A completion of exactly so many tokens."""
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "early_exit": mode,
    }


async def under(
    server: DrillServer, ledger: Ledger, deed: Callable[[], Awaitable[None]], streams: int = STREAMS
) -> float:
    """Do the deed once all of some long streams have tokens; seconds until an answer after it."""
    started = asyncio.Semaphore(0)
    modes = ("off", "adaptive", "lossless")
    tasks = [
        asyncio.create_task(
            ask(server.client, ledger, body(1900, modes[n % 3]), on_first=started.release)
        )
        for n in range(streams)
    ]
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(streams):
            await started.acquire()
        begun = time.monotonic()
        await deed()
        await asyncio.gather(*tasks)
        await server.ready()
        after = Ledger()
        await ask(server.client, after, body(4))
    ledger.unless(after.ended["finished"] == 1, f"the next request ended with {dict(after.ended)}")
    return time.monotonic() - begun


async def kill_the_engine(server: DrillServer, ledger: Ledger) -> str:
    """kill -9 while it streams."""
    return await _signal_the_engine(server, ledger, signal.SIGKILL)


async def stop_the_engine(server: DrillServer, ledger: Ledger) -> str:
    """SIGSTOP while it streams: it neither dies nor does anything."""
    seen = await _signal_the_engine(server, ledger, signal.SIGSTOP)
    return f"{seen}, 2 of them --step-timeout"


async def _signal_the_engine(server: DrillServer, ledger: Ledger, number: signal.Signals) -> str:
    async def deed() -> None:
        os.kill(server.engine, number)

    seconds = await under(server, ledger, deed)
    ledger.only("error")
    return f"answers again after {seconds:.1f} s"


async def corrupt_messages(server: DrillServer, ledger: Ledger) -> str:
    """Nonsense on the socket between the processes."""

    async def deed() -> None:
        with _engines_socket(server.engine) as wire:
            wire.send(b"\x00\x00\x00\x08nonsense")

    seconds = await under(server, ledger, deed)
    ledger.only("error")
    ledger.unless("wrote nonsense" in server.process.log, "nobody noticed")
    return f"answers again after {seconds:.1f} s"


async def fill_the_blocks(server: DrillServer, ledger: Ledger) -> str:
    """More tokens at once than there are blocks for."""
    before = await server.metric("vllm:num_preemptions_total")
    asks = [ask(server.client, ledger, body(900, prompt=f"Story {n}: ")) for n in range(32)]
    await asyncio.gather(*asks)
    ledger.only("finished")
    preempted = await server.metric("vllm:num_preemptions_total") - before
    ledger.unless(preempted > 0, "no sequence was preempted: the blocks were not full")
    return f"{preempted:.0f} preemptions"


async def many_connections(server: DrillServer, ledger: Ledger) -> str:
    """Connections that say nothing, half of a head, half of a body, or do not read."""
    url = urlsplit(server.url)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    request = b'{"prompt": "a", "max_tokens": 500, "stream": true, "ignore_eos": true}'
    length = b"Content-Length: %d\r\n\r\n"
    says = (b"", head, head + length % 1000 + b"{", head + length % len(request) + request)
    sockets = []
    for place in range(CONNECTIONS):
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(says[place % 4 if place < 64 else place % 3])
        sockets.append((reader, writer))
    for _ in range(8):
        await ask(server.client, ledger, body(8))
    for _, writer in sockets:
        writer.transport.abort()
    ledger.only("finished")
    return f"{CONNECTIONS} connections held while others were answered"


async def random_disconnects(server: DrillServer, ledger: Ledger) -> str:
    """Clients that go away in the middle, and some at once."""
    chance = random.Random(7)
    gate = asyncio.Semaphore(60)

    async def one() -> None:
        async with gate:
            await ask(server.client, ledger, body(400), leave_after=chance.randrange(0, 60))

    await asyncio.gather(*(one() for _ in range(LEAVERS)))
    ledger.only("left", "finished")
    aborted = await server.metric("vllm:request_success_total")
    return f"{ledger.ended['left']} left, {aborted:.0f} ends counted so far"


async def malformed_bodies(server: DrillServer, ledger: Ledger) -> str:
    """Ten thousand bodies that nobody should send, over all routes, beside a stream."""
    stream = asyncio.create_task(ask(server.client, ledger, body(1900)))
    document = (await server.client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"].values()
    properties = sorted({name for each in schemas for name in each.get("properties", ())})
    statuses: Counter[int] = Counter()
    for path in GOOD:
        await asyncio.to_thread(_attack, server.url, path, properties, statuses)
    await stream
    faults = sum(count for status, count in statuses.items() if status >= _SERVER_FAULT)
    ledger.unless(not faults, f"{faults} bodies were answered with 5xx")
    ledger.only("finished")
    told = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    return f"{statuses.total()} bodies: {told}"


def _attack(url: str, path: str, properties: list[str], statuses: Counter[int]) -> None:
    with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:

        @settings(
            max_examples=BODIES // len(GOOD) + 1,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(attack=bodies(path, properties))
        def send(attack: bytes) -> None:
            headers = {"Content-Type": "application/json"}
            reply = client.post(path, content=attack, headers=headers)
            statuses[reply.status_code] += 1
            check(path, reply)

        send()


async def full_disk(_: DrillServer, ledger: Ledger) -> str:
    """A server whose cache folder has no room says so in one line."""
    with (
        _small_disk() as folder,
        running("tiny", environ={"OFFRAMP_CACHE_DIR": str(folder)}) as process,
    ):
        status = await asyncio.to_thread(process.status)
        log = process.log
    told = [line for line in log.splitlines() if "No space left" in line]
    ledger.unless(status == 1, f"it ended with status {status}")
    ledger.unless(len(told) == 1, f"it did not say why in one line: {log[-300:]}")
    ledger.unless("Traceback" not in log, "it showed a traceback")
    return "status 1 and one line"


async def clock_jumps(_: DrillServer, ledger: Ledger) -> str:
    """The wall clock jumps by days in both directions while answers stream."""
    with tempfile.TemporaryDirectory() as folder:
        library, offset = Path(folder, "clock.so"), Path(folder, "offset")
        try:
            words = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(_CLOCK), "-ldl"]
            await asyncio.to_thread(subprocess.run, words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Skipped(f"no C compiler: {error}") from error
        preload = {"LD_PRELOAD": str(library), "DRILL_CLOCK": str(offset)}

        def shift(days: int) -> None:
            offset.write_bytes((days * _DAY_S).to_bytes(8, "little", signed=True))

        async def deed() -> None:
            for days in (30, -30, 0):
                shift(days)
                await asyncio.sleep(0.3)

        shift(0)
        async with drill_server(**preload) as server:
            before = await _created(server)
            shift(30)
            ledger.unless(await _created(server) - before > _DAY_S, "the clock did not jump")
            await under(server, ledger, deed)
            ledger.unless("the engine failed" not in server.process.log, "the engine failed")
            server.account(ledger)
        ledger.only("finished")
    return "streams went on"


async def sigterm_under_load(_: DrillServer, ledger: Ledger) -> str:
    """A server that is told to stop loses nothing it has taken."""
    async with drill_server() as server:
        tasks = [asyncio.create_task(ask(server.client, ledger, body(600))) for _ in range(20)]

        async def loaded() -> bool:
            return await server.metric("vllm:num_requests_running") >= 8

        await until(loaded)
        server.process.signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*tasks)
        status = await asyncio.to_thread(server.process.status)
        server.account(ledger)
    ledger.only("finished")
    ledger.unless(status == 0, f"it ended with status {status}")
    return "all 20 streams ended, status 0"


async def _created(server: DrillServer) -> int:
    answer = await server.client.post("/v1/completions", json=body(1))
    return int(answer.json()["created"])


def _engines_socket(engine: int) -> socket.socket:
    """A duplicate of the engine's end of the connection; raises Skipped without rights over it."""
    words = Path(f"/proc/{engine}/cmdline").read_bytes().split(b"\0")
    handle = os.pidfd_open(engine)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        copy = libc.syscall(_PIDFD_GETFD, handle, int(words[-2]), 0)
    finally:
        os.close(handle)
    if copy < 0:
        raise Skipped(f"the engine's socket cannot be had: {os.strerror(ctypes.get_errno())}")
    return socket.socket(fileno=copy)


@contextmanager
def _small_disk() -> Iterator[Path]:
    """A folder on a disk of 256 KiB; raises Skipped where none can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["mount", "-t", "tmpfs", "-o", "size=256k", "offramp-drill", folder]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Skipped(f"no small disk can be mounted: {error}") from error
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


PHASES: dict[str, Callable[[DrillServer, Ledger], Awaitable[str]]] = {
    "engine killed": kill_the_engine,
    "engine stopped": stop_the_engine,
    "messages corrupted": corrupt_messages,
    "blocks full": fill_the_blocks,
    "2,000 connections": many_connections,
    "clients leave": random_disconnects,
    "malformed bodies": malformed_bodies,
    "disk full": full_disk,
    "clock jumps": clock_jumps,
    "SIGTERM under load": sigterm_under_load,
}
