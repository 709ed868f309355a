"""Thresholds learnt while serving, for exits without a calibration set."""

from __future__ import annotations

from offramp.models.exits.calibration import BetaMixture

# Checked tokens an exit needs before its estimate replaces the thresholds it came with, and between
# one estimate and the next.
_FEWEST = 64
_EVERY = 16


class OnlineThresholds:
    """FREE's estimator (arXiv 2310.05424) for every exit point.

    ``target`` is the wanted P(agree) of a leaving token. Checked tokens come from audits of
    finished answers and from guesses verified in lossless mode.
    """

    def __init__(self, num_exits: int, target: float) -> None:
        self._target = target
        self._mixtures = [BetaMixture() for _ in range(num_exits)]
        self._seen = [0] * num_exits
        self._found: list[float | None] = [None] * num_exits

    def add(self, exit_point: int, score: float, *, agreed: bool) -> None:
        """A token that left at ``exit_point`` with ``score`` was checked at full depth."""
        self._mixtures[exit_point].add(min(max(score, 0.0), 1.0), agreed=agreed)
        self._seen[exit_point] += 1
        seen = self._seen[exit_point]
        if seen >= _FEWEST and seen % _EVERY == 0:
            self._found[exit_point] = self._mixtures[exit_point].threshold(self._target)

    def over(self, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        """``thresholds``, replaced where enough was seen."""
        pairs = zip(thresholds, self._found, strict=True)
        return tuple(own if found is None else found for own, found in pairs)
