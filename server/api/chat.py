"""POST /v1/chat/completions."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response

from offramp.server.api.context import Shared
from offramp.server.api.reply import respond
from offramp.server.api.schemas import ChatBody
from offramp.server.api.shapes import ChatShape

router = APIRouter(tags=["Chat"])


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatBody, request: Request, context: Shared) -> Response:
    """Answer a conversation."""
    context.check_model(body.model)
    tokenizer = context.loaded_tokenizer()
    messages = [message.for_template() for message in body.messages]
    prompt = await asyncio.to_thread(
        tokenizer.encode_chat, messages, context.driver.info.max_model_len
    )
    return await respond(request, context, body, [prompt], ChatShape())
