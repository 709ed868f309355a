"""``offramp chat`` against a server with a fake engine."""

from __future__ import annotations

import asyncio
import io

import pytest

from offramp.server.commands import chat
from tests.server.fakes import FakeEngine, Running, serving


async def run(server: Running, monkeypatch: pytest.MonkeyPatch, text: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return await asyncio.to_thread(chat.main, ["--url", server.url, "--max-tokens", "50"])


async def test_answers_and_their_depth_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving() as server:
        assert await run(server, monkeypatch, "one\n\ntwo\n") == 0
        second = server.engine.added[1]
    text = capsys.readouterr().out
    assert text.count("Hello, world!") == 2
    assert text.count("[mean exit layer 3.0 of 4, ") == 2
    # The second question is asked with the first and its answer before it.
    turns = ("user:one\n", "assistant:Hello, world!\n", "user:two\n")
    assert len(second.prompt) == sum(map(len, turns))


@pytest.mark.parametrize(("line", "told"), [("refuse me\n", "template"), ("hi\n", "engine failed")])
async def test_refusals_and_broken_streams_are_told(
    line: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(FakeEngine(fail_at=2)) as server:
        assert await run(server, monkeypatch, line) == 1
    assert told in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert chat.main(["--url", "http://127.0.0.1:1"]) == 1
    assert "offramp chat:" in capsys.readouterr().err
