"""``offramp chat`` against a server with a fake engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from rich.console import Console

from offramp.models.sampling_params import ExitMode
from offramp.server.commands import chat
from offramp.server.commands.chat_screen import Screen
from tests.server.fakes import FakeEngine, Running, serving

METRICS: dict[str, Any] = {
    "tokens_per_second": 12.34,
    "early_exit": {
        "mode": "lossless",
        "mean_exit_layer": 29.5,
        "layers_total": 30,
        "exit_histogram": {"30": 10},
        "passes": 6,
        "drafted_tokens": 8,
        "accepted_tokens": 4,
    },
}


async def run(
    server: Running, monkeypatch: pytest.MonkeyPatch, text: str, *words: str
) -> tuple[int, list[Any]]:
    """Exit status, and the requests that the engine saw."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    words = ("--url", server.url, "--max-tokens", "50", *words)
    return await asyncio.to_thread(chat.main, words), server.engine.added


async def test_answers_and_their_depth_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving() as server:
        status, added = await run(server, monkeypatch, "one\n\ntwo\n")
    assert status == 0
    text = capsys.readouterr().out
    assert text.count("Hello, world!") == 2
    assert text.count("mean exit layer 3.0 of 4, ") == 2
    assert "\x1b" not in text
    # The second question is asked with the first and its answer before it.
    turns = ("user:one\n", "assistant:Hello, world!\n", "user:two\n")
    assert len(added[1].prompt) == sum(map(len, turns))


async def test_early_exit_is_the_server_s_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(early_exit="off") as server:
        lines = "a\n/mode adaptive\nb\n/mode\nc\n"
        _, added = await run(server, monkeypatch, lines)
    modes = [request.exits.mode for request in added]
    assert modes == [ExitMode.OFF, ExitMode.ADAPTIVE, ExitMode.OFF]
    async with serving(early_exit="off") as server:
        _, added = await run(server, monkeypatch, "a\n", "--early-exit", "lossless")
    assert added[0].exits.mode is ExitMode.LOSSLESS


async def test_commands_and_texts_of_several_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (
        'first\n/reset\n/system Be brief.\n"""a\n\n b"""\n/help\n/reset\n/system\n//etc\n'
        '"""/x\n"""\n/exit\nnever\n'
    )
    async with serving() as server:
        status, added = await run(server, monkeypatch, lines)
    assert status == 0
    answer = "assistant:Hello, world!\n"
    expected = (
        "user:first\n",
        "system:Be brief.\nuser:a\n\n b\n",
        "user:/etc\n",
        f"user:/etc\n{answer}user:/x\n",
    )
    assert [len(request.prompt) for request in added] == list(map(len, expected))
    assert "/reset" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["/nothing", "/mode deep", "/quality 7", "/quality x"])
async def test_what_is_no_command_is_told(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving() as server:
        status, added = await run(server, monkeypatch, f"{line}\n")
    assert (status, added) == (1, [])
    assert "offramp chat: " in capsys.readouterr().err


@pytest.mark.parametrize("value", ["7", "x", "nan"])
def test_a_quality_that_is_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        chat.main(["--quality", value])
    assert "no share" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "told"), [("refuse me\n", "template"), ("hi\n", "engine failed")])
async def test_refusals_and_broken_streams_are_told(
    line: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(FakeEngine(fail_at=2)) as server:
        status, _ = await run(server, monkeypatch, line)
    assert status == 1
    assert told in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert chat.main(["--url", "http://127.0.0.1:1"]) == 1
    assert "offramp chat:" in capsys.readouterr().err


def own_chat(monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> tuple[chat.Chat, io.StringIO]:
    """A chat whose answers are these, or that interrupts itself where one is an exception."""
    out = io.StringIO()
    made = chat.Chat(httpx.Client(), Screen(Console(file=out)), 0.0, 10)
    monkeypatch.setattr(made, "_meet", lambda: None)

    def answer() -> Iterator[str]:
        for part in answers.pop(0):
            if isinstance(part, BaseException):
                raise part
            yield part

    monkeypatch.setattr(made, "_answer", answer)
    return made, out


def test_ctrl_c_stops_an_answer_and_not_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["He", KeyboardInterrupt()], [KeyboardInterrupt()], ["Yes"]]
    made, out = own_chat(monkeypatch, answers)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\n"))
    assert made.run() == 0
    # What was said of the first answer stays, the question without an answer does not.
    assert [turn["content"] for turn in made.turns] == ["a", "He", "c", "Yes"]
    assert out.getvalue().count("[stopped]") == 2


def test_ctrl_c_where_nothing_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = own_chat(monkeypatch, [["Yes"]])
    typed: Iterator[Any] = iter(['"""begun', KeyboardInterrupt(), "a", EOFError()])

    def read(_: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    assert made.run() == 0
    assert [turn["content"] for turn in made.turns] == ["a", "Yes"]
    assert "Ctrl-D" in out.getvalue()


def screen(**options: Any) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    shown = Screen(Console(file=out, highlight=False, **options))
    shown.legend(30, [8, 20])
    return shown, out


COLOURED = {"force_terminal": True, "color_system": "truecolor"}


def test_tokens_have_the_colour_of_their_layer() -> None:
    shown, out = screen(**COLOURED)
    legend = out.getvalue()
    for layer in (8, 20, 30):
        out.truncate(0)
        out.seek(0)
        shown.piece("word", [layer], ["model"])
        text = out.getvalue()
        if layer == 30:
            assert text == "word"
        else:
            # In the legend the layer has the same colour.
            assert text.replace("word", f"{layer} ") in legend
    out.truncate(0)
    shown.piece("word", [30, 30], ["model", "head"])
    assert "\x1b[4mword" in out.getvalue()


@pytest.mark.parametrize("options", [{}, {**COLOURED, "no_color": True}])
def test_no_colours_where_they_are_not_wanted(options: dict[str, Any]) -> None:
    shown, out = screen(**options)
    shown.piece("word", [8], [])
    assert "38;2" not in out.getvalue()
    assert "word" in out.getvalue()


def test_what_a_model_writes_gives_a_terminal_no_orders() -> None:
    shown, out = screen()
    shown.piece("a\x1b]0;title\x07\n\tb\x9bc", [30], [])
    assert out.getvalue() == "a\ufffd]0;title\ufffd\n\tb\ufffdc"


def test_a_summary_of_an_answer() -> None:
    shown, out = screen()
    shown.piece("word", [30], [])
    shown.summary(METRICS)
    assert out.getvalue() == (
        "word\n[lossless, mean exit layer 29.5 of 30, 12 tokens/s, 0.60 passes per token, "
        "4 of 8 drafts accepted]\n"
    )
