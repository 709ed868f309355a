"""``offramp chat``: talk to a running server from a terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2 as httpx


class ChatError(Exception):
    """The server cannot be reached or refused the conversation."""


def main(argv: Sequence[str]) -> int:
    """Read lines, stream answers, show the mean exit layer after each; ends with end of input."""
    args = _parser().parse_args(argv)
    key = args.api_key or os.environ.get("OPENAI_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    messages: list[dict[str, str]] = []
    with httpx.Client(base_url=args.url, headers=headers, timeout=600) as client:
        for line in _lines():
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(client, messages, args)
            except (ChatError, httpx.HTTPError) as error:
                sys.stderr.write(f"offramp chat: {error}\n")
                return 1
            messages.append({"role": "assistant", "content": answer})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offramp chat", allow_abbrev=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--api-key", help="key of the server [OPENAI_API_KEY]")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--early-exit", default="adaptive", choices=("off", "adaptive"))
    return parser


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line:
            yield line


def _answer(client: httpx.Client, messages: list[dict[str, str]], args: argparse.Namespace) -> str:
    """Stream one answer to standard output and return it."""
    body = {
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "early_exit": args.early_exit,
    }
    pieces: list[str] = []
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            raise ChatError(json.loads(response.read())["error"]["message"])
        for chunk in _chunks(response):
            for choice in chunk["choices"]:
                pieces.append(choice["delta"].get("content") or "")
                sys.stdout.write(pieces[-1])
                sys.stdout.flush()
            _show_depth(chunk.get("metrics"))
    return "".join(pieces)


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ChatError(chunk["error"]["message"])
            yield chunk


def _show_depth(metrics: dict[str, Any] | None) -> None:
    if metrics:
        depth = metrics["early_exit"]
        sys.stdout.write(
            f"\n[mean exit layer {depth['mean_exit_layer']} of {depth['layers_total']}, "
            f"{metrics['tokens_per_second']} tokens/s]\n"
        )
