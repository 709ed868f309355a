"""POST /v1/chat/completions: the route, and the form of its answers."""

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from offramp.server.api.context import Shared
from offramp.server.api.generation import Delta
from offramp.server.api.reply import respond
from offramp.server.api.schemas import ChatBody

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


class ChatShape:
    """Objects of a conversation's answer."""

    id_prefix: ClassVar[str] = "chatcmpl-"
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def choice(self, text: str) -> Mapping[str, Any]:
        """The assistant's message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, delta: Delta, *, first: bool) -> Mapping[str, Any]:
        """The role comes once, in the first chunk."""
        gained: dict[str, str] = {"role": "assistant"} if first else {}
        if delta.text or first:
            gained["content"] = delta.text
        return {"delta": gained}
