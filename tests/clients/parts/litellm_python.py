"""litellm, which speaks all three protocols."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

# Its table of prices would come from the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from pydantic import BaseModel

from tests.clients.parts.checks import (
    BASE_URL,
    FORCED_TOKENS,
    FUNCTION,
    MAX_TOKENS,
    MESSAGES,
    MODEL,
    ORIGIN,
    PROMPT,
    TOOL,
    TOOL_MESSAGES,
    arguments,
    check,
    raises,
    run,
)

lite: Any = litellm
WHERE = {"api_base": BASE_URL, "api_key": "none", "num_retries": 0, "timeout": 60}
CHAT = {"model": f"openai/{MODEL}", "messages": MESSAGES, "temperature": 0, **WHERE}
FORCED = {
    **CHAT,
    "messages": TOOL_MESSAGES,
    "tools": [TOOL],
    "tool_choice": "required",
    "max_tokens": FORCED_TOKENS,
}


class Judgement(BaseModel):
    city: Literal["Paris", "Rome"]
    certain: bool


@check("chat")
def chat() -> None:
    answer = lite.completion(**CHAT, max_tokens=MAX_TOKENS)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


@check("stream")
def stream() -> None:
    whole = lite.completion(**CHAT, max_tokens=MAX_TOKENS)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(lite.completion(**CHAT, max_tokens=MAX_TOKENS, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@check("completion")
def completion() -> None:
    answer = lite.text_completion(
        model=f"text-completion-openai/{MODEL}",
        prompt="The capital of France is",
        temperature=0,
        max_tokens=8,
        **WHERE,
    )
    assert "Paris" in answer.choices[0].text, answer.choices[0].text


@check("models")
def models() -> None:
    found = lite.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_key="none",
        api_base=BASE_URL,
    )
    assert any(MODEL in name for name in found), found


@check("wrong value")
def wrong_value() -> str:
    wrong = {**CHAT, "max_tokens": MAX_TOKENS, "temperature": 9}
    return raises(lite.BadRequestError, lambda: lite.completion(**wrong))


@check("unknown model")
def unknown_model() -> str:
    wrong = {**CHAT, "max_tokens": MAX_TOKENS, "model": "openai/no-such-model"}
    return raises(lite.NotFoundError, lambda: lite.completion(**wrong))


@check("tools")
def tools() -> None:
    call = lite.completion(**FORCED).choices[0].message.tool_calls[0]
    assert call.function.name == FUNCTION["name"]
    arguments(call.function.arguments)


@check("tools, streamed")
def tools_streamed() -> None:
    whole = lite.stream_chunk_builder(list(lite.completion(**FORCED, stream=True)))
    arguments(whole.choices[0].message.tool_calls[0].function.arguments)


@check("json schema")
def json_schema() -> None:
    # It knows no models but its own, and sends a schema only where asked to.
    answer = lite.completion(
        **CHAT,
        max_tokens=FORCED_TOKENS,
        response_format=Judgement,
        allowed_openai_params=["response_format"],
    )
    Judgement.model_validate_json(answer.choices[0].message.content)


@check("logprobs")
def logprobs() -> None:
    answer = lite.completion(**CHAT, max_tokens=MAX_TOKENS, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert tokens
    assert all(len(token.top_logprobs) == 2 for token in tokens)


@check("embeddings")
def embeddings() -> None:
    answer = lite.embedding(
        model=f"openai/{MODEL}",
        input=["a cat", "a dog"],
        encoding_format="float",
        **{key: value for key, value in WHERE.items() if key != "num_retries"},
    )
    assert len(answer.data) == 2


@check("responses")
def responses() -> None:
    answer = lite.responses(
        model=f"openai/{MODEL}", input=PROMPT, max_output_tokens=MAX_TOKENS, temperature=0, **WHERE
    )
    text = json.dumps([item.model_dump() for item in answer.output])
    assert "output_text" in text, text


@check("messages")
def messages() -> None:
    where = {**WHERE, "api_base": ORIGIN}
    answer = lite.completion(
        model=f"anthropic/{MODEL}", messages=MESSAGES, max_tokens=MAX_TOKENS, **where
    )
    assert answer.choices[0].message.content


@check("messages, tools")
def messages_tools() -> None:
    forced = {**FORCED, "model": f"anthropic/{MODEL}", "api_base": ORIGIN}
    call = lite.completion(**forced).choices[0].message.tool_calls[0]
    arguments(call.function.arguments)


run()
