"""POST /v1/chat/completions: the route, and the form of its answers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from offramp.server.api.context import Shared
from offramp.server.api.generation import Delta
from offramp.server.api.logprobs import ScoredToken, TokenNames, chat_logprobs
from offramp.server.api.prepared import prepare_chat
from offramp.server.api.reply import respond
from offramp.server.api.schemas import ChatBody
from offramp.server.text.answer_parts import CallPart, Part, ReasoningPart, TextPart

router = APIRouter(tags=["Chat"])


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatBody, request: Request, context: Shared) -> Response:
    """Answer a conversation."""
    prepared = await prepare_chat(context, body)
    return await respond(request, context, body, prepared, ChatShape())


class ChatShape:
    """Objects of a conversation's answer."""

    id_prefix: ClassVar[str] = "chatcmpl-"
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def choice(self, deltas: Sequence[Delta]) -> Mapping[str, Any]:
        """The assistant's message."""
        parts = [part for delta in deltas for part in delta.parts]
        calls = called(parts)
        text = "".join(part.text for part in parts if isinstance(part, TextPart))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
            "annotations": [],
            **_thoughts(parts),
        }
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def delta(self, delta: Delta, *, first: bool) -> Mapping[str, Any]:
        """The role comes once, in the first chunk."""
        gained: dict[str, Any] = {"role": "assistant"} if first else {}
        calls = [_call_delta(part) for part in delta.parts if isinstance(part, CallPart)]
        thoughts = _thoughts(delta.parts)
        if delta.text or (first and not calls and not thoughts):
            gained["content"] = delta.text
        elif first:
            gained["content"] = None
        if calls:
            gained["tool_calls"] = calls
        return {"delta": {**gained, **thoughts}}

    def logprobs(
        self, names: TokenNames, scored: Sequence[ScoredToken], top: int
    ) -> Mapping[str, Any]:
        """One entry a token."""
        del top
        return chat_logprobs(names, scored)


def called(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """The calls of an answer, whole."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if not isinstance(part, CallPart):
            continue
        if part.name is not None:
            function = {"name": part.name, "arguments": ""}
            calls.append({"id": part.id, "type": "function", "function": function})
        calls[part.index]["function"]["arguments"] += part.arguments
    return calls


def _call_delta(part: CallPart) -> dict[str, Any]:
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


def _thoughts(parts: Iterable[Part]) -> dict[str, str]:
    """What the model thought, under both names that clients read."""
    text = "".join(part.text for part in parts if isinstance(part, ReasoningPart))
    return {"reasoning": text, "reasoning_content": text} if text else {}
