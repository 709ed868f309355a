"""Counts HTTP requests: by route, method and class of status, with their time and sizes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.server.api.middleware import OPEN_PATHS

if TYPE_CHECKING:
    from offramp.server.metrics import Metrics

_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(slots=True)
class HttpExchange:
    """An HTTP request and its answer; sizes are bytes of the bodies.

    ``handler`` is the route's path as it is declared, "none" without a route, so that what clients
    send never becomes a label. An answer without a status is a fault.
    """

    method: str
    handler: str = "none"
    status: int = 500
    seconds: float = 0.0
    received: int = 0
    sent: int = 0


class HttpMetrics:
    """Follows each request that is no probe from its head to the end of its answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count it at its end."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        exchange = HttpExchange(method if method in _METHODS else "other")
        started = time.monotonic()

        async def counted_receive() -> Message:
            message = await receive()
            exchange.received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            exchange.sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            exchange.seconds = time.monotonic() - started
            exchange.handler = _handler(scope)
            self._metrics.http(exchange)
            refusal = scope.get("state", {}).get("refusal")
            if refusal is not None:
                self._metrics.refused(refusal)


def _handler(scope: Scope) -> str:
    route: Any = scope.get("route")
    return getattr(route, "path", "none")
