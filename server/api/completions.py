"""POST /v1/completions: the route, and the form of its answers."""

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from offramp.server.api.context import Context, Shared
from offramp.server.api.generation import Delta
from offramp.server.api.plan import Prompt
from offramp.server.api.reply import respond
from offramp.server.api.schemas import CompletionBody

router = APIRouter(tags=["Completions"])


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionBody, request: Request, context: Shared) -> Response:
    """Continue one or several prompts."""
    context.check_model(body.model)
    prompts = await _encoded(context, body)
    return await respond(request, context, body, prompts, CompletionShape())


async def _encoded(context: Context, body: CompletionBody) -> list[Prompt]:
    tokenizer = context.loaded_tokenizer()
    if isinstance(body.prompt[0], list):
        return [tuple(ids) for ids in body.prompt]
    max_tokens = context.driver.info.max_model_len
    return await asyncio.to_thread(tokenizer.encode, body.prompt, max_tokens)


class CompletionShape:
    """Objects of a continuation."""

    id_prefix: ClassVar[str] = "cmpl-"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def choice(self, text: str) -> Mapping[str, Any]:
        """Plain text."""
        return {"text": text}

    def delta(self, delta: Delta, *, first: bool) -> Mapping[str, Any]:
        """Plain text."""
        del first
        return {"text": delta.text}
