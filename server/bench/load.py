"""A closed load on an engine in this process or on a server over HTTP, every token timed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2 as httpx

from offramp.models.sampling_params import ExitMode, ExitSettings, KVFill, SamplingParams
from offramp.server.engine.bulk import run_all
from offramp.server.engine.engine import Engine
from offramp.server.engine.request import GenerationRequest


class LoadError(Exception):
    """A request of the load failed, so there is nothing to report."""


@dataclass(slots=True)
class Trace:
    """One answer as its client saw it; times in seconds, ``layers_executed`` summed over tokens."""

    prompt: tuple[int, ...]
    submitted_at: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    layers_executed: int = 0


class Target(Protocol):
    """Something that answers prompts."""

    def run(
        self, prompts: Sequence[tuple[int, ...]], *, mode: str, concurrency: int, max_tokens: int
    ) -> list[Trace]:
        """Greedy answers of at most ``max_tokens`` tokens, ``concurrency`` at a time."""
        ...


class InProcess:
    """An engine on this thread: what the machine can do, without HTTP.

    ``threshold`` replaces the scores the exits were calibrated to.
    """

    def __init__(
        self, engine: Engine, threshold: float | None = None, kv_fill: str = "project"
    ) -> None:
        self.engine = engine
        self._fill = kv_fill
        self._threshold = threshold
        self._count = 0

    def run(
        self, prompts: Sequence[tuple[int, ...]], *, mode: str, concurrency: int, max_tokens: int
    ) -> list[Trace]:
        """See Target."""
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            stop_token_ids=frozenset(self.engine.info.eos_token_ids),
        )
        count = len(self.engine.info.exit_layers)
        thresholds = None if self._threshold is None else (self._threshold,) * count
        exits = ExitSettings(ExitMode(mode), thresholds=thresholds, kv_fill=KVFill(self._fill))
        requests = []
        for prompt in prompts:
            self._count += 1
            requests.append(GenerationRequest(str(self._count), prompt, sampling, exits))
        traces = []
        for item in run_all(self.engine, requests, concurrency=concurrency):
            if item.stats is None or not item.token_ids:
                raise LoadError(f"an answer ended early: {item.reason}")
            traces.append(
                Trace(
                    item.request.prompt,
                    item.submitted_at,
                    item.token_ids,
                    item.times,
                    item.stats.layers_executed,
                )
            )
        return traces


class OverHTTP:
    """A running server, reached like any client: streamed completions of token ids.

    ``wishes`` are fields of ``early_exit`` for mode adaptive.
    """

    def __init__(
        self, url: str, model: str, api_key: str | None, wishes: Mapping[str, Any]
    ) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._wishes = wishes

    def run(
        self, prompts: Sequence[tuple[int, ...]], *, mode: str, concurrency: int, max_tokens: int
    ) -> list[Trace]:
        """See Target."""
        return asyncio.run(self._run(prompts, mode, concurrency, max_tokens))

    async def _run(
        self, prompts: Sequence[tuple[int, ...]], mode: str, concurrency: int, max_tokens: int
    ) -> list[Trace]:
        gate = asyncio.Semaphore(concurrency)
        limits = httpx.Limits(max_connections=concurrency)
        async with httpx.AsyncClient(headers=self._headers, timeout=600, limits=limits) as client:

            async def one(prompt: tuple[int, ...]) -> Trace:
                async with gate:
                    return await self._one(client, prompt, mode, max_tokens)

            return list(await asyncio.gather(*map(one, prompts)))

    async def _one(
        self, client: httpx.AsyncClient, prompt: tuple[int, ...], mode: str, max_tokens: int
    ) -> Trace:
        early_exit: dict[str, Any] = {"mode": mode}
        if mode == "adaptive":
            early_exit |= self._wishes
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "early_exit": early_exit,
        }
        trace = Trace(prompt, time.monotonic())
        async with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            if response.is_error:
                raise LoadError(f"{response.status_code}: {(await response.aread()).decode()}")
            async for chunk in _events(response):
                _absorb(trace, chunk)
        if not trace.token_ids:
            raise LoadError("a stream ended without a token")
        return trace


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _absorb(trace: Trace, chunk: dict[str, Any]) -> None:
    now = time.monotonic()
    if "error" in chunk:
        raise LoadError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        ids = choice.get("token_ids") or []
        trace.token_ids += ids
        trace.times += [now] * len(ids)
    early_exit = (chunk.get("metrics") or {}).get("early_exit")
    if early_exit:
        trace.layers_executed = early_exit["layers_executed"]
