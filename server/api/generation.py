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

from offramp.models.sampling_params import TokenSource
from offramp.server.api import span_attributes, usage
from offramp.server.api.logprobs import ScoredToken
from offramp.server.engine.request import (
    FinishReason,
    GenerationRequest,
    RequestStats,
    TokenEvent,
)
from offramp.server.errors import DeadlineExceeded, ServerError, ShuttingDown
from offramp.server.metrics import RequestObserver
from offramp.server.text.answer_parts import AnswerParser, Part, TextPart
from offramp.server.text.detokenizer import Detokenizer
from offramp.server.text.stop import StopFilter

if TYPE_CHECKING:
    from offramp.models.step import TokenLogprobs
    from offramp.server.api.context import Context
    from offramp.server.api.prepared import Prepared
    from offramp.server.api.schemas import GenerationBody
    from offramp.server.engine.driver import EventSink, TokenStream
    from offramp.server.tracing import RequestSpan


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained: parts of its text, and the tokens behind it.

    Tokens come with the layer each left at, where each came from and, where asked for,
    log-probabilities. Those whose text is held back come with the next delta that has text.
    ``finish_reason`` is set on a choice's last delta only.
    """

    index: int
    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    exit_layers: tuple[int, ...]
    sources: tuple[TokenSource, ...] = ()
    scored: tuple[ScoredToken, ...] = ()
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The text for the user."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How a choice's text is made of its tokens.

    ``echo`` is the prompt's text where the answer repeats it. An answer that is ``empty`` has no
    token of its own: the one that the engine makes is left out.
    """

    stop: StopFilter
    parser: AnswerParser | None = None
    echo: str | None = None
    empty: bool = False


class Choice:
    """Follows the events of one sequence."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        settings: TextSettings,
        observer: RequestObserver,
        submitted_at: float,
    ) -> None:
        self.index = index
        self.request = request
        self.finish_reason: str | None = None
        self.failed = False
        self.stats = RequestStats(submitted_at)
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.exit_counts: Counter[int] = Counter()
        self.submitted_at = self.last_token_at = submitted_at
        self.first_token_at: float | None = None
        self._detokenizer = detokenizer
        self._settings = settings
        self._observer = observer
        self._unsent: list[tuple[int, int, TokenSource]] = []
        self._scored: list[ScoredToken] = []
        self._made = self._released = 0
        """Characters that the tokens so far stand for, and those of them that were let through."""

    @property
    def parser(self) -> AnswerParser | None:
        """What finds thoughts and calls in the answer; None where there can be none."""
        return self._settings.parser

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._settings.stop.matched

    def feed(self, event: TokenEvent) -> Delta | None:
        """Take an event; None when there is nothing to show yet.

        Raises ServerError or ShuttingDown when the engine gave the sequence up.
        """
        self._refuse_failure(event)
        self._observer.event(event)
        self.stats = event.stats
        text = ""
        if event.token_ids:
            self.last_token_at = time.monotonic()
            if self.first_token_at is None:
                self.first_token_at = self.last_token_at
                text = self._begin(event)
        text += self._text(event)
        if self.finish_reason is None and event.finish_reason is not None:
            self.finish_reason = event.finish_reason.value
        parts = self._parts(text)
        if self.finish_reason is not None:
            self._observer.finish(self.finish_reason)
        elif not parts:
            return None
        unsent, self._unsent = self._unsent, []
        scored, self._scored = self._scored, []
        return Delta(
            self.index,
            parts,
            tuple(token for token, _, _ in unsent),
            tuple(layer for _, layer, _ in unsent),
            tuple(source for _, _, source in unsent),
            tuple(scored),
            self.finish_reason,
        )

    def close(self, reason: FinishReason) -> None:
        """Count the sequence as ended for ``reason`` unless it ended before."""
        if self.finish_reason is None:
            self._observer.finish(reason)

    def prompt_scored(self, detokenizer: Detokenizer) -> list[ScoredToken]:
        """The prompt's tokens with their places in its text."""
        scored: list[ScoredToken] = []
        offset = 0
        for token, own in zip(self.request.prompt, (None, *self.prompt_logprobs), strict=True):
            scored.append(ScoredToken(token, offset, own))
            offset += len(detokenizer.push(token))
        return scored

    def _begin(self, event: TokenEvent) -> str:
        """What comes before the answer's first token."""
        self.prompt_logprobs = event.prompt_logprobs
        echo = self._settings.echo or ""
        self._made = self._released = len(echo)
        if self._settings.echo is not None and self.request.sampling.logprobs is not None:
            self._scored += self.prompt_scored(self._detokenizer.fresh())
        return echo

    def _text(self, event: TokenEvent) -> str:
        """Text the event's tokens release; sets ``finish_reason`` at a stop string."""
        if self._settings.empty:
            return ""
        pieces = []
        for position, token in enumerate(event.token_ids):
            is_last = position == len(event.token_ids) - 1
            # The stop id itself is no part of the text.
            ends = is_last and event.finish_reason is FinishReason.STOP and self._stops(token)
            source = event.sources[position] if event.sources else TokenSource.MODEL
            self._take(token, event.exit_layers[position], source)
            if ends:
                break
            if event.logprobs:
                self._scored.append(ScoredToken(token, self._made, event.logprobs[position]))
            piece = self._detokenizer.push(token)
            self._made += len(piece)
            pieces.append(self._filtered(piece))
            if self.finish_reason is not None:
                # What the stop string cut away has no place in the text.
                kept = self._released
                self._scored = [each for each in self._scored if each.offset < kept]
                return "".join(pieces)
        if event.finish_reason is not None:
            pieces.append(self._filtered(self._detokenizer.flush()))
            pieces.append(self._settings.stop.flush())
        return "".join(pieces)

    def _parts(self, text: str) -> tuple[Part, ...]:
        """The parts of the answer that ``text`` makes certain; an end that called is told so."""
        parser = self._settings.parser
        if parser is None:
            return (TextPart(text),) if text else ()
        parts = parser.push(text) if text else []
        if self.finish_reason is not None:
            parts += parser.flush()
            if parser.num_calls and self.finish_reason == FinishReason.STOP.value:
                self.finish_reason = FinishReason.TOOL_CALLS.value
        return tuple(parts)

    def _stops(self, token: int) -> bool:
        return token in self.request.sampling.stop_token_ids

    def _filtered(self, piece: str) -> str:
        if self.completion_tokens < self.request.sampling.min_tokens:
            self._released += len(piece)
            return piece
        released = self._settings.stop.push(piece)
        self._released += len(released.text)
        if released.stopped:
            self.finish_reason = FinishReason.STOP.value
        return released.text

    def _take(self, token: int, layer: int, source: TokenSource) -> None:
        self.completion_tokens += 1
        self.exit_counts[layer] += 1
        self._unsent.append((token, layer, source))
        parser = self._settings.parser
        self.reasoning_tokens += parser is not None and parser.in_thoughts

    def _refuse_failure(self, event: TokenEvent) -> None:
        # The stats of such an event may be empty, so nothing is learned from them.
        if event.finish_reason is FinishReason.ERROR:
            self.failed = True
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
        prepared: Prepared,
        requests: Sequence[GenerationRequest],
        request_id: str,
        span: RequestSpan | None = None,
    ) -> None:
        self.request_id = request_id
        self._context = context
        self._n = body.n
        self._span = span
        self._closed = False
        self._events: asyncio.Queue[TokenEvent | Exception | None] = asyncio.Queue()
        self._streams = _admit(context, requests, self._events)
        self._silence: asyncio.TimerHandle | None = None
        self._last_at = time.monotonic()
        timeout = context.timeout(body.timeout)
        self._timer = None
        if timeout is not None:
            late = DeadlineExceeded(timeout)
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(timeout, self._events.put_nowait, late)
        self.choices = [
            _choice(context, body, prepared, index, request, stream.submitted_at)
            for index, (request, stream) in enumerate(zip(requests, self._streams, strict=True))
        ]

    async def deltas(self, silence_s: float | None = None) -> AsyncIterator[Delta | None]:
        """Deltas of all choices as they come; None after each ``silence_s`` seconds without one.

        Raises the error that ended the request.
        """
        pairs = zip(self.choices, self._streams, strict=True)
        running = {stream.request_id: (choice, stream) for choice, stream in pairs}
        self._last_at = time.monotonic()
        if silence_s is not None:
            self._await_silence(silence_s)
        while running:
            event = await self._events.get()
            if event is None:
                yield None
                continue
            try:
                if isinstance(event, Exception):
                    raise event
                if event.request_id not in running:
                    continue
                choice, stream = running[event.request_id]
                delta = choice.feed(event)
            except Exception as error:
                if self._span is not None:
                    self._span.failed(type(error).__name__)
                raise
            if choice.finish_reason is not None:
                # A stop string ends the text while the engine would go on.
                del running[event.request_id]
                stream.abort()
            if delta is not None:
                self._last_at = time.monotonic()
                yield delta

    def close(self) -> None:
        """Take what still runs out of the engine, and log how the request ended."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._silence is not None:
            self._silence.cancel()
        for stream in self._streams:
            stream.abort()
        for choice in self.choices:
            choice.close(FinishReason.ABORT)
        if self._span is not None:
            self._describe(self._span)
        logger.info("%s", usage.summary(self.request_id, self.choices))

    def _describe(self, span: RequestSpan) -> None:
        model, layers = self._context.model_name, self._context.driver.info.num_layers
        span.describe(model, span_attributes.generation(self.choices, self._n, model, layers))

    def _await_silence(self, seconds: float) -> None:
        """Put None among the events after so long without a delta, again and again.

        One clock for all deltas: one for each would cost as much as what it waits for.
        """
        if time.monotonic() - self._last_at >= seconds:
            self._events.put_nowait(None)
            self._last_at = time.monotonic()
        left = self._last_at + seconds - time.monotonic()
        loop = asyncio.get_running_loop()
        self._silence = loop.call_later(left, self._await_silence, seconds)


def _admit(
    context: Context,
    requests: Sequence[GenerationRequest],
    sink: EventSink,
) -> list[TokenStream]:
    streams: list[TokenStream] = []
    try:
        for request in requests:
            streams.append(context.submit(request, sink))  # noqa: PERF401 (partial list on error)
    except Exception:
        for stream in streams:
            stream.abort()
        raise
    return streams


def _choice(
    context: Context,
    body: GenerationBody,
    prepared: Prepared,
    index: int,
    request: GenerationRequest,
    submitted_at: float,
) -> Choice:
    tokenizer = context.loaded_tokenizer()
    is_chat = prepared.param == "messages"
    settings = TextSettings(
        StopFilter(body.stop, include=body.include_stop_str_in_output),
        prepared.parser(),
        prepared.texts[index // body.n] if prepared.texts else None,
        empty=body.max_tokens == 0,
    )
    return Choice(
        index,
        request,
        tokenizer.detokenizer(
            skip_special_tokens=body.skip_special_tokens and not prepared.shows_special_tokens,
            # A completion's text goes on from the prompt's, an answer in a chat begins anew.
            behind=() if is_chat else request.prompt,
        ),
        settings,
        context.metrics.request(request, body.n, submitted_at),
        submitted_at,
    )
