"""An exit's threshold from what its tokens turned out to be, learnt while serving.

FREE's estimator (arXiv 2310.05424): the confidences of tokens that agree with full depth follow one
Beta distribution, those of tokens that disagree another; the posterior of agreeing given a
confidence turns the quality asked for into a threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offramp.models.sampling_params import NEVER

# A Beta density is without bound at 0 and 1, so confidences there count as this far inside.
_EDGE = 1e-4
_GRID: NDArray[np.float64] = np.linspace(_EDGE, 1 - _EDGE, 2001)
# Each component starts as if it had seen this many confidences spread evenly over 0 .. 1: with few
# samples of its own it says little, and equal samples still have some variance.
_PRIOR = 4.0
_PRIOR_MEAN = 1 / 2
_PRIOR_SQUARE = 1 / 3
# Checked tokens an exit needs before its estimate replaces the thresholds it came with, and between
# one estimate and the next.
_FEWEST = 64
_EVERY = 16


@dataclass(slots=True)
class Component:
    """One Beta distribution as fading sums over its confidences x: count, x and x squared."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def fade(self, factor: float) -> None:
        """Let everything seen so far count ``factor`` times as much."""
        self.count *= factor
        self.total *= factor
        self.squares *= factor

    def add(self, confidence: float) -> None:
        """Learn one confidence."""
        self.count += 1
        self.total += confidence
        self.squares += confidence * confidence

    @property
    def mean(self) -> float:
        """Mean confidence, the prior included."""
        return (self.total + _PRIOR * _PRIOR_MEAN) / (self.count + _PRIOR)

    @property
    def shape(self) -> tuple[float, float]:
        """Alpha and beta with this mean and variance (method of moments)."""
        mean = self.mean
        square = (self.squares + _PRIOR * _PRIOR_SQUARE) / (self.count + _PRIOR)
        # The prior keeps the variance above 0 and, as all x lie inside 0 .. 1, below its maximum.
        size = mean * (1 - mean) / (square - mean * mean) - 1
        return mean * size, (1 - mean) * size


@dataclass(slots=True)
class BetaMixture:
    """Agreeing and disagreeing tokens of one exit; the state is six sums.

    ``decay`` fades what was seen at every new token: the last 1 / (1 - decay) tokens count.
    """

    decay: float = 0.999
    agreeing: Component = field(default_factory=Component)
    disagreeing: Component = field(default_factory=Component)

    def add(self, confidence: float, *, agreed: bool) -> None:
        """Learn from one token checked at full depth; ``confidence`` lies in 0 .. 1.

        Raises ValueError for another confidence.
        """
        if not 0 <= confidence <= 1:
            raise ValueError("a confidence lies in 0 .. 1")
        self.agreeing.fade(self.decay)
        self.disagreeing.fade(self.decay)
        component = self.agreeing if agreed else self.disagreeing
        component.add(min(max(confidence, _EDGE), 1 - _EDGE))

    def posterior(self, confidence: float) -> float:
        """P(agree | confidence)."""
        inside = min(max(confidence, _EDGE), 1 - _EDGE)
        return float(_sigmoid(self._log_odds(np.array([inside])))[0])

    def threshold(self, target: float) -> float:
        """Lowest confidence at which P(agree) reaches ``target``; `NEVER` if it nowhere does.

        From there up to where agreeing tokens typically lie it stays at the target: the far tail of
        a fit, where nothing was seen, cannot make a low threshold. An exit whose agreeing tokens
        are not the more confident ones has no threshold.
        """
        typical = self.agreeing.mean
        if typical <= self.disagreeing.mean:
            return NEVER
        good = _sigmoid(self._log_odds(_GRID)) >= target
        below = int(np.searchsorted(_GRID, typical, side="right"))
        misses = np.flatnonzero(~good[:below])
        if len(misses) < below:
            first = int(misses[-1]) + 1 if len(misses) else 0
            if first < below:
                return float(_GRID[first])
        above = np.flatnonzero(good[below:])
        return float(_GRID[below + int(above[0])]) if len(above) else NEVER

    def _log_odds(self, confidence: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log of P(agree) / P(disagree) at confidences [n] inside 0 .. 1."""
        (a, b), (c, d) = self.agreeing.shape, self.disagreeing.shape
        ahead = math.log((self.agreeing.count + 1) / (self.disagreeing.count + 1))
        ahead += _log_beta(c, d) - _log_beta(a, b)
        odds: NDArray[np.float64] = (
            ahead + (a - c) * np.log(confidence) + (b - d) * np.log1p(-confidence)
        )
        return odds


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


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(values / 2))
