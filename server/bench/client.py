"""A closed load on a server over HTTP, every token timed where its client sees it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2 as httpx

from offramp.server.bench.dialects import Ask, Dialect
from offramp.server.bench.errors import LoadError
from offramp.server.bench.load import Trace

# A queue of slow answers is no failure; a server that is silent this long is.
_TIMEOUT_S = 600


class OverHTTP:
    """A running server, reached like any client: streamed completions of token ids."""

    def __init__(self, url: str, dialect: Dialect, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._dialect = dialect
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def run(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        mode: str,
        concurrency: int,
        max_tokens: int,
        ignore_eos: bool = False,
    ) -> list[Trace]:
        """See Target."""
        asks = [Ask(prompt, mode, max_tokens, ignore_eos) for prompt in prompts]
        try:
            return asyncio.run(self._run(asks, concurrency))
        except httpx.HTTPError as error:
            raise LoadError(f"{self._url}: {str(error) or type(error).__name__}") from error

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``; raises LoadError."""
        try:
            reply = httpx.get(self._url + path, headers=self._headers, timeout=_TIMEOUT_S)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise LoadError(f"{self._url}{path}: {error}") from error
        found: dict[str, Any] = reply.json()
        return found

    async def _run(self, asks: Sequence[Ask], concurrency: int) -> list[Trace]:
        gate = asyncio.Semaphore(concurrency)
        # A connection for each request: llama.cpp closes them after a stream without saying so.
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            headers=self._headers, timeout=_TIMEOUT_S, limits=limits
        ) as client:

            async def one(ask: Ask) -> Trace:
                async with gate:
                    return await self._streamed(client, ask)

            traces = list(await asyncio.gather(*map(one, asks)))
            for trace, ask in zip(traces, asks, strict=True):
                if len(trace.token_ids) < len(trace.times):
                    # Some servers hold back tokens that end inside a character and then stream
                    # their text without their ids. The times stand; the ids are asked for again.
                    trace.token_ids = await self._whole(client, ask)
        return traces

    async def _streamed(self, client: httpx.AsyncClient, ask: Ask) -> Trace:
        body = self._dialect.body(ask, stream=True)
        trace = Trace(ask.prompt, time.monotonic())
        url = self._url + self._dialect.path
        async with client.stream("POST", url, json=body) as response:
            if response.is_error:
                raise LoadError(f"{response.status_code}: {(await response.aread()).decode()}")
            async for chunk in _events(response):
                now = time.monotonic()
                if "error" in chunk:
                    raise LoadError(chunk["error"]["message"])
                self._dialect.absorb(trace, chunk, now)
        if not trace.times:
            raise LoadError("a stream ended without a token")
        return trace

    async def _whole(self, client: httpx.AsyncClient, ask: Ask) -> list[int]:
        body = self._dialect.body(ask, stream=False)
        response = await client.post(self._url + self._dialect.path, json=body)
        response.raise_for_status()
        return self._dialect.token_ids(response.json())


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
