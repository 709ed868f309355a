"""All sequences of one HTTP request: admitted together, read as one stream, given up together.

A `Choice` is one sequence as its client sees it: tokens to text, stop strings, counts for usage.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp.server.api import usage
from offramp.server.engine.request import (
    FinishReason,
    GenerationRequest,
    RequestStats,
    TokenEvent,
)
from offramp.server.errors import ServerError, ShuttingDown
from offramp.server.metrics import RequestObserver
from offramp.server.text.detokenizer import Detokenizer
from offramp.server.text.stop import StopFilter

if TYPE_CHECKING:
    from offramp.server.api.context import Context
    from offramp.server.api.schemas import GenerationBody
    from offramp.server.engine.driver import TokenStream


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained: text, and the tokens behind it with the layer each left at.

    Tokens whose text is held back come with the next delta that has text. ``finish_reason`` is set
    on a choice's last delta only.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    exit_layers: tuple[int, ...]
    finish_reason: str | None = None


class Choice:
    """Follows the events of one sequence."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        stop: StopFilter,
        observer: RequestObserver,
    ) -> None:
        self.index = index
        self.request = request
        self.finish_reason: str | None = None
        self.stats = RequestStats(submitted_at=time.monotonic())
        self.completion_tokens = 0
        self.exit_counts: Counter[int] = Counter()
        self.started_at = self.last_token_at = time.monotonic()
        self.first_token_at: float | None = None
        self._detokenizer = detokenizer
        self._stop = stop
        self._observer = observer
        self._unsent: list[tuple[int, int]] = []

    def feed(self, event: TokenEvent) -> Delta | None:
        """Take an event; None when there is nothing to show yet.

        Raises ServerError or ShuttingDown when the engine gave the sequence up.
        """
        self._refuse_failure(event)
        self._observer.event(event)
        self.stats = event.stats
        if event.token_ids:
            self.last_token_at = time.monotonic()
            self.first_token_at = self.first_token_at or self.last_token_at
        text = self._text(event)
        if self.finish_reason is None and event.finish_reason is not None:
            self.finish_reason = event.finish_reason.value
        if self.finish_reason is not None:
            self._observer.finish(self.finish_reason)
        elif not text:
            return None
        unsent, self._unsent = self._unsent, []
        return Delta(
            self.index,
            text,
            tuple(token for token, _ in unsent),
            tuple(layer for _, layer in unsent),
            self.finish_reason,
        )

    def close(self, reason: FinishReason) -> None:
        """Count the sequence as ended for ``reason`` unless it ended before."""
        if self.finish_reason is None:
            self._observer.finish(reason)

    def _text(self, event: TokenEvent) -> str:
        """Text the event's tokens release; sets ``finish_reason`` at a stop string."""
        pieces = []
        for position, token in enumerate(event.token_ids):
            self._take(token, event.exit_layers[position])
            is_last = position == len(event.token_ids) - 1
            if is_last and event.finish_reason is FinishReason.STOP:
                # The stop id itself is no part of the text.
                break
            pieces.append(self._filtered(self._detokenizer.push(token)))
            if self.finish_reason is not None:
                return "".join(pieces)
        if event.finish_reason is not None:
            pieces.append(self._filtered(self._detokenizer.flush()))
            pieces.append(self._stop.flush())
        return "".join(pieces)

    def _filtered(self, piece: str) -> str:
        if self.completion_tokens < self.request.sampling.min_tokens:
            return piece
        released = self._stop.push(piece)
        if released.stopped:
            self.finish_reason = FinishReason.STOP.value
        return released.text

    def _take(self, token: int, layer: int) -> None:
        self.completion_tokens += 1
        self.exit_counts[layer] += 1
        self._unsent.append((token, layer))

    def _refuse_failure(self, event: TokenEvent) -> None:
        # The stats of such an event may be empty, so nothing is learned from them.
        if event.finish_reason is FinishReason.ERROR:
            self._observer.finish(FinishReason.ERROR)
            raise ServerError(event.error or "The engine could not finish this request.")
        if event.finish_reason is FinishReason.ABORT:
            raise ShuttingDown(event.error or "The request was aborted.")


logger = logging.getLogger("offramp.requests")


class Generation:
    """The running sequences of one HTTP request.

    Building it admits every sequence or, with the error raised, none. Its builder must call
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
        logger.info("%s", usage.summary(self.request_id, self.choices))

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
        tokenizer.detokenizer(
            skip_special_tokens=body.skip_special_tokens,
            # A completion's text goes on from the prompt's, an answer in a chat begins anew.
            behind=() if hasattr(body, "messages") else request.prompt,
        ),
        StopFilter(body.stop, include=body.include_stop_str_in_output),
        context.metrics.request(request, body.n),
    )
