"""What other APIs' conversations share: their bodies become chats, and their errors are theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Final, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from offramp.server.api.context import Context
from offramp.server.api.fields import (
    INT64_MAX,
    INT64_MIN,
    LogitBias,
    RequestModel,
    Text,
    TokenId,
)
from offramp.server.api.prepared import Prompt, render
from offramp.server.api.schemas import (
    MAX_STOP_TOKENS,
    MAX_TEMPLATE_OPTIONS,
    ChatBody,
    EarlyExit,
    mode_alone,
    warn_once,
)
from offramp.server.api.tool_bodies import tool_use
from offramp.server.api.wire import invalid_request
from offramp.server.errors import InvalidRequest, RequestError

Message = dict[str, Any]
# A conversation's own fields by the chat's names, as errors speak of them.
Names = Mapping[str, str]

MAX_METADATA: Final = 16


class AdaptedBody(RequestModel):
    """Fields of other APIs that the chat has under the same names: ours, and vLLM's."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    stream: bool = False
    seed: int | None = Field(default=None, ge=INT64_MIN, le=INT64_MAX)
    top_k: int = Field(default=0, ge=-1, le=INT64_MAX)
    top_p: float = Field(default=1.0, ge=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    logit_bias: LogitBias = Field(default_factory=dict)
    min_tokens: int = Field(default=0, ge=0, le=INT64_MAX)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    chat_template_kwargs: dict[Text, Any] = Field(
        default_factory=dict, max_length=MAX_TEMPLATE_OPTIONS
    )
    early_exit: Annotated[EarlyExit, BeforeValidator(mode_alone)] = Field(default_factory=EarlyExit)

    @model_validator(mode="after")
    def _tell_unknown(self) -> Self:
        for name in self.model_extra or ():
            warn_once(name)
        return self

    def chat(self, names: Names, own: Mapping[str, Any]) -> ChatBody:
        """The same request as a chat, with the fields of its ``own`` that are not None.

        Raises InvalidRequest for what only a chat checks, in the client's ``names``.
        """
        shared = AdaptedBody.model_fields.keys() & self.model_fields_set
        fields: dict[str, Any] = {name: getattr(self, name) for name in shared}
        # JSON's keys are texts.
        fields["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        fields |= own
        try:
            return ChatBody.model_validate(fields)
        except ValidationError as error:
            found = invalid_request(error.errors())
            first = (found.param or "").split("[", 1)[0].split(".", 1)[0]
            name = names.get(first, first)
            raise InvalidRequest(f"{name}: {error.errors()[0]['msg']}.", param=name) from error


@contextmanager
def speaking_of(names: Names) -> Iterator[None]:
    """Errors of the chat name the client's own fields."""
    try:
        yield
    except RequestError as error:
        if error.param is not None:
            error.param = names.get(error.param, error.param)
        raise


async def count_tokens(context: Context, chat: ChatBody, names: Names) -> int:
    """Tokens of a conversation's prompt; raises what the client is to be told."""
    with speaking_of(names):
        context.check_model(chat.model)
        use = tool_use(chat.tools, chat.tool_choice, parallel=chat.parallel_tool_calls)
        prompt: Prompt
        prompt, _ = await asyncio.to_thread(render, context, chat, use)
    return len(prompt)


def joined(messages: list[Message]) -> list[Message]:
    """Messages with neighbours of one role made one: many templates know only turns."""
    found: list[Message] = []
    for message in messages:
        last = found[-1] if found else None
        if last is None or last["role"] != message["role"] or message["role"] == "tool":
            found.append(dict(message))
            continue
        for name, glue in (("content", "\n\n"), ("reasoning_content", "\n\n")):
            texts = [each[name] for each in (last, message) if each.get(name)]
            if texts:
                last[name] = glue.join(texts)
        calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        if calls:
            last["tool_calls"] = calls
    return found


def unsupported(kind: str) -> PydanticCustomError:
    """The error for a part of a conversation that a text model cannot take."""
    return PydanticCustomError(
        "unsupported_parameter", "{kind} is not supported by this server", {"kind": repr(kind[:64])}
    )
