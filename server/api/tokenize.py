"""POST /tokenize and /detokenize, in vLLM's form: what a prompt is to the model."""

import asyncio
from typing import Any, Final

from fastapi import APIRouter
from pydantic import Field, model_validator

from offramp.server.api.context import Shared
from offramp.server.api.fields import UNSUPPORTED, RequestModel, Text, TokenId
from offramp.server.api.schemas import Messages
from offramp.server.errors import InvalidRequest
from offramp.server.text.rendering import on_chat_worker

router = APIRouter(tags=["Tokenizer"])

# Texts are counted whatever the context; the size of the body bounds them.
_ANY_LENGTH: Final = 10**9


class TokenizeBody(RequestModel):
    """A text or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Send either 'prompt' or 'messages'.", param="prompt")
        if self.messages is None:
            return self
        # The template writes its own, and always up to where the assistant begins.
        for name, wish in (
            ("add_special_tokens", bool(self.add_special_tokens)),
            ("add_generation_prompt", not self.add_generation_prompt),
        ):
            if wish:
                raise InvalidRequest(
                    f"'{name}' cannot be changed for messages.", param=name, code=UNSUPPORTED
                )
        return self


class DetokenizeBody(RequestModel):
    """Token ids."""

    model: Text | None = None
    tokens: list[TokenId] = Field(fail_fast=True)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, context: Shared) -> dict[str, Any]:
    """Token ids of a prompt, and how many they are."""
    # lm_eval's remote tokenizer names none.
    context.check_model(body.model, optional=True)
    tokenizer = context.loaded_tokenizer()
    if body.messages is not None:
        messages = [message.for_template() for message in body.messages]
        ids = await on_chat_worker(tokenizer.encode_chat, messages, _ANY_LENGTH)
    else:
        special = body.add_special_tokens is not False
        texts = [body.prompt or ""]
        (ids,) = await asyncio.to_thread(tokenizer.encode, texts, _ANY_LENGTH, special=special)
    return {
        "count": len(ids),
        "max_model_len": context.driver.info.max_model_len,
        "tokens": list(ids),
        "token_strs": tokenizer.names(ids) if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, context: Shared) -> dict[str, str]:
    """The text of token ids."""
    context.check_model(body.model, optional=True)
    tokenizer, vocab = context.loaded_tokenizer(), context.driver.info.vocab_size
    for index, token in enumerate(body.tokens):
        if token >= vocab:
            raise InvalidRequest(f"The vocabulary has {vocab} tokens.", param=f"tokens[{index}]")
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}
