"""Calibration: candidate thresholds, tests of the risk they run, and thresholds learnt in service.

**Candidates.** A token that leaves at exit e saves the share (L - e) / L of the stack and is wrong
with probability 1 - p, p being the exit's score; it also makes h later tokens wrong, which read K,V
that were filled (h is measured for each exit). With mu as the price of a wrong token in whole
stacks, leaving pays where (1 - p + h) * mu < (L - e) / L, the ratio of cost and quality in ADEPT's
utility (arXiv 2601.03700). So one mu gives every exit its threshold, and calibration searches a
line of thresholds instead of all combinations.

**Risk.** One loss per answer: the share of its tokens that differ from full depth (sequence-level
risk, CALM, arXiv 2207.07061). A test returns a p-value for H0: E[loss] > risk; a threshold whose
p-value is at most alpha keeps the risk with confidence 1 - alpha (Learn then Test, arXiv
2110.01052).

**In service.** FREE's estimator (arXiv 2310.05424): the confidences of tokens that agree with full
depth follow one Beta distribution, those of tokens that disagree another; the posterior of agreeing
given a confidence turns the quality asked for into a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.models.sampling_params import NEVER

_MU_LOW, _MU_HIGH, _MU_STEPS = 0.05, 1e6, 240
_UNIFORM_STEPS = 240
Losses = Sequence[float] | NDArray[np.float64]

# The largest share of the capital that is put at stake: one loss of 1 leaves a hundredth, where a
# full stake would leave nothing to win back.
_STAKE = 0.99
_BISECTIONS = 40
# A Beta density is without bound at 0 and 1, so confidences there count as this far inside.
_EDGE = 1e-4
_GRID: NDArray[np.float64] = np.linspace(_EDGE, 1 - _EDGE, 2001)
# Each component starts as if it had seen this many confidences spread evenly over 0 .. 1: with few
# samples of its own it says little, and equal samples still have some variance.
_PRIOR = 4.0
_PRIOR_MEAN = 1 / 2
_PRIOR_SQUARE = 1 / 3


@dataclass(frozen=True, slots=True)
class Scored:
    """n answer positions as the exits see them, teacher-forced with exact K,V.

    ``scores`` [k, n] of one criterion and ``right`` [k, n], whether the exit's token is the
    full-depth one, at the ``exit_layers`` (k, ascending) of a stack of ``num_layers``. ``harm``
    (k) is how many later tokens disagree for each one that leaves there; empty for none.
    """

    scores: Tensor
    right: Tensor
    exit_layers: tuple[int, ...]
    num_layers: int
    harm: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        expected = (len(self.exit_layers), self.scores.shape[-1])
        if self.scores.shape != expected or self.right.shape != expected:
            raise ValueError(f"scores and correctness of {expected} are needed")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Thresholds with the ``risk`` expected of them and the share of layers ``skipped``.

    The risk is teacher-forced, with the harm of filled K,V added where it was measured.
    """

    thresholds: tuple[float, ...]
    risk: float
    skipped: float


def thresholds_at(
    mu: float, exit_layers: Sequence[int], num_layers: int, harm: Sequence[float] = ()
) -> tuple[float, ...]:
    """Thresholds 1 - (L - e) / (L * mu) + h, clamped to 0 .. 1.01; higher as mu grows.

    Raises ValueError for a mu that is not positive.
    """
    if not mu > 0:
        raise ValueError("mu is positive")
    harms = harm or (0.0,) * len(exit_layers)
    raw = [
        1 - (num_layers - layer) / (num_layers * mu) + own
        for layer, own in zip(exit_layers, harms, strict=True)
    ]
    return tuple(min(max(value, 0.0), NEVER) for value in raw)


def teacher_forced(scored: Scored, thresholds: Sequence[float]) -> tuple[float, float]:
    """Share of tokens that disagree and share of layers skipped, each out of 1.

    Tokens leave at the first exit whose score reaches its threshold. K,V are exact; the harm of
    filled ones is added as far as ``scored`` knows it.
    """
    count = scored.scores.shape[1]
    inside = torch.ones(count, dtype=torch.bool, device=scored.scores.device)
    wrong, skipped = 0.0, 0
    harms = scored.harm or (0.0,) * len(scored.exit_layers)
    for index, threshold in enumerate(thresholds):
        leaves = inside & (scored.scores[index] >= threshold)
        inside &= ~leaves
        wrong += int((leaves & ~scored.right[index]).sum()) + harms[index] * int(leaves.sum())
        skipped += int(leaves.sum()) * (scored.num_layers - scored.exit_layers[index])
    return wrong / max(count, 1), skipped / max(count * scored.num_layers, 1)


def candidates(
    scored: Scored, count: int = 9, low: float = 0.002, high: float = 0.08
) -> list[Candidate]:
    """About ``count`` points of the path, from careful to aggressive.

    Their teacher-forced risk is spread evenly in its logarithm over ``low`` to ``high``, as far as
    the path reaches; points that skip nothing are left out.
    """
    layers, depth = scored.exit_layers, scored.num_layers
    ratio = (_MU_LOW / _MU_HIGH) ** (1 / (_MU_STEPS - 1))
    mus = [_MU_HIGH * ratio**step for step in range(_MU_STEPS)]
    line = [thresholds_at(mu, layers, depth, scored.harm) for mu in mus]
    return _spread(scored, line, count, low, high)


def uniform_candidates(
    scored: Scored, count: int = 9, low: float = 0.002, high: float = 0.08
) -> list[Candidate]:
    """As `candidates`, with one threshold for all exits: for scores that are no probabilities."""
    values = scored.scores.flatten().float()
    if not len(values):
        return []
    ranked = values.sort().values
    places = torch.linspace(len(ranked) - 1, 0, _UNIFORM_STEPS).round().long()
    levels = ranked[places].unique().flip(0).tolist()
    line = [(min(max(level, 0.0), 1.0),) * len(scored.exit_layers) for level in levels]
    return _spread(scored, line, count, low, high)


def stepwise_candidates(scored: Scored) -> list[Candidate]:
    """One candidate per exit, the topmost first: everyone leaves there at the latest.

    For criteria whose score knows no degrees (fixed depth).
    """
    count = len(scored.exit_layers)
    line = [(NEVER,) * index + (0.0,) * (count - index) for index in reversed(range(count))]
    return [Candidate(each, *teacher_forced(scored, each)) for each in line]


def _spread(
    scored: Scored, line: Sequence[tuple[float, ...]], count: int, low: float, high: float
) -> list[Candidate]:
    """For each of ``count`` risks the last point before ``line`` (careful first) exceeds it."""
    targets = [low * (high / low) ** (step / max(count - 1, 1)) for step in range(count)]
    best: list[Candidate | None] = [None] * count
    reached = 0.0
    for thresholds in line:
        found = Candidate(thresholds, *teacher_forced(scored, thresholds))
        reached = max(reached, found.risk)
        if reached > targets[-1]:
            break
        for index, target in enumerate(targets):
            if reached <= target and found.skipped > 0:
                best[index] = found
    return list(dict.fromkeys(each for each in best if each is not None))


def betting_p_value(losses: Losses, risk: float, alpha: float = 0.05) -> float:
    """p-value of H0: E[loss] > ``risk`` from losses [n] in 0 .. 1; 1 without losses.

    A gambler bets against H0 on one loss after the other; the capital is a supermartingale under
    H0, so its reciprocal at the highest point is a p-value (Waudby-Smith and Ramdas, arXiv
    2010.09686; the bets are those of Learn then Test). The bets grow as the variance seen so far
    falls, which is what makes it strong on answers that nearly all agree. ``alpha`` is the level
    the bets are tuned for; the p-value is valid at every level. It falls as ``risk`` grows.
    Raises ValueError for losses or risks outside 0 .. 1.
    """
    values = _checked(losses, risk)
    if not len(values) or risk <= 0:
        return 1.0
    if risk >= 1:
        return 0.0
    stakes = np.minimum(_bets(values, alpha), _STAKE / (1 - risk))
    capital = np.cumsum(np.log1p(-stakes * (values - risk)))
    return math.exp(-max(0.0, float(capital.max())))


def upper_bound(losses: Losses, confidence: float) -> float:
    """Upper confidence bound of E[loss] from losses [n] in 0 .. 1; 1 without losses.

    The smallest risk that `betting_p_value` shows, found by bisection: it falls as the risk grows.
    """
    alpha = 1 - confidence
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if betting_p_value(losses, middle, alpha) <= alpha:
            high = middle
        else:
            low = middle
    return high


def fixed_sequence(p_values: Sequence[float], alpha: float) -> int:
    """How many hypotheses, in the order given, are rejected at family-wise level ``alpha``.

    Each is tested at the full level until the first one stands (fixed-sequence testing); the order
    must not depend on the data of the p-values.
    """
    for index, value in enumerate(p_values):
        if value > alpha:
            return index
    return len(p_values)


def answers_needed(risk: float, alpha: float) -> int:
    """Fewest answers, all faultless, with which the betting test shows ``risk`` at ``alpha``."""
    # The first bets are careful, so the count with the full stake throughout is a lower bound.
    count = math.ceil(-math.log(alpha) / math.log1p(_STAKE * risk / (1 - risk)))
    while betting_p_value([0.0] * count, risk, alpha) > alpha:
        count += 1
    return count


def _checked(losses: Losses, risk: float) -> NDArray[np.float64]:
    values = np.asarray(losses, dtype=np.float64)
    if not 0 <= risk <= 1 or (len(values) and not (values.min() >= 0 and values.max() <= 1)):
        raise ValueError("losses and risk lie in 0 .. 1")
    return values


def _bets(values: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """The bet on each loss [n], from the variance of the losses before it."""
    count = len(values)
    seen = np.arange(count + 1) + 1.0
    # One loss of 1/2 with variance 1/4 stands for what is known before the first.
    means = (0.5 + np.concatenate(([0.0], np.cumsum(values)))) / seen
    squares = np.concatenate(([0.0], np.cumsum((values - means[1:]) ** 2)))
    variance = (0.25 + squares) / seen
    return np.sqrt(2 * math.log(1 / alpha) / (count * variance[:-1]))


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

    def threshold(self, target: float) -> float:
        """Lowest confidence at which P(agree) reaches ``target``; `NEVER` if it nowhere does.

        From there up to where agreeing tokens typically lie it stays at the target: the far tail of
        a fit, where nothing was seen, cannot make a low threshold. An exit whose agreeing tokens
        are not the more confident ones has no threshold.
        """
        typical = self.agreeing.mean
        if typical <= self.disagreeing.mean:
            return NEVER
        good = 0.5 * (1 + np.tanh(self._log_odds(_GRID) / 2)) >= target
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
