"""Dynamic rebatching in rides (DREX, arXiv 2512.15705): when deep tokens wait for company.

Which waiting pays is weighed on paper: the loop's own policy is played with the measured times of
segments. A ride runs them from the ground up. At each the slots that wait there ride, unless they
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
from itertools import accumulate
from random import Random

Holds = Sequence[tuple[float, float]]
"""For each segment the share of ready slots to wait for, and the rides to wait at most."""

# Shares tried, alike at all segments: other combinations gain next to nothing over these.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
# Tokens between two choices. Older ones count half at each, so that holds follow the requests.
_TOKENS = 512
_WARM_UP, _RIDES = 16, 48
# Share of the best throughput that is good enough: draws alone move it by some per cent.
_ENOUGH = 0.97


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
    holds: Holds,
    warm_up: int,
    rides: int,
) -> Simulated:
    """Ride ``rides`` times behind a warm-up.

    ``draws[token][slot]`` is the segment behind which the token leaves, the last one for those that
    take all layers; after the last row the first follows. ``holds`` as in DeviceLoop.hold.
    """
    train = _Train(draws, costs, holds)
    for _ in range(warm_up):
        train.ride()
    tokens, seconds = train.tokens, train.seconds
    for _ in range(rides):
        train.ride()
    return Simulated(train.tokens - tokens, train.seconds - seconds)


class Rebatching:
    """Chooses what riders wait for, from the depths that tokens took so far.

    ``seconds`` are the times of each segment for one rider and for many, the last with the head, as
    many being ``slots``; nobody is to wait for more than ``rides`` rides.
    """

    def __init__(
        self,
        seconds: Sequence[tuple[float, float]],
        slots: int,
        rides: float,
        depths: Sequence[int],
    ) -> None:
        rows = (1, slots) if slots > 1 else (1,)
        curves = tuple(Curve(rows, times[: len(rows)]) for times in seconds)
        free = Curve((1,), (0.0,))
        self._costs = Costs(curves, (free,) * (len(seconds) - 1))
        self._rides = rides
        self._segment_of = {depth: segment for segment, depth in enumerate(depths)}
        self._landed = [0.0] * len(seconds)
        self._fresh = 0

    def observe(self, depth: int) -> None:
        """A token landed after ``depth`` layers."""
        self._landed[self._segment_of[depth]] += 1
        self._fresh += 1

    def due(self) -> bool:
        """Whether enough has landed to choose again."""
        return self._fresh >= _TOKENS

    def choose(self, live: int) -> Holds:
        """The least waiting that makes nearly the most tokens a second of ``live`` slots."""
        self._fresh = 0
        random = Random(0)  # noqa: S311 (a simulation, alike every time)
        bounds = list(accumulate(self._landed))
        draws = [
            [bisect_left(bounds, random.random() * bounds[-1]) for _ in range(live)]
            for _ in range(_RIDES)
        ]
        self._landed = [count / 2 for count in self._landed]
        above = len(self._landed) - 1
        ways = [[(0.0, 0.0), *[(share, self._rides)] * above] for share in _SHARES]
        speeds = [simulate(draws, self._costs, way, _WARM_UP, _RIDES).tokens_per_s for way in ways]
        enough = _ENOUGH * max(speeds)
        return next(way for way, speed in zip(ways, speeds, strict=True) if speed >= enough)


class _Train:
    """Slots, and the time and tokens so far."""

    def __init__(
        self,
        draws: Sequence[Sequence[int]],
        costs: Costs,
        holds: Holds,
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
