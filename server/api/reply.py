"""Answers of the generation routes, whole or as a stream of events."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from offramp import __version__
from offramp.server.api import usage, wire
from offramp.server.api.context import Context
from offramp.server.api.generation import Choice, Delta, Generation
from offramp.server.api.logprobs import ScoredToken, TokenNames, prompt_logprobs
from offramp.server.api.plan import plan
from offramp.server.api.prepared import Prepared
from offramp.server.api.schemas import GenerationBody
from offramp.server.tracing import span_of


class Shape(Protocol):
    """The form of one route's answers."""

    id_prefix: ClassVar[str]
    whole: ClassVar[str]
    chunk: ClassVar[str]

    def choice(self, deltas: Sequence[Delta]) -> Mapping[str, Any]:
        """A finished choice's text, of all that it gained."""
        ...

    def delta(self, delta: Delta, *, first: bool) -> Mapping[str, Any]:
        """What a streamed choice gained; ``first`` marks its first chunk."""
        ...

    def logprobs(
        self, names: TokenNames, scored: Sequence[ScoredToken], top: int
    ) -> Mapping[str, Any]:
        """Log-probabilities of tokens, of which the ``top`` best were asked for."""
        ...


async def respond(
    request: Request,
    context: Context,
    body: GenerationBody,
    prepared: Prepared,
    shape: Shape,
) -> Response:
    """Generate what is prepared; everything that can be refused is refused before the answer."""
    reply_id = f"{shape.id_prefix}{uuid.uuid4().hex}"
    generation = start(request, context, body, prepared, reply_id)
    reply = Reply(context, body, shape, reply_id)
    if body.stream:
        return EventStream(generation, reply.frames(generation))
    with closing(generation):
        payload = await wire.unless_disconnected(request, reply.collect(generation))
    return JSONResponse(payload)


def start(
    request: Request, context: Context, body: GenerationBody, prepared: Prepared, reply_id: str
) -> Generation:
    """Begin to generate; raises what the client is to be told. The caller closes it."""
    requests = plan(context, body, prepared, reply_id)
    label = f"{reply_id} request_id={request.state.request_id}"
    return Generation(context, body, prepared, requests, label, span_of(request))


class EventStream(StreamingResponse):
    """A stream whose end, of whatever kind, takes its sequences out of the engine."""

    def __init__(self, generation: Generation, frames: AsyncIterator[bytes]) -> None:
        super().__init__(frames, media_type=wire.MEDIA_TYPE, headers=wire.HEADERS)
        self._generation = generation
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client that leaves cancels this."""
        # The generator of frames cannot do this: one that never started has no `finally` to run.
        with closing(self._generation):
            if scope["http_version"] == "1.0":
                # Chunks came with 1.1: such a client gets the frames as one body.
                whole = await wire.unless_disconnected(Request(scope, receive), self._joined())
                response = Response(whole, media_type=wire.MEDIA_TYPE, headers=wire.HEADERS)
                await response(scope, receive, send)
                return
            await super().__call__(scope, receive, send)

    async def _joined(self) -> bytes:
        return b"".join([bytes(frame) async for frame in self._frames])


class Reply:
    """Builds the bodies of one answer."""

    def __init__(self, context: Context, body: GenerationBody, shape: Shape, reply_id: str) -> None:
        self._context = context
        self._body = body
        self._shape = shape
        self._num_layers = context.driver.info.num_layers
        self._names = TokenNames(context)
        self._head = {
            "id": reply_id,
            "created": int(time.time()),
            "model": context.model_name,
            "system_fingerprint": f"offramp-{__version__}",
        }

    async def collect(self, generation: Generation) -> dict[str, Any]:
        """The whole answer."""
        deltas: list[list[Delta]] = [[] for _ in generation.choices]
        async for delta in generation.deltas():
            if delta is not None:
                deltas[delta.index].append(delta)
        return {
            **self._head,
            "object": self._shape.whole,
            "choices": [
                self._choice(own, choice)
                for own, choice in zip(deltas, generation.choices, strict=True)
            ],
            "usage": usage.usage(generation.choices, self._body.n),
            "metrics": usage.metrics(generation.choices, self._num_layers),
        }

    async def frames(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as server-sent events, from the first token to ``[DONE]``."""
        try:
            async for chunk in self._chunks(generation):
                yield wire.KEEP_ALIVE if chunk is None else wire.data(chunk)
        except Exception as error:  # noqa: BLE001 (the status is sent: the stream must tell)
            yield wire.failure(wire.as_wire_error(error))
            return
        yield wire.DONE

    async def _chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any] | None]:
        started: set[int] = set()
        unfinished = len(generation.choices)
        async for delta in generation.deltas(self._context.config.sse_keep_alive_interval):
            if delta is None:
                yield None
                continue
            for part in _last_apart(delta):
                choice = self._delta(part, first=delta.index not in started)
                started.add(delta.index)
                unfinished -= part.finish_reason is not None
                is_last = not unfinished and not self._body.include_usage
                yield {**self._chunk([choice]), **self._extras(generation, is_last=is_last)}
        if self._body.include_usage:
            used = usage.usage(generation.choices, self._body.n)
            metrics = usage.metrics(generation.choices, self._num_layers)
            yield {**self._chunk([]), "usage": used, "metrics": metrics}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self._shape.chunk, "choices": choices}

    def _extras(self, generation: Generation, *, is_last: bool) -> dict[str, Any]:
        """Usage and metrics of a chunk with a choice."""
        extras: dict[str, Any] = {}
        if self._body.continuous_usage:
            extras["usage"] = usage.usage(generation.choices, self._body.n)
        elif self._body.include_usage:
            extras["usage"] = None
        if is_last:
            extras["metrics"] = usage.metrics(generation.choices, self._num_layers)
        return extras

    def _choice(self, deltas: Sequence[Delta], choice: Choice) -> dict[str, Any]:
        last = deltas[-1]
        scored = [token for delta in deltas for token in delta.scored]
        extras: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            prompt, found = choice.request.prompt, choice.prompt_logprobs
            extras["prompt_logprobs"] = prompt_logprobs(self._names, prompt, found)
        return {
            "index": last.index,
            **self._shape.choice(deltas),
            "logprobs": self._logprobs(scored),
            "finish_reason": last.finish_reason,
            **self._tokens(deltas),
            **extras,
        }

    def _delta(self, delta: Delta, *, first: bool) -> dict[str, Any]:
        return {
            "index": delta.index,
            **self._shape.delta(delta, first=first),
            "logprobs": self._logprobs(delta.scored) if delta.scored else None,
            "finish_reason": delta.finish_reason,
            **self._tokens([delta]),
        }

    def _logprobs(self, scored: Sequence[ScoredToken]) -> Mapping[str, Any] | None:
        wanted = self._body.wanted_logprobs
        return None if wanted is None else self._shape.logprobs(self._names, scored, wanted)

    def _tokens(self, parts: Sequence[Delta]) -> Mapping[str, Sequence[int | str]]:
        """The lists asked for, one entry per token."""
        lists: dict[str, Sequence[int | str]] = {}
        if self._body.return_token_ids:
            lists["token_ids"] = [token for part in parts for token in part.token_ids]
        if self._body.return_exit_layers:
            lists["exit_layers"] = [layer for part in parts for layer in part.exit_layers]
        if self._body.return_token_sources:
            lists["token_sources"] = [source for part in parts for source in part.sources]
        return lists


def _last_apart(delta: Delta) -> Sequence[Delta]:
    """A delta, with its finish reason in one of its own: clients stop reading at that."""
    if delta.finish_reason is None or not (delta.parts or delta.token_ids):
        return [delta]
    end = Delta(delta.index, (), (), (), finish_reason=delta.finish_reason)
    return [replace(delta, finish_reason=None), end]
