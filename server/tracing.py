"""A span of OpenTelemetry for each request to the model, sent to a collector over OTLP (HTTP).

OpenTelemetry is an optional extra: it is imported where tracing is asked for, and nowhere else.
Spans are exported by a thread of the library's; those that a collector does not take are dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span

# Routes that are traced, with the operation that they are (gen_ai.operation.name).
_OPERATIONS: Final[Mapping[str, str]] = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/decisions": "decisions",
    "/v1/systemone": "decisions",
}
# A collector that hangs holds the exporting thread, and the end of the process, no longer.
_EXPORT_TIMEOUT_S: Final = 3.0
_MOST_WAITING: Final = 2048


class TracingError(Exception):
    """Spans cannot be sent as configured; the message says why."""


class RequestSpan:
    """The span of one request, while that is answered."""

    def __init__(self, span: Span, operation: str) -> None:
        self._span = span
        self._operation = operation
        self._error: str | None = None

    def describe(self, model: str, attributes: Mapping[str, Any]) -> None:
        """Name the span after its operation on ``model``, and say more of it."""
        self._span.update_name(f"{self._operation} {model}")
        known = {name: value for name, value in attributes.items() if value is not None}
        self._span.set_attributes({"gen_ai.request.model": model, **known})

    def failed(self, error: str) -> None:
        """The answer ended with an error behind a status that was sent."""
        self._error = error

    def end(self, status: int, refusal: str | None) -> None:
        """The answer, which has the HTTP ``status``, was sent."""
        from opentelemetry.trace import StatusCode  # noqa: PLC0415 (an optional extra)

        is_fault = status >= 500 or self._error is not None
        error = self._error or refusal or (str(status) if is_fault else None)
        self._span.set_attribute("http.response.status_code", status)
        if error is not None:
            self._span.set_attribute("error.type", error)
        if is_fault:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def span_of(request: Request) -> RequestSpan | None:
    """The span of a request; None where it is not traced."""
    span: RequestSpan | None = getattr(request.state, "span", None)
    return span


class Tracing:
    """Makes spans and sends them to the collector at ``endpoint``; raises TracingError."""

    def __init__(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise TracingError(f"--otlp-traces-endpoint {endpoint}: no http:// or https:// address")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
                TraceContextTextMapPropagator,
            )
        except ImportError as error:
            raise TracingError(
                f"--otlp-traces-endpoint needs OpenTelemetry (pip install 'offramp[otel]'): {error}"
            ) from error
        named = Resource({"service.name": "offramp", "service.version": __version__})
        provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter, max_queue_size=_MOST_WAITING, max_export_batch_size=_MOST_WAITING
            )
        )
        self._provider = provider
        self._tracer = provider.get_tracer("offramp", __version__)
        self._propagator = TraceContextTextMapPropagator()

    async def flush(self) -> None:
        """Send all spans that have ended."""
        await asyncio.to_thread(self._provider.force_flush)

    def start(self, scope: Scope) -> RequestSpan | None:
        """The span of a request, part of its client's trace; None on routes that are not traced."""
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 (an optional extra)

        operation = _OPERATIONS.get(scope["path"])
        if operation is None or scope["method"] != "POST":
            return None
        headers = Headers(scope=scope)
        sent = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            operation,
            self._propagator.extract(sent),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "offramp",
                "gen_ai.request.id": scope["state"]["request_id"],
                "http.request.method": "POST",
                "http.route": scope["path"],
            },
        )
        return RequestSpan(span, operation)


class TraceRequests:
    """Lets each request have its span, as ``span`` of its state, until it is answered."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Trace the request."""
        span = self._tracing.start(scope) if scope["type"] == "http" else None
        if span is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["span"] = span
        # An answer without a status is a fault.
        status = 500

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            span.end(status, scope["state"].get("refusal"))
