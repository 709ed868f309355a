"""POST /v1/responses: the routes, the response object, and its stream of events."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from offramp.server.api import usage, wire
from offramp.server.api.adapted import count_tokens, speaking_of
from offramp.server.api.context import Context, Shared
from offramp.server.api.generation import Generation
from offramp.server.api.logprobs import TokenNames
from offramp.server.api.openapi import STREAMED
from offramp.server.api.prepared import prepare_chat
from offramp.server.api.reply import EventStream, start
from offramp.server.api.response_bodies import NAMES, FunctionTool, ResponseBody
from offramp.server.api.response_items import Output
from offramp.server.errors import MethodNotAllowed, NotFound, OfframpError

router = APIRouter(tags=["Responses"])

# The only code of OpenAI's for faults of the server.
_FAILED: Final = "server_error"
_COUNTING: Final = "input_tokens"


@router.post("/v1/responses", response_model=None, responses=STREAMED)
async def create_response(body: ResponseBody, request: Request, context: Shared) -> Response:
    """Answer a conversation that is sent whole."""
    reply_id = f"resp_{uuid.uuid4().hex}"
    with speaking_of(NAMES):
        chat = body.as_chat()
        prepared = await prepare_chat(context, chat)
        generation = start(request, context, chat, prepared, reply_id)
    parsed = prepared.parser() is not None
    reply = ResponseReply(context, body, reply_id, parsed=parsed)
    if body.stream:
        return EventStream(generation, reply.frames(generation))
    with closing(generation):
        payload = await wire.unless_disconnected(request, reply.collect(generation))
    return JSONResponse(payload)


@router.post(f"/v1/responses/{_COUNTING}")
async def count_input_tokens(body: ResponseBody, context: Shared) -> dict[str, Any]:
    """Tokens of the prompt that a request would have."""
    count = await count_tokens(context, body.as_chat(), NAMES)
    return {"object": "response.input_tokens", "input_tokens": count}


@router.api_route(
    "/v1/responses/{path:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False
)
async def stored_response(path: str) -> None:
    """Nothing is stored: responses are neither found again nor cancelled, compacted or deleted."""
    if path == _COUNTING:
        message = "This route does not allow that method."
        raise MethodNotAllowed(message, headers={"Allow": "POST"})
    raise NotFound(
        "Responses are not stored by this server: none can be found again, cancelled, compacted "
        "or deleted."
    )


class ResponseReply:
    """Builds the bodies of one response; ``parsed`` if it may hold more than text."""

    def __init__(
        self, context: Context, body: ResponseBody, reply_id: str, *, parsed: bool
    ) -> None:
        self._context = context
        names = TokenNames(context)
        self._output = Output(names, logprobs=body.wants_logprobs, parsed=parsed)
        self._fixed = {
            "id": reply_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": context.model_name,
            **_echo(body),
            **_sampling(context, body),
        }

    async def collect(self, generation: Generation) -> dict[str, Any]:
        """The whole response."""
        async for delta in generation.deltas():
            if delta is not None:
                for _ in self._output.feed(delta):
                    pass
        for _ in self._output.close(_finish_reason(generation)):
            pass
        return self._finished(generation)

    async def frames(self, generation: Generation) -> AsyncIterator[bytes]:
        """The response as events, numbered from 0; the last one holds all of it, or the error."""
        numbers = itertools.count()

        def frame(told: dict[str, Any]) -> bytes:
            return wire.event({**told, "sequence_number": next(numbers)})

        try:
            for told in self._opening():
                yield frame(told)
            silence = self._context.config.sse_keep_alive_interval
            async for delta in generation.deltas(silence):
                if delta is None:
                    yield wire.KEEP_ALIVE
                    continue
                for told in self._output.feed(delta):
                    yield frame(told)
            for told in self._output.close(_finish_reason(generation)):
                yield frame(told)
            whole = self._finished(generation)
        except Exception as error:  # noqa: BLE001 (the status is sent: the stream must tell)
            whole = self._failed(wire.as_wire_error(error))
        yield frame({"type": f"response.{whole['status']}", "response": whole})

    def _opening(self) -> Iterator[dict[str, Any]]:
        begun = self._resource("in_progress", [])
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}

    def _finished(self, generation: Generation) -> dict[str, Any]:
        cut = _finish_reason(generation) == "length"
        resource = self._resource("incomplete" if cut else "completed", self._output.items)
        if cut:
            resource["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            resource["completed_at"] = int(time.time())
        choices = generation.choices
        resource["usage"] = _usage(generation)
        resource["metrics"] = usage.metrics(choices, self._context.driver.info.num_layers)
        return resource

    def _failed(self, error: OfframpError) -> dict[str, Any]:
        self._output.give_up()
        resource = self._resource("failed", self._output.items)
        resource["error"] = {"code": _FAILED, "message": error.message}
        return resource

    def _resource(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._fixed,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": output,
            "usage": None,
        }


def _finish_reason(generation: Generation) -> str:
    return generation.choices[0].finish_reason or ""


def _usage(generation: Generation) -> dict[str, Any]:
    found = usage.usage(generation.choices, 1)
    cached = found["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": generation.choices[0].reasoning_tokens},
        "total_tokens": found["total_tokens"],
    }


def _echo(body: ResponseBody) -> dict[str, Any]:
    """What a response repeats of its request, and what is the same in all of them."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "text": body.text.as_sent(),
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice.as_sent(),
        "tools": [_tool(tool) for tool in body.tools],
        "top_logprobs": body.top_logprobs,
        **({} if body.user is None else {"user": body.user}),
        "background": False,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
    }


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": tool.type,
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }


def _sampling(context: Context, body: ResponseBody) -> dict[str, Any]:
    """Sampling parameters in force: the request's own, or the model's."""
    own = context.driver.info.sampling_defaults
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    return {
        name: getattr(body, name)
        if name in body.model_fields_set
        else own.get(name, getattr(body, name))
        for name in names
    }
