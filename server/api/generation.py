"""All sequences of one HTTP request: admitted together, read as one stream, given up together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from offramp.server.api import accounting
from offramp.server.api.choice import Choice, Delta
from offramp.server.engine.request import FinishReason, GenerationRequest
from offramp.server.text.stop import StopFilter

if TYPE_CHECKING:
    from offramp.server.api.context import Context
    from offramp.server.api.schemas import GenerationBody
    from offramp.server.engine.driver import TokenStream

logger = logging.getLogger("offramp.requests")


class Generation:
    """The running sequences of one HTTP request.

    Building it admits every sequence or, with the error raised, none. Whoever built it must call
    `close`, whatever happens: it takes unfinished sequences out of the engine.
    """

    def __init__(
        self,
        context: Context,
        body: GenerationBody,
        requests: Sequence[GenerationRequest],
        request_id: str,
    ) -> None:
        self.request_id = request_id
        self._closed = False
        self._ready: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._streams = _admit(context, requests)
        self.choices = [
            _choice(context, body, index, request) for index, request in enumerate(requests)
        ]
        self._pumps = [
            asyncio.create_task(self._pump(choice, stream))
            for choice, stream in zip(self.choices, self._streams, strict=True)
        ]

    async def deltas(self, silence_s: float | None = None) -> AsyncIterator[Delta | None]:
        """Deltas of all choices as they come; None after each ``silence_s`` seconds without one.

        Raises the error that ended the request.
        """
        open_choices = len(self.choices)
        while open_choices:
            delta = await self._next(silence_s)
            if delta is not None and delta.finish_reason is not None:
                open_choices -= 1
            yield delta

    def close(self) -> None:
        """Take what still runs out of the engine, and log how the request ended."""
        if self._closed:
            return
        self._closed = True
        for pump in self._pumps:
            pump.cancel()
        for stream in self._streams:
            stream.abort()
        for choice in self.choices:
            choice.close(FinishReason.ABORT)
        logger.info("%s", accounting.summary(self.request_id, self.choices))

    async def _next(self, silence_s: float | None) -> Delta | None:
        try:
            async with asyncio.timeout(silence_s):
                item = await self._ready.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    async def _pump(self, choice: Choice, stream: TokenStream) -> None:
        try:
            async for event in stream:
                delta = choice.feed(event)
                if delta is not None:
                    self._ready.put_nowait(delta)
                if choice.finish_reason is not None:
                    break
        except Exception as error:  # noqa: BLE001 (raised where the stream is read)
            self._ready.put_nowait(error)
        # A stop string ends the text while the engine would go on.
        stream.abort()


def _admit(context: Context, requests: Sequence[GenerationRequest]) -> list[TokenStream]:
    streams: list[TokenStream] = []
    try:
        for request in requests:
            streams.append(context.submit(request))  # noqa: PERF401 (partial list on error)
    except Exception:
        for stream in streams:
            stream.abort()
        raise
    return streams


def _choice(
    context: Context, body: GenerationBody, index: int, request: GenerationRequest
) -> Choice:
    tokenizer = context.loaded_tokenizer()
    return Choice(
        index,
        request,
        tokenizer.detokenizer(skip_special_tokens=body.skip_special_tokens),
        StopFilter(body.stop, include=body.include_stop_str_in_output),
        context.metrics.request(request, body.n),
    )
