"""Servers as targets: how a kind of server is spoken to, and a client that costs next to nothing.

What is measured runs on the cores that the client runs on, so while answers stream it only notes
when their bytes came; they are read afterwards.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httptools
import httpx2 as httpx

from offramp.server.bench.common import BenchError
from offramp.server.bench.targets import Load, Prompt, Target, Trace

# A server may be slow to answer; one that is silent this long has failed.
_TIMEOUT_S = 600
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNK_BYTES = 1 << 16


class OpenAI:
    """OpenAI's completions with vLLM's fields and, for Offramp, its own.

    ``early_exit`` are fields of the request's ``early_exit`` in mode adaptive; None for a server
    without such a thing.
    """

    path = "/v1/completions"

    def __init__(self, model: str, early_exit: Mapping[str, Any] | None) -> None:
        self._model = model
        self._early_exit = early_exit

    def body(self, prompt: Prompt, load: Load, *, stream: bool) -> dict[str, Any]:
        """JSON of a request for one answer."""
        ours: dict[str, Any] = {}
        if self._early_exit is not None:
            fields = self._early_exit if load.mode == "adaptive" else {}
            ours = {"early_exit": {"mode": load.mode, **fields}}
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": load.max_tokens,
            "temperature": load.temperature,
            "seed": load.seed,
            "ignore_eos": load.ignore_eos,
            "return_token_ids": True,
            **ours,
            **streaming,
        }

    def absorb(self, trace: Trace, chunk: Mapping[str, Any], now: float) -> None:
        """Add the tokens of a streamed chunk, seen at ``now``, to ``trace``."""
        for choice in chunk["choices"]:
            ids = choice.get("token_ids") or []
            trace.token_ids += ids
            trace.times += [now] * len(ids)
        early_exit = (chunk.get("metrics") or {}).get("early_exit")
        if early_exit:
            trace.layers_executed = early_exit["layers_executed"]
            trace.passes = early_exit["passes"]
            trace.coarse = early_exit.get("activation_dtype") == "int8"
            drafts = early_exit["drafts"].items()
            trace.drafts = {source: (own["drafted"], own["accepted"]) for source, own in drafts}

    def token_ids(self, reply: Mapping[str, Any]) -> list[int]:
        """Ids of an answer that was not streamed."""
        return list(reply["choices"][0]["token_ids"])


class LlamaCpp:
    """llama.cpp's own completions: the OpenAI route next to it takes token ids but returns none.

    ``cache_prompt`` lets a prompt reuse what its slot still holds of the one before.
    """

    path = "/completion"

    def __init__(self, *, cache_prompt: bool) -> None:
        self._cache_prompt = cache_prompt

    def body(self, prompt: Prompt, load: Load, *, stream: bool) -> dict[str, Any]:
        """JSON of a request for one answer."""
        return {
            "prompt": list(prompt),
            "n_predict": load.max_tokens,
            "temperature": load.temperature,
            "seed": load.seed,
            "ignore_eos": load.ignore_eos,
            "cache_prompt": self._cache_prompt,
            "return_tokens": True,
            "stream": stream,
        }

    def absorb(self, trace: Trace, chunk: Mapping[str, Any], now: float) -> None:
        """The same; ``tokens_predicted`` also counts tokens whose ids are never streamed."""
        trace.token_ids += chunk["tokens"]
        trace.times += [now] * (chunk["tokens_predicted"] - len(trace.times))

    def token_ids(self, reply: Mapping[str, Any]) -> list[int]:
        """Ids of an answer that was not streamed."""
        return list(reply["tokens"])


WireFormat = OpenAI | LlamaCpp
"""How a kind of server is sent token ids, and how it returns its own."""


class OverHTTP(Target):
    """A running server, reached like any client: streamed completions of token ids."""

    def __init__(self, url: str, wire: WireFormat, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._wire = wire
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def answers(self, prompts: Sequence[Prompt], load: Load) -> list[Trace]:
        """See Target."""
        try:
            return asyncio.run(self._run(prompts, load))
        except (OSError, TimeoutError, httptools.HttpParserError, ValueError) as error:
            raise BenchError(f"{self._url}: {str(error) or type(error).__name__}") from error

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``; raises BenchError."""
        try:
            reply = httpx.get(self._url + path, headers=self._headers, timeout=_TIMEOUT_S)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise BenchError(f"{self._url}{path}: {error}") from error
        found: dict[str, Any] = reply.json()
        return found

    async def _run(self, prompts: Sequence[Prompt], load: Load) -> list[Trace]:
        gate = asyncio.Semaphore(load.concurrency)

        async def one(prompt: Prompt, own: Load) -> tuple[float, _Reply]:
            async with gate:
                begun = time.monotonic()
                return begun, await self._post(self._wire.body(prompt, own, stream=True))

        loads = [replace(load, seed=load.seed + i) for i in range(len(prompts))]
        replies = await asyncio.gather(*map(one, prompts, loads))
        traces = []
        for prompt, own, (begun, reply) in zip(prompts, loads, replies, strict=True):
            trace = Trace(prompt, begun)
            for now, chunk in reply.events():
                self._wire.absorb(trace, chunk, now)
            if not trace.times:
                raise BenchError("a stream ended without a token")
            if len(trace.token_ids) < len(trace.times):
                # Some servers hold back tokens that end inside a character and then stream
                # their text without their ids. The times stand; the ids are requested again.
                again = await self._post(self._wire.body(prompt, own, stream=False))
                trace.token_ids = self._wire.token_ids(json.loads(again.body))
            traces.append(trace)
        return traces

    async def _post(self, body: Mapping[str, Any]) -> _Reply:
        """The whole reply to a request with a connection of its own.

        llama.cpp closes connections after a stream without saying so.
        """
        url, data = urlsplit(self._url), json.dumps(body).encode()
        secure = url.scheme == "https"
        headers = {
            "Host": url.netloc,
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            "Connection": "close",
            **self._headers,
        }
        head = f"POST {url.path}{self._wire.path} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        port = url.port or (443 if secure else 80)
        reader, writer = await asyncio.open_connection(url.hostname, port, ssl=secure or None)
        try:
            writer.write(head.encode() + data)
            reply = _Reply()
            while not reply.ended:
                async with asyncio.timeout(_TIMEOUT_S):
                    received = await reader.read(_CHUNK_BYTES)
                if not received:
                    break
                reply.feed(received)
        finally:
            writer.close()
        if reply.status >= httpx.codes.BAD_REQUEST:
            raise BenchError(f"{reply.status}: {reply.body.decode(errors='replace')}")
        return reply


class _Reply:
    """A response: its body in parts, and when each came. A parser of httptools calls ``on_...``."""

    def __init__(self) -> None:
        self.ended = False
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._parts: list[tuple[float, bytes]] = []

    def feed(self, received: bytes) -> None:
        """Take bytes that came just now; raises HttpParserError."""
        self._now = time.monotonic()
        self._parser.feed_data(received)

    def on_body(self, part: bytes) -> None:
        """Part of the body, without the frames of its transfer."""
        self._parts.append((self._now, part))

    def on_message_complete(self) -> None:
        """The body has ended."""
        self.ended = True

    @property
    def status(self) -> int:
        """HTTP status; 0 if the connection ended before it came."""
        found: int = self._parser.get_status_code()
        return found

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(part for _, part in self._parts)

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Server-sent events: when each was complete, its JSON. Raises BenchError for errors."""
        rest = b""
        for now, part in self._parts:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                data = line.strip().removeprefix(b"data: ")
                if data == line.strip() or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise BenchError(chunk["error"]["message"])
                yield now, chunk


_Raw = tuple[float, bytes, bytes]
"""Seconds of a request, head and body of the reply."""


class JsonClient:
    """Requests in flight by a client that costs next to nothing; ``keep`` its connections.

    It runs on the cores that are measured, and replies are read once all are there.
    """

    def __init__(self, url: str, key: str | None = None, *, keep: bool = True) -> None:
        self.url = url.rstrip("/")
        self._keep = keep
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def post_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], concurrency: int
    ) -> tuple[list[tuple[float, Any]], float]:
        """Seconds and reply of each, and the seconds of all; raises BenchError."""
        try:
            replies, seconds = asyncio.run(self._post_all(path, bodies, concurrency))
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            raise BenchError(f"{self.url}{path}: {str(error) or type(error).__name__}") from error
        found = []
        for spent, head, body in replies:
            status = head.split(b" ", 2)[1]
            if status != b"200":
                raise BenchError(f"{self.url}{path}: {status.decode()} {body[:300].decode()}")
            found.append((spent, json.loads(body)))
        return found, seconds

    def get(self, path: str) -> Any:
        """The JSON at ``path``."""
        try:
            reply = httpx.get(self.url + path, headers=self._headers, timeout=_TIMEOUT_S)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise BenchError(f"{self.url}{path}: {error}") from error
        return reply.json()

    async def _post_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], concurrency: int
    ) -> tuple[list[_Raw], float]:
        url = urlsplit(self.url)
        head = "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        head = f"POST {url.path}{path} HTTP/1.1\r\nHost: {url.netloc}\r\n{head}"
        head += "Content-Type: application/json\r\nContent-Length: "
        waiting = [
            f"{head}{len(body)}\r\n\r\n".encode() + body
            for body in (json.dumps(each).encode() for each in bodies)
        ]
        numbers = iter(range(len(waiting)))
        found: list[_Raw | None] = [None] * len(waiting)

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            secure = url.scheme == "https"
            port = url.port or (443 if secure else 80)
            return await asyncio.open_connection(url.hostname, port, ssl=secure or None)

        async def worker() -> None:
            reader, writer = await connect()
            for number in numbers:
                begun = time.perf_counter()
                if not self._keep:
                    writer.close()
                    reader, writer = await connect()
                writer.write(waiting[number])
                async with asyncio.timeout(_TIMEOUT_S):
                    status = await reader.readuntil(b"\r\n\r\n")
                    size = _LENGTH.search(status)
                    body = await reader.readexactly(int(size[1]) if size else 0)
                found[number] = (time.perf_counter() - begun, status, body)
            writer.close()

        begun = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return [each for each in found if each is not None], time.perf_counter() - begun
