"""POST /v1/messages (Anthropic): the routes, the message, and its stream of events."""

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import from_json

from offramp.server.api import usage, wire
from offramp.server.api.adapted import count_tokens, speaking_of
from offramp.server.api.anthropic_bodies import NAMES, CountBody, MessagesBody
from offramp.server.api.context import Context, Shared
from offramp.server.api.generation import Delta, Generation
from offramp.server.api.openapi import STREAMED
from offramp.server.api.prepared import prepare_chat
from offramp.server.api.reply import EventStream, start
from offramp.server.text.answer_parts import CallPart, Part, ReasoningPart, TextPart

router = APIRouter(tags=["Messages"])

_PING: Final = {"type": "ping"}
_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

Event = dict[str, Any]


@router.post("/v1/messages", response_model=None, responses=STREAMED)
async def create_message(body: MessagesBody, request: Request, context: Shared) -> Response:
    """Answer a conversation in Anthropic's form."""
    reply_id = f"msg_{uuid.uuid4().hex}"
    with speaking_of(NAMES):
        chat = body.as_chat()
        prepared = await prepare_chat(context, chat)
        room = context.driver.info.max_model_len - len(prepared.prompts[0])
        cramped = body.max_tokens > room > 0
        if cramped:
            # Clients of this API ask for as much as their own models give: the context ends it.
            chat = chat.model_copy(update={"max_completion_tokens": room})
        generation = start(request, context, chat, prepared, reply_id)
    reply = MessageReply(context, generation, reply_id, cramped=cramped)
    if body.stream:
        return EventStream(generation, reply.frames(request.state.request_id))
    with closing(generation):
        payload = await wire.unless_disconnected(request, reply.collect())
    return JSONResponse(payload)


@router.post("/v1/messages/count_tokens")
async def count_message_tokens(body: CountBody, context: Shared) -> dict[str, int]:
    """Tokens of the prompt that a request would have."""
    return {"input_tokens": await count_tokens(context, body.as_chat(), NAMES)}


class Blocks:
    """Content blocks of one answer, in order; each is closed before the next one opens."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._open = False
        self._input = ""

    def feed(self, delta: Delta) -> Iterator[Event]:
        """Take what the answer gained; returns the events of it."""
        for part in delta.parts:
            yield from self._take(part)

    def close(self) -> Iterator[Event]:
        """The answer ended."""
        if not self._open:
            return
        block = self.content[-1]
        if block["type"] == "tool_use":
            block["input"] = _parsed(self._input)
        self._open, self._input = False, ""
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _take(self, part: Part) -> Iterator[Event]:
        match part:
            case TextPart():
                yield from self._begin({"type": "text", "text": "", "citations": None})
                self.content[-1]["text"] += part.text
                yield self._delta({"type": "text_delta", "text": part.text})
            case ReasoningPart():
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                self.content[-1]["thinking"] += part.text
                yield self._delta({"type": "thinking_delta", "thinking": part.text})
            case CallPart():
                if part.name is not None:
                    block: dict[str, Any] = {
                        "type": "tool_use",
                        "id": part.id,
                        "name": part.name,
                        "input": {},
                    }
                    yield from self._begin({**block, "caller": {"type": "direct"}})
                self._input += part.arguments
                if part.arguments:
                    piece = {"type": "input_json_delta", "partial_json": part.arguments}
                    yield self._delta(piece)

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        """Open a block, unless the last one goes on."""
        kind = block["type"]
        if self._open and kind == self.content[-1]["type"] != "tool_use":
            return
        yield from self.close()
        self._open = True
        self.content.append(block)
        index = len(self.content) - 1
        yield {"type": "content_block_start", "index": index, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


class MessageReply:
    """Builds the bodies of one message; ``cramped`` if the context left less than was asked for."""

    def __init__(
        self, context: Context, generation: Generation, reply_id: str, *, cramped: bool
    ) -> None:
        self._context = context
        self._generation = generation
        (self._choice,) = generation.choices
        self._cramped = cramped
        self._blocks = Blocks()
        self._head = {
            "id": reply_id,
            "type": "message",
            "role": "assistant",
            "model": context.model_name,
        }

    async def collect(self) -> dict[str, Any]:
        """The whole message."""
        async for delta in self._generation.deltas():
            if delta is not None:
                for _ in self._blocks.feed(delta):
                    pass
        for _ in self._blocks.close():
            pass
        content = self._blocks.content
        return {**self._head, "content": content, **self._ending(), **self._counts()}

    async def frames(self, request_id: str) -> AsyncIterator[bytes]:
        """The message as events."""
        try:
            async for told in self._events():
                yield wire.KEEP_ALIVE if told is None else wire.event(told)
        except Exception as error:  # noqa: BLE001 (the status is sent: the stream must tell)
            yield wire.event(wire.anthropic_error(wire.as_wire_error(error), request_id))

    async def _events(self) -> AsyncIterator[Event | None]:
        begun = False
        async for delta in self._generation.deltas(self._context.config.sse_keep_alive_interval):
            if delta is None:
                # A message begins with its start, so silence before it is filled with comments.
                yield _PING if begun else None
                continue
            if not begun:
                begun = True
                # How much of the prompt was cached is known once there is a token.
                yield self._start(len(delta.token_ids))
                yield _PING
            for told in self._blocks.feed(delta):
                yield told
        for told in self._blocks.close():
            yield told
        yield {"type": "message_delta", "delta": self._ending(), **self._counts()}
        yield {"type": "message_stop"}

    def _start(self, tokens: int) -> Event:
        nothing = {"stop_reason": None, "stop_sequence": None}
        blank = {"stop_details": None, "container": None}
        used = {**self._usage(), "output_tokens": tokens, "output_tokens_details": None}
        message: dict[str, Any] = {**self._head, "content": [], **nothing, **blank, "usage": used}
        return {"type": "message_start", "message": message}

    def _ending(self) -> dict[str, Any]:
        """Why the answer ended."""
        reason = _REASONS[self._choice.finish_reason or "stop"]
        matched = self._choice.stop_string
        if matched is not None:
            reason = "stop_sequence"
        elif reason == "max_tokens" and self._cramped:
            reason = "model_context_window_exceeded"
        return {
            "stop_reason": reason,
            "stop_sequence": matched,
            "stop_details": None,
            "container": None,
        }

    def _counts(self) -> dict[str, Any]:
        layers = self._context.driver.info.num_layers
        return {"usage": self._usage(), "metrics": usage.metrics([self._choice], layers)}

    def _usage(self) -> dict[str, Any]:
        choice = self._choice
        cached, thoughts = choice.stats.cached_tokens, choice.reasoning_tokens
        return {
            "cache_creation": None,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "inference_geo": None,
            # What was read from the cache is counted apart.
            "input_tokens": len(choice.request.prompt) - cached,
            "output_tokens": choice.completion_tokens,
            "output_tokens_details": {"thinking_tokens": thoughts} if thoughts else None,
            "server_tool_use": None,
            "service_tier": "standard",
        }


def _parsed(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object, as far as they were written."""
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        # A model that no grammar holds may write anything.
        return {}
    return found if isinstance(found, dict) else {}
