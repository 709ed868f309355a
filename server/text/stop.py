"""Stop strings in a stream of text pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Released:
    """Text that may be sent; ``stopped`` when a stop string ended it."""

    text: str
    stopped: bool = False


class StopFilter:
    """Passes text through until the earliest stop string.

    Only a suffix that could still grow into a stop string is held back; what follows a match is
    dropped. The pieces released for any way of cutting a text into pieces add up to the text cut
    at the earliest end of a stop string (the longest one, if several end there). With ``include``
    the stop string itself is released too. ``matched`` is the one that ended the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> Released:
        """Take the next piece; returns what is now certain."""
        if not self._stops:
            return Released(piece)
        text = self._held + piece
        match = self._first_match(text)
        if match is not None:
            start, end = match
            self._held, self.matched = "", text[start:end]
            return Released(text[: end if self._include else start], stopped=True)
        keep = self._possible_start(text)
        self._held = text[keep:]
        return Released(text[:keep])

    def flush(self) -> str:
        """The text ended: what was held back is no stop string."""
        text, self._held = self._held, ""
        return text

    def _first_match(self, text: str) -> tuple[int, int] | None:
        """Start and end of the stop string that ends first."""
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _possible_start(self, text: str) -> int:
        """Where the longest suffix begins that is a proper prefix of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
