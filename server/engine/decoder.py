"""The seam between the engine and what makes tokens: one protocol for all devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from offramp.models.sampling_params import TokenSource
from offramp.models.step import TokenLogprobs
from offramp.server.engine.request import StepStats
from offramp.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class TokenResult:
    """What one step made for one sequence.

    ``tokens`` are the new verified tokens, already at the end of the sequence's own (drafts
    behind them left out), each after ``layer`` layers. An audit that ended has none. ``logprobs``
    are the tokens', where the request asks for them; ``sources`` see TokenEvent.
    """

    sequence: Sequence
    tokens: list[int]
    layer: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    sources: tuple[TokenSource, ...] = ()


class Decoder(Protocol):
    """Makes the tokens of admitted sequences.

    A sequence is added when it is admitted or got a token, and is removed when it ends or gives
    its blocks to another. A step that is under way may still make a token for a sequence that was
    removed; it is dropped.
    """

    def accepts(self, sequence: Sequence) -> bool:
        """Whether the sequence's next tokens can be made here."""
        ...

    def add(self, sequence: Sequence, now: float) -> None:
        """Make the sequence's next token; no change if it is being decoded here already."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """Forget the sequence; what it holds in memory is the caller's to release."""
        ...

    def advance(self, now: float) -> tuple[list[TokenResult], StepStats | None]:
        """Run one step; without anything to run, no statistics.

        The caller adds each sequence of the results again or releases it.
        """
        ...

    @property
    def queue_lengths(self) -> tuple[int, ...]:
        """Sequences that wait at each segment."""
        ...

    def sequence_ids(self) -> list[int]:
        """Ids of all sequences here, one for each place a sequence is in; for audits."""
        ...
