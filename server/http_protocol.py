"""HTTP/1.1 on a connection, with bounds on what a client may send, and in which time.

uvicorn's protocol takes heads of any size and waits for them for ever. Here a head is bounded in
bytes and lines, a client that is slow to send, or to read, loses its connection, and what is
refused is refused before any of it reaches the application.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from offramp.server.api.wire import REQUEST_ID_HEADER
from offramp.server.errors import HeadTooLarge, InvalidHttp, OfframpError, RequestTimeout

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_HEADERS: Final = 128
MAX_PIPELINED: Final = 16
"""Requests of one connection that wait for the answer to another."""
HEAD_TIMEOUT_S: Final = 20.0
BODY_TIMEOUT_S: Final = 60.0
"""Longest time without any part of a body; one that trickles has `BODY_TOTAL_S` in all."""
BODY_TOTAL_S: Final = 600.0
WRITE_TIMEOUT_S: Final = 60.0
"""Longest time that a client may leave an answer unread once the buffers are full."""
# Heads are fed to the parser in pieces of this size, so that a bound is met soon after it.
_PIECE: Final = 16 * 1024
# How long, and how much, a refused client may go on sending before it is cut off.
_LINGER_S: Final = 1.0
_MAX_DROPPED: Final = 1024**2


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds; a refusal closes the connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_body = False
        self._head_bytes = 0
        self._num_headers = 0
        self._refused = False
        self._dropped = 0
        self._running: RequestResponseCycle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._body_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request's head."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        for timer in (self._head_timer, self._body_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        # uvicorn tells the request that came last, while the one before it is answered.
        self.pipeline.clear()
        self._end_running()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless a bound is broken."""
        if self._refused:
            self._dropped += len(data)
            if self._dropped > _MAX_DROPPED:
                self.transport.close()
        start = 0
        while start < len(data) and not self._is_over():
            # Bodies are bounded by the application; they come in one piece.
            piece = data[start:] if self._in_body else data[start : start + _PIECE]
            start += len(piece)
            if not self._in_body:
                self._begin_head()
                self._head_bytes += len(piece)
            super().data_received(piece)
            if not self._in_body and self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge("The request's head is too large."))
            elif len(self.pipeline) > MAX_PIPELINED:
                self._refuse(InvalidHttp("Too many requests wait on this connection."))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count the header."""
        self._num_headers += 1
        if self._num_headers <= MAX_HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Pass the request on, unless it has too many headers."""
        self._cancel_head()
        too_many = self._num_headers > MAX_HEADERS
        self._head_bytes = self._num_headers = 0
        if too_many:
            self._refuse(HeadTooLarge(f"A request may have {MAX_HEADERS} headers."))
            return
        if self._refused:
            return
        self._in_body = True
        self._body_since = self.loop.time()
        self._await_body()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        if not self._refused:
            self._await_body()
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The next thing to come is another head."""
        self._in_body = False
        self._cancel_body()
        if not self._refused:
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as the answer comes."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the envelope of all errors."""
        self._refuse(InvalidHttp(msg))

    def on_refusal(self, code: str) -> None:
        """A request is refused with the error ``code``."""

    def _is_over(self) -> bool:
        return self._refused or self.transport.is_closing()

    def _begin_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)

    def _cancel_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_body(self) -> None:
        self._cancel_body()
        left = self._body_since + BODY_TOTAL_S - self.loop.time()
        self._body_timer = self.loop.call_later(min(BODY_TIMEOUT_S, left), self._body_late)

    def _cancel_body(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse(RequestTimeout("The request's head did not come in time."))
        else:
            # Nothing was asked, so there is nothing to answer.
            self.transport.close()

    def _body_late(self) -> None:
        self._body_timer = None
        self._refuse(RequestTimeout("The request's body did not come in time."))

    def _refuse(self, error: OfframpError) -> None:
        """Answer with an error and close; a request that began is given up."""
        if self._is_over():
            return
        self._refused = True
        self.on_refusal(str(error.code))
        cycle = self._running
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_response(error))
        self._end_running()
        self.pipeline.clear()
        # Closed at once, with data of the client unread, the connection would be reset, and the
        # client might never see why.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _end_running(self) -> None:
        """Tell the request that is being answered that its client is gone."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()


def counting(on_refusal: Callable[[str], None]) -> type[BoundedHttpProtocol]:
    """The protocol, with a listener for its refusals."""

    class Counted(BoundedHttpProtocol):
        """The protocol of one server."""

        def on_refusal(self, code: str) -> None:
            """Tell the listener."""
            on_refusal(code)

    return Counted


def _response(error: OfframpError) -> bytes:
    body = json.dumps(error.body()).encode()
    request_id = uuid.uuid4().hex
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"{REQUEST_ID_HEADER.lower()}: {request_id}",
        "connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode("ascii") + body
