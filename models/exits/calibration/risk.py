"""Whether the mean of bounded losses is small enough, by tests that hold for any number of samples.

One loss per answer: the share of its tokens that differ from full depth (sequence-level risk, CALM,
arXiv 2207.07061). Each test returns a p-value for H0: E[loss] > risk; a threshold whose p-value is
at most alpha keeps the risk with confidence 1 - alpha (Learn then Test, arXiv 2110.01052).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Losses = Sequence[float] | NDArray[np.float64]

# The largest share of the capital that is put at stake: one loss of 1 leaves a hundredth, where a
# full stake would leave nothing to win back.
_STAKE = 0.99
_BISECTIONS = 40


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


def hoeffding_bentkus_p_value(losses: Losses, risk: float) -> float:
    """p-value of H0: E[loss] > ``risk`` from losses [n] in 0 .. 1; 1 without losses.

    The better of Hoeffding's and Bentkus' bounds (Bates et al., arXiv 2101.02703). It knows the
    mean alone, so it is as wide as for losses that are all 0 or 1. Raises ValueError for losses or
    risks outside 0 .. 1.
    """
    values = _checked(losses, risk)
    count = len(values)
    if not count or risk <= 0:
        return 1.0
    if risk >= 1:
        return 0.0
    mean = float(values.mean())
    hoeffding = math.exp(-count * _divergence(min(mean, risk), risk))
    # A sum a rounding error above a whole number is that number.
    bentkus = math.e * _binomial_cdf(math.ceil(count * mean - 1e-9), count, risk)
    return min(1.0, hoeffding, bentkus)


def upper_bound(losses: Losses, confidence: float) -> float:
    """Upper confidence bound of E[loss] from losses [n] in 0 .. 1; 1 without losses.

    The smallest risk the betting test can show; found by bisection, for its p-value falls with the
    risk.
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


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of Bernoulli(a) from Bernoulli(b), 0 < b < 1."""
    low = a * math.log(a / b) if a > 0 else 0.0
    high = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return low + high


def _binomial_cdf(successes: int, count: int, p: float) -> float:
    """P(X <= successes) for X ~ Binomial(count, p), 0 < p < 1."""
    total = math.lgamma(count + 1)
    return sum(
        math.exp(
            total
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            + k * math.log(p)
            + (count - k) * math.log1p(-p)
        )
        for k in range(successes + 1)
    )
