"""Bodies that nobody should send: whatever comes, no fault of the server and the right envelope.

FUZZ_BODIES is how many are sent to each route; `make fuzz` sends more than ten thousand in all.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.models.shapes import write_tiny
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from tests.server.deciding import CHOICE, PREDICATE, SCORE, Recorder, serve
from tests.server.fakes import MODEL, PATIENCE_S, Running

BODIES = int(os.environ.get("FUZZ_BODIES", "60"))
USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
TALK = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    USER,
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "a cat"},
]
# A body of each route that is taken, from which others are made.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": TALK,
        "max_tokens": 3,
        "n": 2,
        "tools": TOOLS,
        "tool_choice": "auto",
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "early_exit": {"mode": "off"},
        "logit_bias": {"5": 1.5},
        "chat_template_kwargs": {"x": 1},
    },
    "/v1/completions": {
        "prompt": ["a", "b"],
        "max_tokens": 2,
        "echo": True,
        "logprobs": 1,
        "stop": ["x"],
        "seed": 3,
        "response_format": {"type": "json_object"},
    },
    "/v1/responses": {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "b"},
        ],
        "max_output_tokens": 2,
        "tools": [{"type": "function", **FUNCTION}],
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
    },
    "/v1/responses/input_tokens": {"input": "a", "instructions": "b"},
    "/v1/messages": {
        "model": "fake",
        "max_tokens": 2,
        "system": [{"type": "text", "text": "a"}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "b"}]}],
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["x"],
    },
    "/v1/messages/count_tokens": {"model": "fake", "messages": [USER]},
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "float", "dimensions": 8},
    "/v1/decisions": {"input": "A cat.", "questions": [PREDICATE, CHOICE, SCORE]},
    "/v1/systemone": {"state": "A cat.", "questions": {"so": {**PREDICATE, "type": "noul"}}},
    "/tokenize": {"messages": [USER], "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**70)),
    *("", "a", " ", "\0", "\ud800", "\u202e", "\U0001f600" * 30, "a" * 3000, "(a+)+$", "[" * 500),
    *("{{ 1 }}", "<end>", "auto", "json_schema", "off", "lossless", "text", "none", "nan"),
    *([], {}, [[]], [{}], [None], [[[[[[]]]]]], {"a": {"b": [1]}}, {"": ""}, {"type": "text"}),
    *([1, "a"], ["a"] * 70, [0] * 300, {"type": []}, {"type": "function"}, float("nan")),
    *(float("inf"), {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"$ref": "#/x"}),
)
# The largest numbers of choices and tokens are legal and take the tiny model seconds.
COSTLY = {"n": 2, "max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4}


class Attacked:
    """A server on a loop of its own, which runs while something is asked."""

    def __init__(self, runner: asyncio.Runner, server: Running) -> None:
        self._runner = runner
        self._client = httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S)
        app = runner.run(self._client.get("/openapi.json")).json()
        schemas = app["components"]["schemas"].values()
        self.properties = sorted({name for each in schemas for name in each.get("properties", ())})
        self.routes = {path for path, own in app["paths"].items() if "post" in own}

    def post(self, path: str, body: bytes, kind: str) -> httpx2.Response:
        headers = {"Content-Type": kind}
        return self._runner.run(self._client.post(path, content=body, headers=headers))

    def close(self) -> None:
        self._runner.run(self._client.aclose())


class Everything(Recorder):
    """Takes every kind of request."""

    def add(self, request: Any, submitted_at: float) -> None:
        self.engine.add(request, submitted_at)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    config = EngineConfig(device="cpu", exits="shared:2", max_num_seqs=8, kv_cache_memory=0.05)
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    engine = build_engine(config, folder, model_name=MODEL)
    running = serve(Everything(engine))
    with asyncio.Runner() as runner:
        made = Attacked(runner, runner.run(running.__aenter__()))
        try:
            yield made
        finally:
            made.close()
            runner.run(running.__aexit__(None, None, None))
    assert engine.memory.blocks.num_used == 0


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container inside ``value`` with every key of it."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [place for key, own in inner for place in ((value, key), *places(own))]


def spoilt(draw: st.DrawFn, body: dict[str, Any], properties: list[str]) -> Any:
    """``body`` with one to four changes of its structure."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 4))):
        if not body:
            break
        holder, key = draw(st.sampled_from(places(body)))
        match draw(st.sampled_from(("replace", "replace", "add", "add", "drop", "nest", "swap"))):
            case "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
            case "add" if isinstance(holder, dict):
                # A property that some route knows, of a right or a wrong value.
                holder[draw(st.sampled_from(properties))] = copy.deepcopy(
                    draw(st.sampled_from(NASTY))
                )
            case "add":
                holder.append(copy.deepcopy(holder[key]))
            case "drop":
                del holder[key]
            case "nest":
                holder[key] = draw(st.sampled_from(([holder[key]], {"type": holder[key]})))
            case _:
                other, place = draw(st.sampled_from(places(body)))
                holder[key] = copy.deepcopy(other[place])
    for name, most in COSTLY.items():
        if isinstance(body.get(name), int) and body[name] > most:
            body[name] = most if body[name] < 2**31 else body[name]
    return body


@st.composite
def bodies(draw: st.DrawFn, path: str, properties: list[str]) -> bytes:
    """A body for ``path``, wrong in its structure, and now and then in its bytes."""
    text = json.dumps(spoilt(draw, GOOD[path], properties)).encode()
    match draw(st.sampled_from(("json",) * 6 + ("cut", "flip", "insert", "noise", "other"))):
        case "cut":
            return text[: draw(st.integers(0, len(text)))]
        case "flip":
            at = draw(st.integers(0, len(text) - 1))
            return text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
        case "insert":
            at = draw(st.integers(0, len(text)))
            return text[:at] + draw(st.binary(max_size=12)) + text[at:]
        case "noise":
            return draw(st.binary(max_size=200))
        case "other":
            return json.dumps(draw(st.sampled_from(NASTY))).encode()
    return text


def check(path: str, response: httpx2.Response) -> None:
    """An answer, or an error in the envelope of the route's API."""
    assert response.status_code < 500, (response.status_code, response.text)
    if response.status_code == 200:
        assert '"server_error"' not in response.text
        assert '"api_error"' not in response.text
        return
    error = response.json()
    if path.startswith("/v1/messages"):
        assert set(error) == {"type", "error", "request_id"}
        assert set(error["error"]) == {"type", "message"}
    else:
        assert set(error) == {"error"}
        assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["message"]


@pytest.mark.parametrize("path", GOOD)
def test_no_body_is_a_fault_of_the_server(
    path: str, attacked: Attacked, caplog: pytest.LogCaptureFixture
) -> None:
    taken = attacked.post(path, json.dumps(GOOD[path]).encode(), "application/json")
    assert taken.status_code == 200, taken.text

    @settings(
        max_examples=BODIES,
        deadline=None,
        derandomize="FUZZ_BODIES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        body=bodies(path, attacked.properties),
        kind=st.sampled_from(("application/json",) * 8 + ("text/plain", "", "multipart/form-data")),
    )
    def attack(body: bytes, kind: str) -> None:
        check(path, attacked.post(path, body, kind))

    attack()
    loud = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert not loud, [each.getMessage() for each in loud]


def test_every_route_that_takes_a_body_is_attacked(attacked: Attacked) -> None:
    assert attacked.routes == set(GOOD)
