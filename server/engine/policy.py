"""When to let leavers go, and when a thin group waits for company: decided by measured cost."""

from __future__ import annotations

from dataclasses import dataclass, field

# Old measurements fade with this factor a sample: about the last 200 count, enough to follow a
# machine whose speed drifts and few enough to forget a burst of noise.
_DECAY = 0.995
# A decision against exits is tried out anyway once in so many times: costs are only learnt from
# steps that run, and a rule fed by stale costs could otherwise never exit again (DREX's trap).
_PROBE_EVERY = 32


@dataclass(slots=True)
class LinearCost:
    """Seconds of a step as ``fixed + per_row * rows``, by fading least squares."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """Learn from one step."""
        sums = (1.0, rows, seconds, rows * rows, rows * seconds)
        old = (self.weight, self.x, self.y, self.xx, self.xy)
        self.weight, self.x, self.y, self.xx, self.xy = (
            total * _DECAY + value for total, value in zip(old, sums, strict=True)
        )

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.weight > 0.0

    @property
    def per_row(self) -> float:
        """Seconds another row adds; 0 until different row counts were seen."""
        spread = self.weight * self.xx - self.x * self.x
        if spread <= 1e-9 * self.weight * self.xx:
            return 0.0
        return max(0.0, (self.weight * self.xy - self.x * self.y) / spread)

    @property
    def fixed(self) -> float:
        """Seconds of the step before its first row."""
        return max(0.0, (self.y - self.per_row * self.x) / self.weight) if self.known else 0.0

    def at(self, rows: int) -> float:
        """Predicted seconds for ``rows`` rows; no rows, no step."""
        return self.fixed + self.per_row * rows if rows else 0.0


@dataclass(slots=True)
class CostModel:
    """What each kind of step costs on this machine."""

    segments: list[LinearCost]
    head: LinearCost = field(default_factory=LinearCost)
    fill: LinearCost = field(default_factory=LinearCost)

    def above(self, segment: int, rows: int) -> float:
        """Seconds for ``rows`` rows to ride from ``segment`` to the top."""
        return sum(cost.at(rows) for cost in self.segments[segment:])


class ExitPolicy:
    """The two choices that trade time between slots.

    ``max_hold`` (seconds) bounds how long a slot may wait at a segment for company.
    """

    def __init__(self, num_segments: int, max_hold: float) -> None:
        self.costs = CostModel([LinearCost() for _ in range(num_segments)])
        self._max_hold = max_hold
        self._refusals = 0

    def lets_go(self, segment: int, leaving: int, staying: int) -> bool:
        """Whether ``leaving`` slots gain time by leaving after ``segment``.

        They save the layers above at the price of a fill of their K,V later. Where that does not
        pay, all stay; nobody is ever made to leave.
        """
        saved = self.costs.above(segment + 1, leaving + staying)
        saved -= self.costs.above(segment + 1, staying)
        if saved >= self.costs.fill.at(leaving):
            return True
        self._refusals += 1
        return self._refusals % _PROBE_EVERY == 0

    def holds(self, segment: int, staying: int, ready: int, age: float) -> bool:
        """Whether ``staying`` slots wait at ``segment`` while ``ready`` others go first.

        Compared in slot-seconds of waiting: running deep now delays the ready ones; holding delays
        the stayers by a head and a ground step and splits the batch, which costs both steps' fixed
        part once more (design: rebatching rule; DREX's threshold, arXiv 2512.15705).
        """
        if not ready or age >= self._max_hold:
            return False
        head, ground = self.costs.head, self.costs.segments[0]
        split = (staying + ready) * (head.fixed + ground.fixed)
        delay = staying * (head.at(ready) + ground.at(ready))
        return ready * self.costs.above(segment, staying) > delay + split
