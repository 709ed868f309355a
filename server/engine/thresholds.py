"""Which exit thresholds are in force: operating points, load, deadlines and the guard's verdict.

A quality below 1 may be spent on exits, or on inputs of 8 bits: on what spares more.
"""

from __future__ import annotations

from collections.abc import Sequence

from offramp.models.exits.calibration import OnlineThresholds
from offramp.models.exits.points import OperatingPoint, point_for
from offramp.models.sampling_params import DEFAULT_CRITERION, NEVER, ExitMode, ExitSettings

# Steps with a waiting line before quality falls a point, and without one before it rises again:
# a burst that is admitted at once costs no quality, and the level does not flutter.
_BUSY_STEPS = 16
_CALM_STEPS = 64
GUARD_OFF = 3
# Gains below this are noise of so short a measurement.
_LEAST_GAIN = 1.05


class ExitThresholds:
    """Thresholds of requests that name none, and how guard and load change all thresholds.

    ``default`` are the exit file's own. With calibrated ``points``, requests take the point that
    promises ``quality``; under overload it may fall point by point down to ``floor`` (None: it
    never falls). ``online`` estimates take the place of all these. Each level of the guard halves
    the distance of all thresholds to 1; at GUARD_OFF no token leaves any more.
    """

    def __init__(
        self,
        default: tuple[float, ...],
        points: Sequence[OperatingPoint] = (),
        quality: float | None = None,
        floor: float | None = None,
        online: OnlineThresholds | None = None,
    ) -> None:
        chosen = None if quality is None else point_for(points, quality)
        self._points = points
        self._coarse_quality = 0.0
        self._coarse_saving = 0.0
        self._default = default if chosen is None else chosen.thresholds
        self._strict = None if chosen is None else chosen.quality
        self._ladder: list[OperatingPoint] = []
        if chosen is not None and floor is not None:
            looser = [point for point in points if floor <= point.quality < chosen.quality]
            self._ladder = sorted(looser, key=lambda point: point.quality, reverse=True)
        self.online = online
        self._rung = 0
        self._busy = 0
        self._calm = 0
        self.guard_level = 0

    @property
    def quality(self) -> float | None:
        """Agreement promised to requests that name no quality; None without a promise."""
        return self._ladder[self._rung - 1].quality if self._rung else self._strict

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Scores in force for requests that name none."""
        found = self._ladder[self._rung - 1].thresholds if self._rung else self._default
        return self._guarded(found if self.online is None else self.online.over(found))

    def of(self, exits: ExitSettings, *, late: bool) -> tuple[float, ...]:
        """Scores in force for a request; ``late`` if it would miss its deadline."""
        wished = exits.late_thresholds if late and exits.late_thresholds else exits.thresholds
        return self.thresholds if wished is None else self._guarded(wished)

    def allow_coarse(self, quality: float, gain: float) -> bool:
        """Inputs of 8 bits keep ``quality`` and make layers ``gain`` times as fast.

        Returns whether that is enough for anyone to take them.
        """
        if gain < _LEAST_GAIN:
            return False
        self._coarse_quality, self._coarse_saving = quality, 1 - 1 / gain
        return True

    def takes_coarse(self, exits: ExitSettings) -> bool:
        """Whether a request's quality is spent on inputs of 8 bits instead of exits.

        Only where it leaves the choice of means open, and exits would skip a smaller share of the
        layers than is spared so.
        """
        if exits.mode is not ExitMode.ADAPTIVE or exits.criterion is not DEFAULT_CRITERION:
            return False
        if exits.always or exits.prefill_threshold is not None or exits.late_thresholds is not None:
            return False
        promise = exits.quality
        if promise is None and exits.thresholds is None:
            promise = self.quality
        if promise is None or promise > self._coarse_quality or self.guard_level:
            return False
        point = point_for(self._points, promise)
        return point is None or point.layers_skipped < self._coarse_saving

    def observe_load(self, waiting: int) -> None:
        """Called once a step with the number of requests that wait for admission."""
        self._busy, self._calm = (self._busy + 1, 0) if waiting else (0, self._calm + 1)
        if self._busy >= _BUSY_STEPS and self._rung < len(self._ladder):
            self._busy, self._rung = 0, self._rung + 1
        elif self._calm >= _CALM_STEPS and self._rung:
            self._calm, self._rung = 0, self._rung - 1

    def tighten(self) -> None:
        """The guard saw the promise broken."""
        self.guard_level = min(self.guard_level + 1, GUARD_OFF)

    def _guarded(self, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        if self.guard_level >= GUARD_OFF:
            return (NEVER,) * len(thresholds)
        keep = 0.5**self.guard_level
        return tuple(1 - (1 - t) * keep if t <= 1 else t for t in thresholds)
