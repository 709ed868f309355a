"""One sequence as its client sees it: tokens to text, stop strings, and the counts for usage."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

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
