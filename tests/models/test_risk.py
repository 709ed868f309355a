"""Risk tests: level under the null, power, order, edges."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.models.exits.calibration import (
    answers_needed,
    betting_p_value,
    fixed_sequence,
    upper_bound,
)

Losses = NDArray[np.float64]
RISK = 0.05
ALPHA = 0.1
TRIALS = 1500


def coins(rng: np.random.Generator, n: int, mean: float) -> Losses:
    return (rng.random(n) < mean).astype(np.float64)


def mostly_zero(rng: np.random.Generator, n: int, mean: float) -> Losses:
    """Nine answers in ten agree throughout."""
    return np.where(rng.random(n) < 0.1, rng.uniform(0, 20 * mean, n), 0.0)


def narrow(rng: np.random.Generator, n: int, mean: float) -> Losses:
    return rng.uniform(mean / 2, 3 * mean / 2, n)


def tokens(rng: np.random.Generator, n: int, mean: float) -> Losses:
    return rng.binomial(64, mean, n) / 64


def hidden_disaster(rng: np.random.Generator, n: int, mean: float) -> Losses:
    """Nothing but a few answers that are wrong in every token."""
    return np.where(rng.random(n) < mean / 2, 1.0, mean / 2 / (1 - mean / 2))


ALL = (coins, mostly_zero, narrow, tokens, hidden_disaster)
Draw = Callable[[np.random.Generator, int, float], Losses]


@pytest.mark.parametrize("draw", ALL)
def test_the_level_is_kept_where_the_risk_is_just_reached(draw: Draw) -> None:
    """At E[loss] = risk at most a share alpha of the p-values is below alpha."""
    rng = np.random.default_rng(3)
    samples = [draw(rng, 120, RISK) for _ in range(TRIALS)]
    assert np.mean(samples) == pytest.approx(RISK, rel=0.05)
    found = sum(betting_p_value(sample, RISK) <= ALPHA for sample in samples)
    # Three standard deviations of a share ALPHA of TRIALS.
    assert found <= TRIALS * ALPHA + 3 * (TRIALS * ALPHA * (1 - ALPHA)) ** 0.5


@pytest.mark.parametrize("draw", [mostly_zero, narrow, tokens])
def test_betting_finds_more_where_losses_vary_little(draw: Draw) -> None:
    rng = np.random.default_rng(4)
    samples = [draw(rng, 150, 0.027) for _ in range(200)]
    # Bounds that know the mean alone (Hoeffding, Bentkus) find fewer than 80 of the 200.
    assert sum(betting_p_value(sample, RISK) <= ALPHA for sample in samples) > 130


@pytest.mark.parametrize("draw", ALL)
def test_a_larger_risk_is_easier_to_show(draw: Draw) -> None:
    sample = draw(np.random.default_rng(5), 80, RISK)
    values = [betting_p_value(sample, risk) for risk in np.linspace(0.0, 1.0, 201)]
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert all(a >= b - 1e-12 for a, b in pairwise(values))


def test_faultless_answers_show_what_their_number_allows() -> None:
    """No test can beat (1 - risk) ** n on n losses of 0."""
    value = betting_p_value([0.0] * 100, 0.04)
    assert value >= 0.96**100 - 1e-12
    assert value < 0.03
    assert betting_p_value([1.0] * 100, 0.04) == 1.0
    assert betting_p_value([], 0.04) == 1.0
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        betting_p_value([1.2], 0.04)
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        betting_p_value([0.2], -0.1)


@pytest.mark.parametrize("risk", [0.3, 0.05, 0.01])
def test_answers_needed_is_the_smallest_number(risk: float) -> None:
    count = answers_needed(risk, 0.05)
    assert betting_p_value([0.0] * count, risk) <= 0.05
    assert betting_p_value([0.0] * (count - 1), risk) > 0.05


def test_the_upper_bound_is_where_the_test_turns() -> None:
    sample = mostly_zero(np.random.default_rng(6), 200, 0.02)
    bound = upper_bound(sample, 0.95)
    assert float(sample.mean()) < bound < 0.06
    assert betting_p_value(sample, bound) <= 0.05
    assert betting_p_value(sample, bound - 1e-6) > 0.05
    assert upper_bound([], 0.95) == 1.0
    assert upper_bound(sample, 0.99) > bound


@pytest.mark.parametrize("draw", ALL)
def test_the_upper_bound_covers_the_mean(draw: Draw) -> None:
    rng = np.random.default_rng(7)
    missed = sum(upper_bound(draw(rng, 60, RISK), 0.9) < RISK for _ in range(300))
    assert missed <= 300 * 0.1 + 3 * (300 * 0.1 * 0.9) ** 0.5


def test_a_sequence_stops_at_its_first_failure() -> None:
    assert fixed_sequence([0.01, 0.05, 0.2, 0.001], 0.05) == 2
    assert fixed_sequence([0.5, 0.01], 0.05) == 0
    assert fixed_sequence([0.01, 0.02], 0.05) == 2
    assert fixed_sequence([], 0.05) == 0
