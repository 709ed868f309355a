"""What /openapi.json says beside the routes themselves: their errors, and the types of answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from offramp.server.api import wire
from offramp.server.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    OfframpError,
    QueueFull,
    RequestTooLarge,
    ServerError,
    ServiceUnavailable,
    Unauthorized,
)


class ErrorDetail(BaseModel):
    """What went wrong; ``param`` is the field at fault, if it is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


class AnthropicDetail(BaseModel):
    """What went wrong; the message names the field at fault."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """Anthropic's form of an error."""

    type: Literal["error"]
    error: AnthropicDetail
    request_id: str


_MEANINGS: Final[dict[type[OfframpError], str]] = {
    InvalidRequest: "A field is missing, wrong or not supported, or the context is too short.",
    Unauthorized: "No key, or the wrong one.",
    ModelNotFound: "No such model on this server.",
    RequestTooLarge: "The body is over --max-body-size.",
    DeadlineExceeded: "The answer took longer than its 'timeout' or --request-timeout.",
    QueueFull: "Too many requests wait already.",
    ServerError: "A fault of the server, or of its device.",
    ServiceUnavailable: "The model is being loaded, the server stops, or its engine has failed.",
}
# What a route may answer with that reads the engine's facts, a body, or lets the model run.
READS: Final = (ServerError, ServiceUnavailable)
TAKES_A_BODY: Final = (InvalidRequest, ModelNotFound, RequestTooLarge, *READS)
RUNS_THE_MODEL: Final = (*TAKES_A_BODY, QueueFull, DeadlineExceeded)
STREAMED: Final[dict[int | str, dict[str, Any]]] = {200: {"content": {wire.MEDIA_TYPE: {}}}}


def errors(
    kinds: Iterable[type[OfframpError]], form: type[BaseModel] = ErrorEnvelope
) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that may end in these errors, as FastAPI takes them."""
    return {kind.status: {"model": form, "description": _MEANINGS[kind]} for kind in kinds}


class DescribedApp(FastAPI):
    """FastAPI, with a description that does not promise its own form of a refused body."""

    def openapi(self) -> dict[str, Any]:
        """The schema of all routes; made once."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    # A body that is refused is 400 here, in the envelope.
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        assert self.openapi_schema is not None
        return self.openapi_schema
