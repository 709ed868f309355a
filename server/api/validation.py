"""Pydantic's findings as the one error a client gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from offramp.server.errors import InvalidRequest

_MAX_PARAM: Final = 100
_MAX_MESSAGE: Final = 300
# Steps pydantic adds to a location that are no fields of the body.
_NOT_FIELDS: Final = frozenset({"body", "texts", "token_ids"})
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
    """Dotted path of a field: ``messages.0.content``."""
    steps = [str(step) for step in location]
    path = ".".join(step for step in steps if step not in _NOT_FIELDS)[:_MAX_PARAM]
    # Keys of the body may hold lone surrogates, which no response can carry.
    return path.encode("utf-8", "replace").decode("utf-8")


def _code(kind: str) -> str:
    if kind in _CODES:
        return _CODES[kind]
    return "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
