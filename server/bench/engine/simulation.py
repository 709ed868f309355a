"""What a trace allows: the loop's own policy on paper, with the measured times of segments.

A ride runs the segments from the ground up. At each the slots that wait there ride, unless they
are held (kernels/riders.py, `board`); those whose draw names this exit land, the rest wait one
segment above, and all that reach the top land. Only two things take time: a segment with riders,
by their number, and the leaving of a token. Launches, boarding and reading results take none, so
what a real loop lacks to the simulated one is overhead, and what the simulated one lacks to the
skipped layers is the batch: a segment reads its weights for one rider as for many.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by rows, linear between what was measured; no rows take no time."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Seconds for ``rows``."""
        if rows == 0:
            return 0.0
        place = bisect_left(self.rows, rows)
        if place == 0:
            return self.seconds[0]
        if place == len(self.rows):
            return self.seconds[-1]
        low, high = self.rows[place - 1 : place + 1]
        below, above = self.seconds[place - 1 : place + 1]
        return below + (above - below) * (rows - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Costs:
    """``segments``: riding each; ``leaving``: what leavers at the end of each but the last add."""

    segments: tuple[Curve, ...]
    leaving: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class Simulated:
    """Tokens and seconds of the rides behind the warm-up."""

    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds


def simulate(
    draws: Sequence[Sequence[int]],
    costs: Costs,
    holds: Sequence[tuple[float, float]],
    warm_up: int,
    rides: int,
) -> Simulated:
    """Ride ``rides`` times behind a warm-up.

    ``draws[token][slot]`` is the segment behind which the token leaves, the last one for those that
    take all layers; after the last row the first follows. ``holds`` as in DecodeLoop.hold.
    """
    train = _Train(draws, costs, holds)
    for _ in range(warm_up):
        train.ride()
    tokens, seconds = train.tokens, train.seconds
    for _ in range(rides):
        train.ride()
    return Simulated(train.tokens - tokens, train.seconds - seconds)


class _Train:
    """Slots, and the time and tokens so far."""

    def __init__(
        self,
        draws: Sequence[Sequence[int]],
        costs: Costs,
        holds: Sequence[tuple[float, float]],
    ) -> None:
        self._draws, self._costs, self._holds = draws, costs, holds
        slots = len(draws[0])
        self._stage, self._waited, self._index = [0] * slots, [0] * slots, [0] * slots
        self.tokens = 0
        self.seconds = 0.0

    def ride(self) -> None:
        """All segments once."""
        for segment in range(len(self._costs.segments)):
            riders = self._board(segment)
            self.seconds += self._costs.segments[segment].at(len(riders))
            leavers = self._leavers(segment, riders)
            if segment < len(self._costs.leaving):
                self.seconds += self._costs.leaving[segment].at(len(leavers))
            self.tokens += len(leavers)

    def _board(self, segment: int) -> list[int]:
        here = [slot for slot, stage in enumerate(self._stage) if stage == segment]
        share, patience = self._holds[segment]
        longest = max((self._waited[slot] for slot in here), default=0)
        if segment and len(here) < share * self._stage.count(0) and longest < patience:
            for slot in here:
                self._waited[slot] += 1
            return []
        return here

    def _leavers(self, segment: int, riders: Sequence[int]) -> list[int]:
        leavers = []
        for slot in riders:
            self._waited[slot] = 0
            if self._draws[self._index[slot] % len(self._draws)][slot] == segment:
                self._stage[slot] = 0
                self._index[slot] += 1
                leavers.append(slot)
            else:
                self._stage[slot] += 1
        return leavers
