"""Server-sent events as OpenAI frames them: pure functions from payloads to bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from offramp.server.errors import OfframpError

MEDIA_TYPE: Final = "text/event-stream"
# Proxies must neither store nor collect the stream.
HEADERS: Final[Mapping[str, str]] = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"


def data(payload: Mapping[str, Any]) -> bytes:
    """One event; JSON has no raw line breaks, so one line holds any payload."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode("ascii") + b"\n\n"


def failure(error: OfframpError) -> bytes:
    """The end of a stream that went wrong after it began."""
    return data(error.body()) + DONE
