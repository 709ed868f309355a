"""When leaving, guessing, waiting and paying are worth their time: decided by measured cost."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

from offramp.models.sampling_params import NEVER
from offramp.server.engine.lookup import Shares

# A new sample moves its bucket's mean by at least this share: means follow a machine whose speed
# drifts and forget a burst of noise.
_RENEWAL = 0.05
# The share of tokens that leave is a coin's: renewed faster, chance alone would close exits.
_SHARE_RENEWAL = 0.01
# Checks delay every token that asks, so what they are likely to save has to exceed their price by
# more than the estimates are off: at 1.5 times the price, exits still lost 7 % at one stream.
_MARGIN = 2.0
# A decision against exits is tried out anyway once in so many times: costs are only learnt from
# steps that run, and a rule fed by stale costs could otherwise never exit again (DREX's trap). Each
# try that changes nothing makes the next one rarer, since a try costs a step what exits would.
_PROBE_FIRST, _PROBE_RAREST = 32, 1024
MAX_LOOKUP = 8


@dataclass(slots=True)
class _Bucket:
    rows: int
    seconds: float
    samples: int
    renewed: int


class StepCost:
    """Seconds of one kind of step by its number of rows.

    Samples are averaged per row count (above 8 rows per power of two) and read off between the
    averages. More rows never cost less: where noise says so, neighbours are pooled.
    """

    def __init__(self) -> None:
        self._count = 0
        self._buckets: dict[int, _Bucket] = {}
        self._rows: list[float] = []
        self._seconds: list[float] = []

    def add(self, rows: int, seconds: float) -> None:
        """Learn from one step."""
        if rows <= 0:
            return
        key = rows if rows <= 8 else 1 << (rows - 1).bit_length()
        self._count += 1
        bucket = self._buckets.setdefault(key, _Bucket(rows, seconds, 0, self._count))
        bucket.samples += 1
        bucket.seconds += max(_RENEWAL, 1 / bucket.samples) * (seconds - bucket.seconds)
        bucket.rows, bucket.renewed = rows, self._count
        self._pool()

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._rows)

    def at(self, rows: float) -> float:
        """Predicted seconds for ``rows`` rows; no rows, no step."""
        if rows <= 0 or not self._rows:
            return 0.0
        xs, ys = self._rows, self._seconds
        if len(xs) == 1 or rows <= xs[0]:
            return ys[0]
        high = min(max(1, bisect_left(xs, rows)), len(xs) - 1)
        low = high - 1
        slope = (ys[high] - ys[low]) / (xs[high] - xs[low])
        return ys[low] + slope * (rows - xs[low])

    def more(self, rows: float, extra: float = 1) -> float:
        """Seconds that ``extra`` rows add to a step of ``rows``."""
        return self.at(rows + extra) - self.at(rows)

    def _pool(self) -> None:
        """Pool adjacent violators, so that cost rises with the rows."""
        pools: list[list[float]] = []
        for bucket in sorted(self._buckets.values(), key=lambda item: item.rows):
            # The longer a mean was not renewed, the less it has to say against its neighbours.
            weight = min(bucket.samples, 1 / _RENEWAL) * 0.99 ** (self._count - bucket.renewed)
            weight = max(weight, 1e-6)
            pools.append([weight, bucket.seconds, bucket.rows, bucket.rows])
            while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
                weight, seconds, _, last = pools.pop()
                total = pools[-1][0] + weight
                pools[-1][1] = (pools[-1][1] * pools[-1][0] + seconds * weight) / total
                pools[-1][0], pools[-1][3] = total, last
        self._rows, self._seconds = [], []
        for _, seconds, first, last in pools:
            for rows in dict.fromkeys((first, last)):
                self._rows.append(rows)
                self._seconds.append(seconds)


@dataclass(slots=True)
class CostModel:
    """What each kind of step costs on this machine."""

    segments: list[StepCost]
    checks: list[StepCost]
    head: StepCost = field(default_factory=StepCost)
    fill: StepCost = field(default_factory=StepCost)

    @classmethod
    def of(cls, num_segments: int) -> CostModel:
        """Nothing known yet."""
        return cls(
            [StepCost() for _ in range(num_segments)], [StepCost() for _ in range(num_segments)]
        )

    def above(self, segment: int, rows: float) -> float:
        """Seconds for ``rows`` rows to ride from ``segment`` to the top, without the head."""
        return sum(cost.at(rows) for cost in self.segments[segment:])

    def below(self, segment: int, rows: float) -> float:
        """Seconds for ``rows`` rows to ride from the ground to the end of ``segment``."""
        return sum(cost.at(rows) for cost in self.segments[: segment + 1])

    def step(self, rows: float) -> float:
        """Seconds of a whole pass with its head."""
        return self.above(0, rows) + self.head.at(rows)


@dataclass(slots=True)
class _Tries:
    """When a decision that was refused is tried out anyway."""

    refused: int = 0
    every: int = _PROBE_FIRST

    def allow(self, *, pays: bool) -> bool:
        """Whether it pays, or is due to be tried."""
        if pays:
            self.refused, self.every = 0, _PROBE_FIRST
            return True
        self.refused += 1
        if self.refused < self.every:
            return False
        self.refused, self.every = 0, min(2 * self.every, _PROBE_RAREST)
        return True


class ExitPolicy:
    """The choices that trade time between slots.

    ``max_hold`` (seconds) bounds how long a slot may wait at a segment for company.
    """

    def __init__(self, num_segments: int, max_hold: float) -> None:
        self.costs = CostModel.of(num_segments)
        self._max_hold = max_hold
        # Counted apart: decisions that alternate would take each other's turns.
        self._tries: defaultdict[str, _Tries] = defaultdict(_Tries)
        # Share of checked tokens that may leave, by segment; learnt from every check.
        self._fires = [0.3] * num_segments
        # Share of guesses made there that full depth confirmed (lossless).
        self._confirmed = [0.6] * num_segments
        self.lookups = Shares()
        """What looked-up guesses were worth to all requests so far."""

    def observe(self, segment: int, asked: int, fired: int) -> None:
        """``fired`` of ``asked`` tokens reached their threshold after ``segment``."""
        if asked:
            share = self._fires[segment]
            renewal = 1 - (1 - _SHARE_RENEWAL) ** asked
            self._fires[segment] = share + renewal * (fired / asked - share)

    def observe_guess(self, segment: int, *, right: bool) -> None:
        """Full depth compared a guess made after ``segment``."""
        self._confirmed[segment] += _SHARE_RENEWAL * (right - self._confirmed[segment])

    def asks(self, segment: int, rows: int) -> bool:
        """Whether checking ``rows`` tokens after ``segment`` is likely to save time at all."""
        costs, share = self.costs, self._fires[segment]
        everyone = share**rows
        leavers = share * rows
        saved = everyone * self._saved(segment, rows, 0)
        saved += (1 - everyone) * self._saved(segment, leavers, rows - leavers)
        paid = (1 - (1 - share) ** rows) * self._payment(segment, max(1.0, leavers))
        pays = saved >= _MARGIN * (paid + costs.checks[segment].at(rows))
        return self._tries["ask"].allow(pays=pays)

    def lets_go(self, segment: int, leaving: int, staying: int) -> bool:
        """Whether ``leaving`` slots gain time by leaving after ``segment``.

        They save the layers and the head above at the price of their K,V, made later. Where that
        does not pay, all stay; nobody is ever made to leave.
        """
        saved = self._saved(segment, leaving, staying)
        return self._tries["leave"].allow(pays=saved >= self._payment(segment, leaving))

    def recompute_pays(self, segment: int, riding: int, owed: int) -> bool:
        """Whether ``owed`` rows ride along from ``segment`` for less than their projection."""
        extra = self.costs.above(segment, riding + owed) - self.costs.above(segment, riding)
        return extra <= self.costs.fill.at(owed)

    def draft_bound(self, segment: int, rows: int) -> float:
        """P(right) from which a guess after ``segment`` pays (lossless), with ``rows`` riding.

        NEVER where asking costs more than the guesses it leads to are likely to gain.
        """
        gain, loss = self._guess(segment, rows)
        right = self._confirmed[segment]
        expected = self._fires[segment] * (right * gain - (1 - right) * loss)
        pays = expected > self.costs.checks[segment].at(rows) / rows
        return loss / (gain + loss) if gain > 0 and self._tries["guess"].allow(pays=pays) else NEVER

    def lookup_length(self, shares: Shares, size: int, rows: int) -> int:
        """How many looked-up tokens to verify along with a slot's next one.

        They follow a match of ``size`` tokens, and ``shares`` are the slot's own. One more row pays
        while the chance that all guesses up to it are right, times the time of a token, exceeds
        what the row adds to a pass of ``rows``.
        """
        token = self.costs.step(rows) / rows
        chance, length = 1.0, 0
        while length < MAX_LOOKUP:
            chance *= shares.of(size + length)
            extra = self.costs.step(rows + length + 1) - self.costs.step(rows + length)
            if chance * token <= extra:
                break
            length += 1
        return length

    def holds(self, segment: int, staying: int, ready: int, age: float) -> bool:
        """Whether ``staying`` slots wait at ``segment`` while ``ready`` others go first.

        Compared in slot-seconds of waiting: running deep now delays the ready ones; holding delays
        the stayers by a head and a ground step and splits the batch, which costs both steps' fixed
        part once more (design: rebatching rule; DREX's threshold, arXiv 2512.15705).
        """
        if not ready or age >= self._max_hold:
            return False
        head, ground = self.costs.head, self.costs.segments[0]
        fixed = sum(max(0.0, cost.at(1) - cost.more(1)) for cost in (head, ground))
        delay = staying * (head.at(ready) + ground.at(ready))
        return ready * self.costs.above(segment, staying) > delay + (staying + ready) * fixed

    def _guess(self, segment: int, rows: int) -> tuple[float, float]:
        """Seconds that a right guess after ``segment`` gains and a wrong one loses.

        A right one spares a pass above of its own: its row joins the next one's. A wrong one wastes
        the next token's pass below. What a pass costs whatever its rows is only spared if the whole
        batch leaves.
        """
        costs = self.costs
        alone = self._fires[segment] ** (rows - 1)
        top = costs.above(segment + 1, 1) + costs.head.at(1)
        joining = costs.above(segment + 1, 2) - costs.above(segment + 1, 1) + costs.head.more(1)
        below = costs.below(segment, rows) - costs.below(segment, rows - 1)
        return alone * top - joining, alone * costs.below(segment, 1) + (1 - alone) * below

    def _saved(self, segment: int, leaving: float, staying: float) -> float:
        costs = self.costs
        saved = costs.above(segment + 1, leaving + staying) - costs.above(segment + 1, staying)
        return saved + costs.head.at(leaving + staying) - costs.head.at(staying)

    def _payment(self, segment: int, leaving: float) -> float:
        """K,V of ``leaving`` rows: a projection, or the rows' share of a later pass if cheaper."""
        costs = self.costs
        along = costs.above(segment + 1, 1 + leaving) - costs.above(segment + 1, 1)
        return min(costs.fill.at(leaving), along) if costs.fill.known else along
