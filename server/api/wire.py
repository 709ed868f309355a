"""On the wire beside answers: error envelopes, server-sent events, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from offramp.server.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    OfframpError,
    RequestTooLarge,
    ServerError,
)

MEDIA_TYPE: Final = "text/event-stream"
# Proxies must neither store nor collect the stream.
HEADERS: Final[Mapping[str, str]] = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def data(payload: Mapping[str, Any]) -> bytes:
    """One event; JSON has no raw line breaks, so one line holds any payload."""
    return b"data: " + _ENCODER.encode(payload).encode("ascii") + b"\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One event that is named by its payload's ``type``."""
    return f"event: {payload['type']}\n".encode("ascii") + data(payload)


def failure(error: OfframpError) -> bytes:
    """The end of a stream that went wrong after it began."""
    return data(error.body()) + DONE


_MAX_PARAM: Final = 100
_MAX_MESSAGE: Final = 300
# Steps pydantic adds to a location that are no fields of the body.
_NOT_FIELDS: Final = frozenset({"body", "texts", "token_ids", "word", "named"})
# Further ones, behind the index of a list's item: which form of a union was tried.
_FORMS: Final = frozenset(
    {"predicate", "choice", "score", "message", "call", "output", "reasoning"}
)
_CODES: Final[Mapping[str, str]] = {
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
    "unsupported_parameter": "unsupported_parameter",
    "extra_forbidden": "unknown_parameter",
}


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The first of pydantic's ``errors`` as OpenAI's; what the client sent is not repeated."""
    first = errors[0]
    kind = str(first["type"])
    if kind == "json_invalid":
        return InvalidRequest("The body is not valid JSON.", code=_CODES[kind])
    param = field_path(first["loc"])
    if not param:
        return InvalidRequest(
            "The body must be a JSON object, sent with Content-Type: application/json.",
            code="invalid_type",
        )
    message = str(first["msg"])[:_MAX_MESSAGE]
    return InvalidRequest(f"{param}: {message}.", param=param, code=_code(kind))


def field_path(location: Sequence[str | int]) -> str:
    """Path of a field as OpenAI writes it: ``messages[0].content``."""
    path = ""
    behind_index = False
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in _NOT_FIELDS and not (behind_index and step in _FORMS):
            path += f".{step}" if path else step
        behind_index = isinstance(step, int)
    path = path[:_MAX_PARAM]
    # Keys of the body may hold lone surrogates, which no response can carry.
    return path.encode("utf-8", "replace").decode("utf-8")


def _code(kind: str) -> str:
    if kind in _CODES:
        return _CODES[kind]
    return "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"


T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client left before its answer; it is never sent."""


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Result of ``work``; raises ClientDisconnected, with ``work`` cancelled, if the client left.

    The body of ``request`` must have been read: what comes next on its channel is the disconnect.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


logger = logging.getLogger("offramp.api")

REQUEST_ID_HEADER = "X-Request-Id"
# nginx's status for a client that closed the connection; only logs ever see it.
CLIENT_CLOSED = 499


def as_wire_error(error: Exception) -> OfframpError:
    """The error a client may see; faults of ours are logged here and described in general terms."""
    if isinstance(error, OfframpError) and not isinstance(error, ServerError):
        return error
    logger.error("request failed", exc_info=error)
    if isinstance(error, ServerError):
        return error
    return ServerError("The server had an error while processing the request.")


# Routes of Anthropic's API; everything else is OpenAI's.
_ANTHROPIC: Final = "/v1/messages"
_ANTHROPIC_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: OfframpError, request_id: str) -> dict[str, Any]:
    """Anthropic's error object; it has no place for the field at fault but its message."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    message, param = error.message, error.param
    if isinstance(error, ContextLengthExceeded):
        # Anthropic's words, by which its clients know that they must shorten the conversation.
        message = f"prompt is too long: {message}"
    elif param is not None and not message.startswith(param) and f"'{param}'" not in message:
        message = f"{param}: {message}"
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id,
    }


def error_response(
    error: OfframpError, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    """The envelope of the API that ``scope``'s path belongs to, with the error's status."""
    if not isinstance(error, ServerError):
        # For the metrics.
        scope.setdefault("state", {})["refusal"] = error.code
    body: Mapping[str, Any] = error.body()
    path = scope["path"]
    if path == _ANTHROPIC or path.startswith(f"{_ANTHROPIC}/"):
        body = anthropic_error(error, scope.get("state", {}).get("request_id", ""))
    # ASCII escapes carry what UTF-8 cannot.
    return Response(
        json.dumps(body),
        status_code=error.status,
        headers={**error.headers, **(headers or {})},
        media_type="application/json",
    )


def register(app: FastAPI) -> None:
    """Answer every exception of ``app`` with the envelope."""
    handlers: dict[type[Exception], Callable[[Exception], OfframpError]] = {
        OfframpError: as_wire_error,
        RequestValidationError: _from_validation,
        HTTPException: _from_http,
    }
    for kind, translate in handlers.items():
        app.add_exception_handler(kind, _handler(translate))
    app.add_exception_handler(ClientDisconnected, _closed)
    app.add_exception_handler(Exception, _unexpected)


def _handler(translate: Callable[[Exception], OfframpError]) -> Any:
    async def handle(request: Request, error: Exception) -> Response:
        return error_response(translate(error), request.scope)

    return handle


async def _closed(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _unexpected(request: Request, _error: Exception) -> Response:
    # This runs outside the middleware that names requests. The server logs the traceback.
    request_id = getattr(request.state, "request_id", "")
    message = f"The server had an error while processing the request ({request_id})."
    headers = {REQUEST_ID_HEADER: request_id}
    return error_response(ServerError(message), request.scope, headers)


def _from_validation(error: Exception) -> OfframpError:
    assert isinstance(error, RequestValidationError)
    return invalid_request(error.errors())


def _from_http(error: Exception) -> OfframpError:
    """Errors of the framework: unknown route, wrong method, unreadable body."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == NotFound.status:
        return NotFound("There is no such route.", headers=headers)
    if error.status_code == MethodNotAllowed.status:
        return MethodNotAllowed("This route does not allow that method.", headers=headers)
    if error.status_code == RequestTooLarge.status:
        return RequestTooLarge("The request is too large.", headers=headers)
    return InvalidRequest("The body is not valid JSON.", code="invalid_json", headers=headers)
