"""When deep tokens wait for others, so that a segment reads its weights for more rows at once.

(Dynamic rebatching, DREX, arXiv 2512.15705.) The choice is made by simulation: the device's own
rule is run with the measured times of segments. A pass runs them bottom up. At each, the rows that
wait there run unless they are held (kernels/active_rows.py, `gather_rows`); those whose draw names
this exit leave with a token, the others wait one segment above, and all that reach the top get a
token. Only two things take time: a segment with active rows, by their number, and the exits of
tokens. Launches and reading results take none, so a real device's distance to the simulation is
overhead, and the simulation's distance to the skipped layers is the batch: a segment reads its
weights for one row as for many.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from random import Random

from offramp.models.costs import CostModel

Holds = Sequence[tuple[float, float]]
"""For each segment the share of ready rows to wait for, and the passes to wait at most."""

# Shares tried, alike at all segments: other combinations gain next to nothing over these.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
# Tokens between two choices. Older ones count half at each, so that holds follow the requests.
_TOKENS = 512
_WARM_UP, _PASSES = 16, 48
# Share of the best throughput that is good enough: draws alone move it by some per cent.
_ENOUGH = 0.97


def simulate(
    draws: Sequence[Sequence[int]], costs: CostModel, holds: Holds, warm_up: int, passes: int
) -> tuple[int, float]:
    """Tokens and seconds of ``passes`` passes behind a warm-up.

    ``draws[token][row]`` is the segment after which the token leaves, the last one for those that
    take all layers; after the last token the first follows. ``costs`` are those of segments, the
    last with the LM head, and of ``checks``, here of tokens that leave. ``holds`` as in
    DeviceLoop.hold.
    """
    rows = len(draws[0])
    segment_of, waited, index = [0] * rows, [0] * rows, [0] * rows
    tokens, seconds = 0, 0.0
    for number in range(warm_up + passes):
        if number == warm_up:
            tokens, seconds = 0, 0.0
        for segment, (share, patience) in enumerate(holds):
            here = [row for row in range(rows) if segment_of[row] == segment]
            longest = max((waited[row] for row in here), default=0)
            if segment and len(here) < share * segment_of.count(0) and longest < patience:
                for row in here:
                    waited[row] += 1
                continue
            seconds += costs.segments[segment].at(len(here))
            left = 0
            for row in here:
                waited[row] = 0
                leaves = draws[index[row] % len(draws)][row] == segment
                segment_of[row] = 0 if leaves else segment + 1
                index[row] += leaves
                left += leaves
            tokens += left
            if segment + 1 < len(holds):
                seconds += costs.checks[segment].at(left)
    return tokens, seconds


def _speed(simulated: tuple[int, float]) -> float:
    """Tokens a second."""
    return simulated[0] / simulated[1]


class BatchDelay:
    """Chooses what deep tokens wait for, from the depths that tokens took so far.

    ``costs`` are the device's, as in `simulate`; no row waits longer than ``patience`` passes;
    ``depths`` are the layers after which tokens leave, ascending, the whole stack last.
    """

    def __init__(self, costs: CostModel, patience: float, depths: Sequence[int]) -> None:
        self._costs = costs
        self._patience = patience
        self._segment_of = {depth: segment for segment, depth in enumerate(depths)}
        self._counts = [0.0] * len(depths)
        self._fresh = 0
        self.exits_pay = True
        """Whether the last choice made more tokens a second than full depth for all would."""

    def observe(self, depth: int) -> None:
        """A token took ``depth`` layers."""
        self._counts[self._segment_of[depth]] += 1
        self._fresh += 1

    def due(self) -> bool:
        """Whether enough tokens were seen to choose again."""
        return self._fresh >= _TOKENS

    def choose(self, live: int) -> Holds:
        """The least waiting that makes nearly the most tokens a second of ``live`` rows."""
        self._fresh = 0
        random = Random(0)  # noqa: S311 (a simulation, alike every time)
        bounds = list(accumulate(self._counts))
        draws = [
            [bisect_left(bounds, random.random() * bounds[-1]) for _ in range(live)]
            for _ in range(_PASSES)
        ]
        self._counts = [count / 2 for count in self._counts]
        above = len(self._counts) - 1
        ways = [[(0.0, 0.0), *[(share, self._patience)] * above] for share in _SHARES]
        speeds = [_speed(simulate(draws, self._costs, way, _WARM_UP, _PASSES)) for way in ways]
        if min(map(min, draws)) < above:
            deep = [[above] * live]
            self.exits_pay = max(speeds) > _speed(simulate(deep, self._costs, ways[0], 1, 4))
        enough = _ENOUGH * max(speeds)
        return next(way for way, speed in zip(ways, speeds, strict=True) if speed >= enough)
