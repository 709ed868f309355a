"""Framing of server-sent events."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from offramp.server.api import wire
from offramp.server.errors import EngineFailed


@given(text=st.text())
def test_an_event_is_one_line_of_json_and_an_empty_line(text: str) -> None:
    frame = wire.data({"text": text})
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    body = frame[len(b"data: ") : -2]
    assert b"\n" not in body
    assert b"\r" not in body
    assert json.loads(body) == {"text": text}


def test_an_error_is_an_event_before_the_end() -> None:
    error, done, rest = wire.failure(EngineFailed("gone")).split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "gone"
    assert done == b"data: [DONE]"
    assert rest == b""


def test_keep_alive_is_a_comment() -> None:
    assert wire.KEEP_ALIVE.startswith(b":")
    assert wire.KEEP_ALIVE.endswith(b"\n\n")
