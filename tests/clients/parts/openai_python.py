"""The official Python client, of any major version."""

from __future__ import annotations

from typing import Any, Literal

import openai
from pydantic import BaseModel

from tests.clients.parts.checks import (
    BASE_URL,
    FORCED_TOKENS,
    FUNCTION,
    MAX_TOKENS,
    MESSAGES,
    MODEL,
    PROMPT,
    TOOL,
    TOOL_MESSAGES,
    arguments,
    check,
    raises,
    run,
)

# The requests are of constants whose types the client cannot see.
client: Any = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60)
CHAT = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS}
FORCED = {
    "model": MODEL,
    "messages": TOOL_MESSAGES,
    "temperature": 0,
    "max_tokens": FORCED_TOKENS,
    "tools": [TOOL],
    "tool_choice": "required",
}
RESPONSE = {"model": MODEL, "input": PROMPT, "temperature": 0, "max_output_tokens": MAX_TOKENS}


class Judgement(BaseModel):
    city: Literal["Paris", "Rome"]
    certain: bool


@check("chat")
def chat() -> None:
    answer = client.chat.completions.create(**CHAT)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in {"stop", "length"}
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@check("stream")
def stream() -> None:
    whole = client.chat.completions.create(**CHAT)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**CHAT, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, f"streamed {text!r}"
    assert chunks[-1].usage == whole.usage, f"{chunks[-1].usage} and {whole.usage}"


@check("completion")
def completion() -> None:
    request = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0}
    answer = client.completions.create(**request, max_tokens=8)
    assert "Paris" in answer.choices[0].text, answer.choices[0].text
    chunks = client.completions.create(**request, max_tokens=8, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].text


@check("models")
def models() -> None:
    assert MODEL in [card.id for card in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check("unknown model")
def unknown_model() -> str:
    raises(openai.NotFoundError, lambda: client.models.retrieve("no-such-model"))
    wrong = {**CHAT, "model": "no-such-model"}
    return raises(openai.NotFoundError, lambda: client.chat.completions.create(**wrong))


@check("wrong value")
def wrong_value() -> str:
    wrong = {**CHAT, "temperature": 9}
    return raises(openai.BadRequestError, lambda: client.chat.completions.create(**wrong))


@check("tools")
def tools() -> None:
    choice = client.chat.completions.create(**FORCED).choices[0]
    call = choice.message.tool_calls[0]
    assert call.id
    assert call.function.name == FUNCTION["name"]
    arguments(call.function.arguments)
    assert choice.finish_reason == "tool_calls", choice.finish_reason


@check("tools, streamed")
def tools_streamed() -> None:
    names, pieces, reasons = [], [], []
    for chunk in client.chat.completions.create(**FORCED, stream=True):
        for choice in chunk.choices:
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or ():
                if call.index == 0:
                    names += [call.function.name] if call.function.name else []
                    pieces.append(call.function.arguments or "")
    assert names == [FUNCTION["name"]], f"names {names}"
    arguments("".join(pieces))
    assert reasons == ["tool_calls"], reasons


@check("tool result")
def tool_result() -> None:
    """A second turn, which gives the call's result back."""
    message = client.chat.completions.create(**FORCED).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    turns = [*TOOL_MESSAGES, message, result]
    answer = client.chat.completions.create(
        model=MODEL, messages=turns, tools=[TOOL], tool_choice="none", temperature=0, max_tokens=24
    )
    assert answer.choices[0].message.content


@check("json schema")
def json_schema() -> str:
    request = {**CHAT, "max_tokens": FORCED_TOKENS}
    answer = client.chat.completions.parse(**request, response_format=Judgement)
    found = answer.choices[0].message.parsed
    assert isinstance(found, Judgement)
    return str(found)


@check("logprobs")
def logprobs() -> None:
    choice = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3).choices[0]
    text = "".join(token.token for token in choice.logprobs.content)
    assert text.startswith(choice.message.content), f"{text!r}"
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob, "greedy takes the most likely"
    answer = client.completions.create(model=MODEL, prompt="One two", logprobs=2, max_tokens=4)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs)


@check("embeddings")
def embeddings() -> str:
    answer = client.embeddings.create(model=MODEL, input=["a cat", "a dog"])
    first, second = (item.embedding for item in answer.data)
    assert len(first) == len(second) > 1
    assert first != second
    plain = client.embeddings.create(model=MODEL, input=["a cat"], encoding_format="float")
    gap = max(abs(a - b) for a, b in zip(first, plain.data[0].embedding, strict=True))
    assert gap < 1e-5, f"base64 and float differ by {gap}"
    return f"{len(first)} numbers"


@check("responses")
def responses() -> None:
    answer = client.responses.create(**RESPONSE)
    assert answer.status in {"completed", "incomplete"}
    assert answer.output_text
    assert answer.usage.output_tokens > 0


@check("responses, streamed")
def responses_streamed() -> None:
    events = list(client.responses.create(**RESPONSE, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in {"response.completed", "response.incomplete"}
    text = "".join(each.delta for each in events if each.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens > 0


@check("responses, tools")
def responses_tools() -> None:
    request = {**RESPONSE, "input": TOOL_MESSAGES, "max_output_tokens": FORCED_TOKENS}
    tool = {"type": "function", "strict": True, **FUNCTION}
    answer = client.responses.create(**request, tools=[tool], tool_choice="required")
    calls = [item for item in answer.output if item.type == "function_call"]
    assert calls, f"output {[item.type for item in answer.output]}"
    arguments(calls[0].arguments)


@check("responses, json schema")
def responses_json_schema() -> None:
    request = {**RESPONSE, "max_output_tokens": FORCED_TOKENS}
    answer = client.responses.parse(**request, text_format=Judgement)
    assert isinstance(answer.output_parsed, Judgement)


run()
