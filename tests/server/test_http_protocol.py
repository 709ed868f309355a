"""Clients that send too much, too slowly, or nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from offramp.server import http_protocol
from tests.server.fakes import PATIENCE_S, FakeEngine, Running, serving
from tests.server.test_app import aborted

POST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(server: Running) -> AsyncIterator[Stream]:
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    # The system must not take in a whole stream by itself.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=client)
    try:
        yield reader, writer
    finally:
        writer.close()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


def refusal(answer: bytes, status: int, code: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert b"connection: close" in head
    assert b"x-request-id: " in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


async def flood(writer: asyncio.StreamWriter, piece: bytes, total: int) -> int:
    """Send ``total`` bytes, or until the server is gone; returns how many were taken."""
    sent = 0
    while sent < total and not writer.transport.is_closing():
        writer.write(piece)
        try:
            await writer.drain()
        except ConnectionError:
            break
        sent += len(piece)
        await asyncio.sleep(0)
    return sent


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /health HTTP/1.1\r\nhost: a\r\n", b"a: b\r\n" * 1000),
        (b"GET /health HTTP/1.1\r\nhost: a\r\nx: ", b"y" * 10_000),
        (b"GET /", b"y" * 10_000),
        (b"GET /health HTTP/1.1\r\nhost: a\r\n", b"y" * 10_000),
    ],
    ids=["lines", "value", "url", "name"],
)
async def test_an_endless_head_is_cut_off(begin: bytes, piece: bytes) -> None:
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(begin)
        sent = await flood(writer, piece, 64 * 1024**2)
        answer = await rest(reader)
        async with connected(server) as (other, asker):
            asker.write(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            healthy = await rest(other)
    # What the system's buffers swallowed never reached the parser.
    assert sent < 64 * 1024**2
    if answer:
        assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
    assert healthy.startswith(b"HTTP/1.1 200 ")


async def test_a_head_that_is_too_large_is_told_so() -> None:
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 90_000)
        refusal(await rest(reader), 431, "head_too_large")


async def test_too_many_headers_are_told_so() -> None:
    async with serving(api_key=("secret",)) as server, connected(server) as (reader, writer):
        lines = b"".join(b"h%d: v\r\n" % index for index in range(200))
        writer.write(b"GET /v1/models HTTP/1.1\r\n" + lines + b"\r\n")
        refusal(await rest(reader), 431, "head_too_large")


async def test_many_headers_are_fine() -> None:
    async with serving() as server, connected(server) as (reader, writer):
        lines = b"".join(b"h%d: %s\r\n" % (index, b"v" * 400) for index in range(100))
        writer.write(b"GET /health HTTP/1.1\r\n" + lines + b"connection: close\r\n\r\n")
        assert (await rest(reader)).startswith(b"HTTP/1.1 200 ")


async def test_what_is_no_http_is_told_so() -> None:
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        refusal(await rest(reader), 400, "invalid_http")


async def test_requests_behind_one_another_are_bounded() -> None:
    async with serving(FakeEngine(permits=0)) as server, connected(server) as (reader, writer):
        body = b'{"prompt": "a"}'
        head = POST + b"content-length: %d\r\n\r\n" % len(body)
        writer.write((head + body) * 3 + b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" * 5000)
        refusal(await rest(reader), 400, "invalid_http")


async def test_the_request_that_runs_ends_with_the_connection() -> None:
    """Also where another one waits behind it."""
    async with serving(FakeEngine(permits=0)) as server:
        async with connected(server) as (_, writer):
            body = b'{"prompt": "a"}'
            writer.write((POST + b"content-length: %d\r\n\r\n" % len(body) + body) * 2)
            await server.engine.arrivals(1)
        await aborted(server)


async def test_some_requests_behind_one_another_are_answered() -> None:
    async with serving() as server, connected(server) as (reader, writer):
        ask = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
        writer.write(ask * 5 + ask.replace(b"host", b"connection: close\r\nhost"))
        answer = await rest(reader)
    assert answer.count(b"HTTP/1.1 200 ") == 6


async def test_who_sends_nothing_loses_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.1)
    async with serving() as server, connected(server) as (reader, _):
        assert await rest(reader) == b""


async def test_half_a_head_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.1)
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nhost: ")
        refusal(await rest(reader), 408, "request_timeout")


async def test_half_a_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT_S", 0.1)
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(POST + b'content-length: 100\r\n\r\n{"prompt": ')
        refusal(await rest(reader), 408, "request_timeout")


async def test_a_body_that_trickles_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "BODY_TOTAL_S", 0.3)
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(POST + b"content-length: 100000\r\n\r\n")
        answer = asyncio.create_task(rest(reader))
        begun = time.monotonic()
        while not answer.done() and time.monotonic() - begun < PATIENCE_S:
            writer.write(b" ")
            await asyncio.sleep(0.02)
        refusal(await answer, 408, "request_timeout")


async def test_clocks_stop_while_a_request_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them may end a request that came in time and takes long."""
    for name in ("HEAD_TIMEOUT_S", "BODY_TIMEOUT_S", "BODY_TOTAL_S"):
        monkeypatch.setattr(http_protocol, name, 0.2)
    async with serving(FakeEngine(permits=0)) as server, connected(server) as (reader, writer):
        body = b'{"prompt": "a"}'
        writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await server.engine.arrivals(1)
        await asyncio.sleep(0.6)
        server.engine.release(50)
        assert (await rest(reader)).startswith(b"HTTP/1.1 200 ")


async def test_who_does_not_read_loses_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "WRITE_TIMEOUT_S", 0.2)
    connect = http_protocol.BoundedHttpProtocol.connection_made

    def narrow(own: http_protocol.BoundedHttpProtocol, transport: asyncio.Transport) -> None:
        """The system's buffers hold seconds of a stream; here they hold little."""
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        connect(own, transport)

    monkeypatch.setattr(http_protocol.BoundedHttpProtocol, "connection_made", narrow)
    engine = FakeEngine("x" * 100, context=2_000_000)
    async with serving(engine) as server, connected(server) as (reader, writer):
        reader.set_exception(ConnectionAbortedError())
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        # Log-probabilities make large frames, which fill the buffers soon.
        options = {"stream": True, "max_tokens": 1_000_000, "ignore_eos": True, "logprobs": 20}
        body = json.dumps({"prompt": "a", **options}).encode()
        writer.write(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        await aborted(server)
