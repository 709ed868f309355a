"""Bodies of every route, right ones and ones that nobody should send, and what may be answered."""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx2
from hypothesis import strategies as st

from tests.server.deciding import CHOICE, PREDICATE, SCORE

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
