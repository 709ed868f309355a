"""langchain-openai: chat models, completions and embeddings."""

from __future__ import annotations

from typing import Any, Literal

import openai
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from tests.clients.parts.checks import (
    BASE_URL,
    FORCED_TOKENS,
    FUNCTION,
    MAX_TOKENS,
    MODEL,
    PROMPT,
    TOOL,
    TOOL_MESSAGES,
    arguments,
    check,
    raises,
    run,
)

WHERE = {"base_url": BASE_URL, "api_key": "none", "max_retries": 0, "timeout": 60}
TOOL_PROMPT = TOOL_MESSAGES[0]["content"]


class Judgement(BaseModel):
    """What is known of the capital."""

    city: Literal["Paris", "Rome"]
    certain: bool


def model(**options: Any) -> Any:
    """A chat model that answers greedily."""
    settings = {"model": MODEL, "temperature": 0, "max_tokens": MAX_TOKENS, **WHERE, **options}
    return ChatOpenAI(**settings)


@check("chat")
def chat() -> None:
    answer = model().invoke(PROMPT)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] > 0


@check("stream")
def stream() -> None:
    whole = model().invoke(PROMPT)
    total = None
    for chunk in model(stream_usage=True).stream(PROMPT):
        total = chunk if total is None else total + chunk
    assert total is not None
    assert total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


@check("completion")
def completion() -> None:
    text = OpenAI(model=MODEL, temperature=0, max_tokens=8, **WHERE).invoke(
        "The capital of France is"
    )
    assert "Paris" in text, text


@check("wrong value")
def wrong_value() -> str:
    wrong = model(temperature=9)
    return raises(openai.BadRequestError, lambda: wrong.invoke(PROMPT))


@check("unknown model")
def unknown_model() -> str:
    wrong = model(model="no-such-model")
    return raises(openai.NotFoundError, lambda: wrong.invoke(PROMPT))


@check("tools")
def tools() -> None:
    bound = model(max_tokens=FORCED_TOKENS).bind_tools([TOOL], tool_choice="required")
    call = bound.invoke(TOOL_PROMPT).tool_calls[0]
    assert call["name"] == FUNCTION["name"]
    arguments(call["args"])


@check("tools, streamed")
def tools_streamed() -> None:
    bound = model(max_tokens=FORCED_TOKENS).bind_tools([TOOL], tool_choice="required")
    total = None
    for chunk in bound.stream(TOOL_PROMPT):
        total = chunk if total is None else total + chunk
    assert total is not None
    arguments(total.tool_calls[0]["args"])


@check("json schema")
def json_schema() -> None:
    shaped = model(max_tokens=FORCED_TOKENS).with_structured_output(
        Judgement, method="json_schema", strict=True
    )
    assert isinstance(shaped.invoke(PROMPT), Judgement)


@check("logprobs")
def logprobs() -> None:
    answer = model(logprobs=True, top_logprobs=2).invoke(PROMPT)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert tokens


@check("embeddings")
def embeddings() -> None:
    # Its check of lengths needs tables of tiktoken from the network.
    embedder = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, **WHERE)
    first, second = embedder.embed_documents(["a cat", "a dog"])
    assert len(first) == len(second) > 1


@check("responses")
def responses() -> None:
    answer = model(use_responses_api=True).invoke(PROMPT)
    assert answer.text


@check("responses, streamed")
def responses_streamed() -> None:
    total = None
    for chunk in model(use_responses_api=True).stream(PROMPT):
        total = chunk if total is None else total + chunk
    assert total is not None
    assert total.text
    assert total.usage_metadata["output_tokens"] > 0


@check("responses, tools")
def responses_tools() -> None:
    bound = model(use_responses_api=True, max_tokens=FORCED_TOKENS).bind_tools(
        [TOOL], tool_choice="required"
    )
    arguments(bound.invoke(TOOL_PROMPT).tool_calls[0]["args"])


run()
