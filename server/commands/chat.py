"""``offramp chat``: talk to a running server from a terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2 as httpx

from offramp.server.commands.chat_screen import Screen

MODES: Final = ("off", "adaptive", "lossless")
_HELP: Final = """\
/reset            forget the conversation
/system [TEXT]    what the model is told first; without a text, nothing
/mode [MODE]      off, adaptive or lossless; without one, the server's default
/quality [SHARE]  agreement with full depth wanted, such as 0.98; without one, the server's
/exit             end, as Ctrl-D does; Ctrl-C stops an answer
\"\"\"               begins and ends a text of several lines; // begins one with a slash"""
_BLOCK: Final = '"""'


class ChatError(Exception):
    """The server cannot be reached or refused the conversation."""


def main(argv: Sequence[str]) -> int:
    """Read lines, stream answers, tell their depth and speed; ends with end of input."""
    args = _parser().parse_args(argv)
    key = args.api_key or os.environ.get("OPENAI_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with contextlib.suppress(ImportError):
        # Makes `input` edit lines and remember them.
        import readline  # noqa: F401, PLC0415
    with httpx.Client(base_url=args.url, headers=headers, timeout=600) as client:
        chat = Chat(
            client,
            Screen(),
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            mode=args.early_exit,
            quality=args.quality,
            system=args.system,
        )
        return chat.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="offramp chat", allow_abbrev=False, epilog="Inside, /help lists the commands."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--api-key", help="key of the server [OPENAI_API_KEY]")
    parser.add_argument("--system", default="", help="what the model is told first")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--early-exit", choices=MODES, help="the server's default if not given")
    parser.add_argument(
        "--quality", type=_quality, help="agreement with full depth wanted, such as 0.98"
    )
    return parser


def _quality(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.5 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0.5 to 1")
    return value


@dataclass
class Chat:
    """A conversation; ``mode`` and ``quality`` None leave early exit to the server."""

    client: httpx.Client
    screen: Screen
    temperature: float
    max_tokens: int
    mode: str | None = None
    quality: float | None = None
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> int:
        """Answer until the input ends; the exit status."""
        attended = sys.stdin.isatty()
        try:
            self._meet()
        except (ChatError, httpx.HTTPError) as error:
            sys.stderr.write(f"offramp chat: {error}\n")
            return 1
        if attended:
            self.screen.note("/help lists the commands")
        for text in self._texts():
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if text in {"/exit", "/quit", "/bye"}:
                        return 0
                    self._command(text)
                else:
                    self._turn(text.removeprefix("/"))
            except (ChatError, httpx.HTTPError) as error:
                self.screen.end_line()
                sys.stderr.write(f"offramp chat: {error}\n")
                if not attended:
                    return 1
        return 0

    def _meet(self) -> None:
        """Learn how deep the model is; another vendor's server does not say."""
        response = self.client.get("/v1/models")
        if response.is_error:
            raise ChatError(_reason(response))
        card = json.loads(response.read())["data"][0]
        self.screen.legend(card.get("num_layers", 0), card.get("exit_layers", []))

    def _texts(self) -> Iterator[str]:
        """What the user writes, without blank lines; lines between two marks are one text."""
        block: list[str] | None = None
        while True:
            try:
                line = input("> " if block is None else "... ")
            except EOFError:
                return
            except KeyboardInterrupt:
                self.screen.note("\n/exit or Ctrl-D ends")
                block = None
                continue
            if block is None and line.strip().startswith(_BLOCK):
                block, line = [], line.strip().removeprefix(_BLOCK)
            if block is None:
                if line.strip():
                    yield line.strip()
                continue
            block.append(line.rstrip().removesuffix(_BLOCK))
            if line.rstrip().endswith(_BLOCK):
                text, block = "\n".join(block).strip("\n"), None
                if text.strip():
                    # A slash in a block is the text's own.
                    yield f"/{text}" if text.startswith("/") else text

    def _command(self, text: str) -> None:
        name, _, value = text.partition(" ")
        value = value.strip()
        match name:
            case "/reset":
                self.turns.clear()
            case "/system":
                self.system = value
            case "/mode" if value in {"", *MODES}:
                self.mode = value or None
            case "/quality":
                try:
                    self.quality = _quality(value) if value else None
                except argparse.ArgumentTypeError as error:
                    raise ChatError(str(error)) from None
            case "/help":
                self.screen.note(_HELP)
            case _:
                raise ChatError(f"{text} is no command; /help lists them")

    def _turn(self, text: str) -> None:
        """Ask, and show the answer; Ctrl-C stops it and keeps what there is."""
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            pieces.extend(self._answer())
        except KeyboardInterrupt:
            self.screen.note("[stopped]")
        finally:
            if pieces:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.turns.pop()

    def _answer(self) -> Iterator[str]:
        """Texts of an answer as they come, shown."""
        with self.client.stream("POST", "/v1/chat/completions", json=self._body()) as response:
            if response.is_error:
                raise ChatError(_reason(response))
            for chunk in _chunks(response):
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    layers = choice.get("exit_layers") or []
                    self.screen.piece(piece, layers, choice.get("token_sources") or [])
                    yield piece
                metrics = chunk.get("metrics")
                if metrics:
                    self.screen.summary(metrics)

    def _body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        wishes = {"mode": self.mode, "quality": self.quality}
        given = {name: wish for name, wish in wishes.items() if wish is not None}
        return {
            "messages": [*system, *self.turns],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "return_exit_layers": True,
            "return_token_sources": True,
            **({"early_exit": given} if given else {}),
        }


def _reason(response: httpx.Response) -> str:
    """What an answer with an error says, whoever sent it."""
    try:
        return str(json.loads(response.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answers {response.status_code}"


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ChatError(chunk["error"]["message"])
            yield chunk
