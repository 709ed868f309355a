"""POST /v1/embeddings: texts to vectors, from the served model's own states."""

import asyncio
import base64
import json
import logging
import math
import sys
import time
import uuid
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from offramp.models.step import Pooling
from offramp.server.api import span_attributes, wire
from offramp.server.api.context import Context, Shared
from offramp.server.api.deciding import read_answers
from offramp.server.api.fields import Count, Prompts, RequestModel, Text, refuse_unsupported
from offramp.server.api.prepared import Prompt
from offramp.server.api.schemas import warn_once
from offramp.server.engine.request import AnswerRequest, TokenEvent
from offramp.server.errors import ContextLengthExceeded, InvalidRequest
from offramp.server.tracing import span_of

logger = logging.getLogger("offramp.requests")

router = APIRouter(tags=["Embeddings"])

MAX_INPUTS: Final = 2048
# What chats and completions know; what embeddings share is shared by all clients.
_NOT_FOR_EMBEDDINGS: Final[Mapping[str, tuple[object, ...]]] = {
    "cache_salt": ("",),
    "priority": (0,),
}


def _not_too_many(inputs: list[Any]) -> list[Any]:
    if len(inputs) > MAX_INPUTS:
        raise PydanticCustomError("too_many", "at most 2048 inputs are allowed")
    return inputs


class EmbeddingBody(RequestModel):
    """OpenAI's fields, vLLM's ``normalize`` and ``add_special_tokens``, and ``pooling``."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    input: Annotated[Prompts, AfterValidator(_not_too_many)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    user: Text | None = None
    normalize: bool = True
    add_special_tokens: bool = True
    pooling: Annotated[Pooling, Field(strict=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_but_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            present = {name: each for name, each in data.items() if each is not None}
            refuse_unsupported(present, _NOT_FOR_EMBEDDINGS)
        return data

    @model_validator(mode="after")
    def _tell_unknown(self) -> "EmbeddingBody":
        for name in self.model_extra or ():
            warn_once(name)
        return self


class Embedding(BaseModel):
    """One input's vector: numbers, or their little-endian fp32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def create_embeddings(body: EmbeddingBody, request: Request, context: Shared) -> Response:
    """Embed one or several texts."""
    context.check_model(body.model)
    content = await wire.unless_disconnected(request, _embed(body, request, context))
    return Response(content, media_type="application/json")


async def _embed(body: EmbeddingBody, request: Request, context: Context) -> bytes:
    begun = time.monotonic()
    width = context.driver.info.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        raise InvalidRequest(
            f"This model's embeddings have {width} dimensions.", param="dimensions"
        )
    prompts = await _encoded(body, context)
    pooling = body.pooling or context.config.embedding_pooling
    reads = [AnswerRequest(prompt, (), pooling=pooling) for prompt in prompts]
    request_id = f"embd-{uuid.uuid4().hex}"
    event = await read_answers(context, request_id, reads)
    tokens = sum(map(len, prompts))
    content = await asyncio.to_thread(_written, body, context.model_name, event, tokens)
    seconds = time.monotonic() - begun
    context.metrics.embeddings(len(prompts), event.stats, seconds)
    span = span_of(request)
    if span is not None:
        model = context.model_name
        span.describe(model, span_attributes.embedded(tokens, model, seconds))
    logger.info(
        "%s request_id=%s inputs=%d input_tokens=%d ms=%.1f",
        *(request_id, request.state.request_id, len(prompts), tokens, 1000 * seconds),
    )
    return content


async def _encoded(body: EmbeddingBody, context: Context) -> list[Prompt]:
    """Token ids of each input; raises InvalidRequest or ContextLengthExceeded."""
    tokenizer, info = context.loaded_tokenizer(), context.driver.info
    if isinstance(body.input[0], list):
        prompts = [tuple(ids) for ids in body.input]
    else:
        if "" in body.input:
            param = _param(body, body.input.index(""))
            raise InvalidRequest("An input must not be empty.", param=param)
        try:
            prompts = await asyncio.to_thread(
                tokenizer.encode, body.input, info.max_model_len, special=body.add_special_tokens
            )
        except ContextLengthExceeded as error:
            # The tokenizer's, which speaks of a prompt.
            raise ContextLengthExceeded(error.message, param="input") from error
    for index, prompt in enumerate(prompts):
        param = _param(body, index)
        if not prompt:
            raise InvalidRequest("The input has no tokens.", param=param)
        if len(prompt) > info.max_model_len:
            raise ContextLengthExceeded(
                f"This model's context is {info.max_model_len} tokens; the input has "
                f"{len(prompt)}.",
                param=param,
            )
        if max(prompt) >= info.vocab_size:
            raise InvalidRequest(f"The vocabulary has {info.vocab_size} tokens.", param=param)
    return prompts


def _param(body: EmbeddingBody, index: int) -> str:
    return f"input[{index}]" if len(body.input) > 1 else "input"


def _written(body: EmbeddingBody, model: str, event: TokenEvent, tokens: int) -> bytes:
    """The answer as JSON, vector by vector, so that other threads get their turns in between."""
    parts = (
        json.dumps({"object": "embedding", "index": index, "embedding": each}, allow_nan=False)
        for index, each in enumerate(_vectors(body, event))
    )
    data = ",".join(parts)
    rest = json.dumps({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return f'{{"object": "list", "data": [{data}], {rest[1:]}'.encode()


def _vectors(body: EmbeddingBody, event: TokenEvent) -> Iterator[list[float] | str]:
    for answer in event.answers:
        vector = shortened(answer.logits, body.dimensions, normalize=body.normalize)
        yield vector.tolist() if body.encoding_format == "float" else as_base64(vector)


def shortened(
    values: Sequence[float], dimensions: int | None, *, normalize: bool
) -> "array[float]":
    """The first ``dimensions`` of a vector (None: all), of length one if ``normalize``; fp32."""
    kept = values[:dimensions]
    length = math.hypot(*kept) if normalize else 1.0
    # What is zero everywhere has no direction.
    return array("f", [value / (length or 1.0) for value in kept])


def as_base64(vector: "array[float]") -> str:
    """Little-endian fp32 in base64."""
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode("ascii")
