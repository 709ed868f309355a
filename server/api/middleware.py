"""What happens to every request before a route sees it. Pure ASGI, so streams pass untouched."""

from __future__ import annotations

import hmac
import re
import uuid
from collections import Counter
from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.server.api.context import Context
from offramp.server.api.wire import REQUEST_ID_HEADER, as_wire_error, error_response
from offramp.server.errors import KeyBusy, RequestTooLarge, ServerError, Unauthorized

# Probes and scrapers carry no key.
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/version", "/metrics", "/load"})
_PANIC: Final = "The server had an error while processing the request."
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
# So much of a body over the limit is still read, and dropped: a client cut off while it sends sees
# a broken connection instead of the answer.
_DRAIN_BYTES: Final = 64 * 1024**2
# Values of a JSON body, about: reading many more would hold the event loop for longer than other
# requests should wait. Names count twice, since they take longer.
_MAX_VALUES: Final = 524_288
_WITHOUT_BODY: Final = frozenset({"GET", "HEAD", "OPTIONS"})
# Of a Content-Length; int() of much longer ones is slow.
_MAX_DIGITS: Final = 18


class RequestId:
    """Puts a request id, the client's own if it is sane, on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Name the request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        started = False

        async def named_send(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named_send)
        except BaseException as error:
            # Libraries in Rust raise their panics as exceptions that no handler of the framework
            # takes for errors.
            if type(error).__name__ != "PanicException":
                raise
            fault = ServerError(_PANIC)
            fault.__cause__ = error
            refusal = error_response(as_wire_error(fault), scope)
            if not started:
                await refusal(scope, receive, named_send)


class HeadAsGet:
    """Lets HEAD reach the GET routes; the HTTP server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rename the method."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class InFlight:
    """Counts the requests to the model that have not been answered to their end."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the request while it lasts."""
        if not _asks_the_model(scope):
            await self._app(scope, receive, send)
            return
        self._context.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._context.in_flight -= 1


class ApiKey:
    """Refuses requests without one of the keys in force, on every path that is not open.

    ``most`` bounds the requests to the model that have one key and are not answered to their end;
    None is no bound.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[bytes],
        open_paths: frozenset[str],
        most: int | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths
        self._most = most
        self._open: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        key = self._key(scope)
        if key is not None:
            await self._counted(key, scope, receive, send)
            return
        error = Unauthorized(
            "Send a valid key as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'.",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error, scope)(scope, receive, send)

    async def _counted(self, key: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        if self._most is None or not _asks_the_model(scope):
            await self._app(scope, receive, send)
            return
        if self._open[key] >= self._most:
            error = KeyBusy(
                f"This key has {self._open[key]} requests running or waiting already; try again "
                "later.",
                headers={"Retry-After": "1"},
            )
            await error_response(error, scope)(scope, receive, send)
            return
        self._open[key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                # Keys come and go.
                del self._open[key]

    def _key(self, scope: Scope) -> bytes | None:
        """The key in force that was sent; None without one."""
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        sent = headers.getlist("x-api-key")
        if scheme.lower() == "bearer":
            sent.append(bearer.strip())
        # All keys are compared, each in constant time, so timing tells nothing.
        matches = [
            key
            for each in sent
            for key in self._keys
            if hmac.compare_digest(each.encode("latin-1"), key)
        ]
        return matches[0] if matches else None


class BodyLimit:
    """Reads the body up to ``max_bytes`` and hands it on; more is refused with 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, then pass on."""
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except RequestTooLarge as error:
            await error_response(error, scope)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client left before its end."""
        most = self._max_bytes + _DRAIN_BYTES
        chunks: list[bytes] = []
        total = self._announced(scope)
        more = total <= most
        received = 0
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            received += len(chunk)
            if received <= self._max_bytes:
                chunks.append(chunk)
            more = message.get("more_body", False) and received <= most
        if max(total, received) > self._max_bytes:
            raise RequestTooLarge(
                f"The body is over the limit of {self._max_bytes} bytes.",
                headers={"Connection": "close"},
            )
        body = b"".join(chunks)
        if len(body) > _MAX_VALUES and body.count(b",") + 2 * body.count(b":") > _MAX_VALUES:
            raise RequestTooLarge("The body holds too many values.")
        return body

    @staticmethod
    def _announced(scope: Scope) -> int:
        text = Headers(scope=scope).get("content-length", "")
        return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else 0


def _asks_the_model(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return str(scope["path"]).startswith("/v1/")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that first gives the body that was read, then what really comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
