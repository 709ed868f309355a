"""Exceptions to OpenAI's error envelope: the one place where that happens."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from offramp.server.api.disconnect import ClientDisconnected
from offramp.server.api.validation import invalid_request
from offramp.server.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    OfframpError,
    RequestTooLarge,
    ServerError,
)

logger = logging.getLogger("offramp.api")

REQUEST_ID_HEADER = "X-Request-Id"
# nginx's status for a client that closed the connection; only logs ever see it.
CLIENT_CLOSED = 499


def as_wire_error(error: Exception) -> OfframpError:
    """The error a client may see; faults of ours are logged here and told in general terms."""
    if isinstance(error, OfframpError) and not isinstance(error, ServerError):
        return error
    logger.error("request failed", exc_info=error)
    if isinstance(error, ServerError):
        return error
    return ServerError("The server had an error while processing the request.")


def error_response(error: OfframpError, headers: Mapping[str, str] | None = None) -> Response:
    """The envelope with the error's status."""
    # ASCII escapes carry what UTF-8 cannot.
    return Response(
        json.dumps(error.body()),
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
    async def handle(_: Request, error: Exception) -> Response:
        return error_response(translate(error))

    return handle


async def _closed(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _unexpected(request: Request, _error: Exception) -> Response:
    # This runs outside the middleware that names requests. The server logs the traceback.
    request_id = getattr(request.state, "request_id", "")
    message = f"The server had an error while processing the request ({request_id})."
    return error_response(ServerError(message), {REQUEST_ID_HEADER: request_id})


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
