"""Anthropic's Python client."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
from pydantic import BaseModel

from tests.clients.parts.checks import (
    FORCED_TOKENS,
    FUNCTION,
    MAX_TOKENS,
    MESSAGES,
    MODEL,
    ORIGIN,
    PARAMETERS,
    TOOL_MESSAGES,
    arguments,
    check,
    raises,
    run,
)

client: Any = anthropic.Anthropic(base_url=ORIGIN, api_key="none", max_retries=0, timeout=60)
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": MAX_TOKENS}
TOOL = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": PARAMETERS,
}
FORCED = {
    "model": MODEL,
    "messages": TOOL_MESSAGES,
    "max_tokens": FORCED_TOKENS,
    # A sampled argument may be longer than the answer.
    "extra_body": {"temperature": 0},
    "tools": [TOOL],
    "tool_choice": {"type": "any"},
}


class Judgement(BaseModel):
    city: Literal["Paris", "Rome"]
    certain: bool


@check("messages")
def messages() -> None:
    answer = client.messages.create(**CHAT, system="Answer briefly.")
    assert answer.role == "assistant"
    assert answer.content[0].text
    assert answer.stop_reason in {"end_turn", "max_tokens"}
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens > 0


@check("messages, streamed")
def messages_streamed() -> None:
    with client.messages.stream(**CHAT) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text
    assert final.stop_reason in {"end_turn", "max_tokens"}
    assert final.usage.output_tokens > 0


@check("models")
def models() -> None:
    assert MODEL in [card.id for card in client.models.list()]


@check("wrong value")
def wrong_value() -> str:
    wrong = {**CHAT, "extra_body": {"temperature": 9}}
    return raises(anthropic.BadRequestError, lambda: client.messages.create(**wrong))


@check("unknown model")
def unknown_model() -> str:
    wrong = {**CHAT, "model": "no-such-model"}
    text = raises(anthropic.NotFoundError, lambda: client.messages.create(**wrong))
    assert "not_found_error" in text, text
    return text


@check("messages, tools")
def messages_tools() -> None:
    answer = client.messages.create(**FORCED)
    call = next(block for block in answer.content if block.type == "tool_use")
    assert call.name == TOOL["name"]
    arguments(call.input)
    assert answer.stop_reason == "tool_use", answer.stop_reason


@check("messages, tools streamed")
def messages_tools_streamed() -> None:
    with client.messages.stream(**FORCED) as stream:
        final = stream.get_final_message()
    call = next(block for block in final.content if block.type == "tool_use")
    arguments(call.input)


@check("tool result")
def tool_result() -> None:
    """A second turn, which gives the call's result back."""
    answer = client.messages.create(**FORCED)
    call = next(block for block in answer.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [
        *TOOL_MESSAGES,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    last = client.messages.create(model=MODEL, max_tokens=24, messages=turns, tools=[TOOL])
    assert last.content


@check("json schema")
def json_schema() -> None:
    request = {**CHAT, "max_tokens": FORCED_TOKENS}
    answer = client.messages.parse(**request, output_format=Judgement)
    assert isinstance(answer.parsed_output, Judgement)


@check("count tokens")
def count_tokens() -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES)
    used = client.messages.create(**CHAT).usage
    cached = (used.cache_read_input_tokens or 0) + (used.cache_creation_input_tokens or 0)
    assert counted.input_tokens == used.input_tokens + cached, f"{counted} and {used}"


run()
