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
_HEAD_RENEWAL = 0.005


class Match(NamedTuple):
    """The text's last ``size`` tokens also ended at ``end``, where their continuation begins."""

    size: int
    end: int


@dataclass(slots=True)
class HeadAcceptance:
    """How guesses of the draft head fare, by tenths of the head's own probability of them.

    ``shares`` of first guesses fall into each tenth; full depth accepts ``rates`` of the guesses
    there.
    """

    shares: list[float]
    rates: list[float]

    @classmethod
    def of(cls, chances: Sequence[tuple[float, float]]) -> HeadAcceptance:
        """What an exit file says of held-out guesses; without, half of all guesses are right."""
        chances = chances or [(0.1, 0.05 + tenth / 10) for tenth in range(10)]
        return cls([share for share, _ in chances], [rate for _, rate in chances])

    def rate(self, chance: float) -> float:
        """P(accepted) of a guess of which the head is sure with probability ``chance``."""
        return self.rates[self._tenth(chance)]

    def saw(self, chance: float) -> None:
        """A sequence's first guess has this probability."""
        tenth = self._tenth(chance)
        for index, share in enumerate(self.shares):
            self.shares[index] = share + _HEAD_RENEWAL * ((index == tenth) - share)

    def add(self, chance: float, *, accepted: bool) -> None:
        """A guess of this probability was verified."""
        tenth = self._tenth(chance)
        self.rates[tenth] += _HEAD_RENEWAL * (accepted - self.rates[tenth])

    @property
    def mean(self) -> float:
        """The share of first guesses that are accepted."""
        return sum(share * rate for share, rate in zip(self.shares, self.rates, strict=True))

    def gain(self, token: float, row: float, luck: float = 1.0) -> float:
        """What a first guess is expected to gain where one more ``row`` may spare a ``token``.

        It is accepted ``luck`` times as often as others of its probability.
        """
        pairs = zip(self.shares, self.rates, strict=True)
        return sum(share * max(0.0, luck * rate * token - row) for share, rate in pairs)

    def _tenth(self, chance: float) -> int:
        return min(int(chance * len(self.rates)), len(self.rates) - 1)


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

    def scaled(self, factor: float) -> AcceptanceRates:
        """Rates ``factor`` times as high that change independently of these."""
        return AcceptanceRates([factor * rate for rate in self.rates])
