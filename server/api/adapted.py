"""What other APIs' conversations share: their bodies become chats, and their errors are theirs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from offramp.server.api.context import Context
from offramp.server.api.fields import UNSUPPORTED, Text
from offramp.server.api.prepared import render
from offramp.server.api.schemas import MAX_TEMPLATE_OPTIONS, ChatBody, SamplingBody, warn_once
from offramp.server.api.tool_bodies import tool_use
from offramp.server.api.wire import invalid_request
from offramp.server.errors import InvalidRequest, RequestError
from offramp.server.text.rendering import on_chat_worker

Message = dict[str, Any]
# A conversation's own fields by the chat's names, as errors speak of them.
Names = Mapping[str, str]

MAX_METADATA: Final = 16


class AdaptedBody(SamplingBody):
    """A conversation in another API's form; what it shares with the chat is as there."""

    chat_template_kwargs: dict[Text, Any] = Field(
        default_factory=dict, max_length=MAX_TEMPLATE_OPTIONS
    )

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
        prompt, _ = await on_chat_worker(render, context, chat, use)
    return len(prompt)


def joined(messages: list[Message]) -> list[Message]:
    """Messages with neighbours of one role made one: many templates know only turns."""
    found: list[Message] = []
    for message in messages:
        last = found[-1] if found else None
        if last is None or last["role"] != message["role"] or message["role"] == "tool":
            found.append(dict(message))
            continue
        for name in ("content", "reasoning_content"):
            texts = [each[name] for each in (last, message) if each.get(name)]
            if texts:
                last[name] = "\n\n".join(texts)
        calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        if calls:
            last["tool_calls"] = calls
    return found


def own_tools(value: Any, kind: str) -> Any:
    """Tools of a ``kind``; others run at their vendor, and the model is not told of them."""
    if not isinstance(value, list):
        return value
    return [
        tool
        for tool in value
        if not isinstance(tool, dict)
        or not isinstance(tool.get("type"), str)
        or tool["type"] == kind
    ]


def of_type(value: Any, known: Collection[str]) -> Any:
    """``value``, an object from a conversation; one whose type is not ``known`` is refused."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in known:
        message = "{kind} is not supported by this server"
        raise PydanticCustomError(UNSUPPORTED, message, {"kind": repr(kind[:64])})
    return value
