"""Scripted answers, prompts and event streams for the tests of the adapted APIs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx2

from offramp.models.step import TokenLogprobs
from offramp.server.engine.request import TokenEvent
from offramp.server.text.tokenizer import Tokenizer
from tests.server.fakes import CONTEXT, PATIENCE_S, FakeEngine, Running, _Slot, byte_backend

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
# All that an answer may hold, and in an order in which nothing goes on from what stands before it.
EVERYTHING = f"<think>Hm.</think>I add.\n{CALL}\n{OTHER}"
THOUGHTFUL = "{{ messages }} <think></think>"


def render(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A chat template that shows all it is told."""
    lines: list[str] = []
    for message in messages:
        said = message["content"]
        if "reasoning_content" in message:
            said = f"({message['reasoning_content']}){said}"
        lines.append(f"{message['role']}:{said}\n")
    if options.pop("continue_final_message", False):
        lines[-1] = lines[-1].removesuffix("\n")
    options.pop("add_generation_prompt", None)
    shown = "".join(f"[{name}={value}]" for name, value in sorted(options.items()))
    return "".join(lines) + shown


def roomy(engine: FakeEngine) -> FakeEngine:
    """``engine`` with a context that has room for tools."""
    engine.info = replace(engine.info, max_model_len=8 * CONTEXT)
    return engine


def speak(server: Running, template: str = "") -> None:
    """Let the server render with this file's template, which `template` is said to be."""
    server.context.tokenizer = Tokenizer(byte_backend(), render, template=template)


def prompts(server: Running) -> list[str]:
    """Texts of the prompts that the engine was given."""
    return [byte_backend().decode(list(each.prompt)) for each in server.engine.added]


class Scoring(FakeEngine):
    """Gives each token the log-probability -1, and "!" as the best of all."""

    def _next(self, slot: _Slot) -> TokenEvent | None:
        event = super()._next(slot)
        if event is None or slot.request.sampling.logprobs is None:
            return event
        best = byte_backend().encode("!").ids[0]
        found = TokenLogprobs(-1.0, 2, ((best, -0.5),)[: slot.request.sampling.logprobs])
        return event._replace(logprobs=(found,) * len(event.token_ids))


async def post(server: Running, path: str, body: Any, **headers: str) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        return await client.post(path, json=body, headers=headers)


async def get(server: Running, method: str, path: str) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        return await client.request(method, path)


async def events(server: Running, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All events of a stream; each is named twice, the same."""
    response = await post(server, path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    found: list[dict[str, Any]] = []
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found
