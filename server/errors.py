"""Every error a client can meet.

OfframpError
 |- RequestError            the request is at fault (4xx)
 |   |- InvalidRequest      400
 |   |- ContextLengthExceeded 400
 |   |- Unauthorized        401
 |   |- NotFound            404
 |   |   `- ModelNotFound
 |   |- MethodNotAllowed    405
 |   |- RequestTooLarge     413
 |   |- InvalidHttp         400
 |   |- HeadTooLarge        431
 |   |- RequestTimeout      408
 |   |- QueueFull           429
 |   `- KeyBusy             429
 |- DeadlineExceeded        504, the time that the client or the server gave is over
 |- ServiceUnavailable      the server cannot take it now (503)
 |   |- EngineLoading
 |   |- ShuttingDown
 |   `- EngineFailed
 |- ServerError             500, the cause is logged, never sent
 `- BugError                a broken invariant; its message ends in "This is a bug."

Each class carries its status, type and code, so turning one into OpenAI's error body is one
function (`body`) and one handler.
"""

from __future__ import annotations

from typing import ClassVar


class OfframpError(Exception):
    """Root of all errors raised on purpose."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.headers = headers or {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """The wire form: OpenAI's error envelope."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class RequestError(OfframpError):
    """The client can mend it."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A field is missing, of the wrong type, out of range or not supported."""

    default_code = "invalid_value"


class ContextLengthExceeded(RequestError):
    """Prompt plus answer do not fit the model's context."""

    default_code = "context_length_exceeded"


class Unauthorized(RequestError):
    """No key, or the wrong one."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class NotFound(RequestError):
    """No such route."""

    status = 404
    default_code = "not_found"


class ModelNotFound(NotFound):
    """No such model on this server."""

    default_code = "model_not_found"


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""

    status = 405
    default_code = "method_not_allowed"


class RequestTooLarge(RequestError):
    """The body is over the limit."""

    status = 413
    default_code = "request_too_large"


class InvalidHttp(RequestError):
    """What came is no HTTP request."""

    default_code = "invalid_http"


class HeadTooLarge(RequestError):
    """The request's line and headers are over the limit."""

    status = 431
    default_code = "head_too_large"


class RequestTimeout(RequestError):
    """The request did not come in time."""

    status = 408
    default_code = "request_timeout"


class QueueFull(RequestError):
    """Too many requests wait already; try again later."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"


class KeyBusy(RequestError):
    """A key has as many requests as a key may have at once."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class DeadlineExceeded(OfframpError):
    """The answer was not there in the time that the client or the server gave it."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"

    def __init__(self, seconds: float) -> None:
        # Another try would take as long.
        super().__init__(
            f"There was no whole answer after {seconds:g} s.", headers={"x-should-retry": "false"}
        )


class ServiceUnavailable(OfframpError):
    """The server cannot take requests at this moment."""

    status = 503
    type = "service_unavailable"
    default_code = "service_unavailable"


class EngineLoading(ServiceUnavailable):
    """The model is still being loaded."""

    default_code = "loading"


class ShuttingDown(ServiceUnavailable):
    """The server finishes what runs and takes nothing new."""

    default_code = "shutting_down"


class EngineFailed(ServiceUnavailable):
    """The engine is gone for good; the server must be restarted."""

    default_code = "engine_failed"


class ServerError(OfframpError):
    """A fault of ours."""

    default_code = "internal_error"


class BugError(ServerError):
    """A broken invariant."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} This is a bug.")


class EngineConfigError(Exception):
    """The engine cannot be built as configured; the message says to the user what would work.

    No client meets it: it ends a start.
    """
