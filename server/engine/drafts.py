"""Drafts of the next tokens from the text so far: the n-gram proposer, and how drafts fare.

(Prompt lookup decoding; the same idea as LLMA, arXiv 2304.04487.) Answers that quote their prompt
or repeat themselves are drafted without running a model; verification keeps the output exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SHORTEST, LONGEST = 2, 7
"""Tokens that have to match, and up to which a longer match is distinguished from a shorter one."""
_CANDIDATES = 16


class Match(NamedTuple):
    """The text's last ``size`` tokens also ended at ``end``, where their continuation begins."""

    size: int
    end: int


class NgramProposer:
    """An index of where each pair of tokens ended in a growing text, so that a search costs little.

    It must be shown verified tokens only: what it has indexed is never taken back.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, int], list[int]] = {}
        self._length = SHORTEST

    def find(self, tokens: Sequence[int]) -> Match | None:
        """The longest match among recent places of the text's last pair, the latest of equals."""
        self._index(tokens)
        if len(tokens) < SHORTEST:
            return None
        best: Match | None = None
        for end in reversed(self._ends.get((tokens[-2], tokens[-1]), ())):
            size = _common(tokens, end)
            if best is None or size > best.size:
                best = Match(size, end)
            if size == LONGEST:
                break
        return best

    def _index(self, tokens: Sequence[int]) -> None:
        """Index all pairs but the text's last one, which would only find itself."""
        for end in range(self._length, len(tokens)):
            ends = self._ends.setdefault((tokens[end - 2], tokens[end - 1]), [])
            ends.append(end)
            del ends[:-_CANDIDATES]
        self._length = max(self._length, len(tokens))


def _common(tokens: Sequence[int], end: int) -> int:
    """How many tokens before ``end`` are those at the end of the text, counted up to LONGEST."""
    size = SHORTEST
    while size < min(LONGEST, end) and tokens[end - size - 1] == tokens[-size - 1]:
        size += 1
    return size


def _typical() -> list[float]:
    # Measured on greedy answers of SmolLM2-135M-Instruct to 80 prompts.
    return [0.0, 0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85]


@dataclass(slots=True)
class AcceptanceRates:
    """The share of drafts that full depth accepted, by the length of their match."""

    rates: list[float] = field(default_factory=_typical)

    def of(self, size: int) -> float:
        """P(accepted) of a token that follows a match of ``size``."""
        return self.rates[min(size, LONGEST)]

    def add(self, size: int, renewal: float, *, accepted: bool) -> None:
        """A draft behind a match of ``size`` was verified; it counts ``renewal`` (0 to 1)."""
        size = min(size, LONGEST)
        self.rates[size] += renewal * (accepted - self.rates[size])

    def copy(self) -> AcceptanceRates:
        """Rates that change independently of these."""
        return AcceptanceRates(list(self.rates))
