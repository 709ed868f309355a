"""The Beta mixture on synthetic confidences."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.models.exits.calibration import BetaMixture
from offramp.models.sampling_params import NEVER


def drawn(
    count: int, share: float, good: tuple[float, float], bad: tuple[float, float], seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and agreement of tokens of which ``share`` agree."""
    rng = np.random.default_rng(seed)
    agreed = rng.random(count) < share
    return np.where(agreed, rng.beta(*good, count), rng.beta(*bad, count)), agreed


def fitted(confidences: np.ndarray, agreed: np.ndarray, decay: float = 1.0) -> BetaMixture:
    mixture = BetaMixture(decay)
    for confidence, right in zip(confidences, agreed, strict=True):
        mixture.add(float(confidence), agreed=bool(right))
    return mixture


def posterior(mixture: BetaMixture, confidence: float) -> float:
    """P(agree | confidence)."""
    odds = mixture._log_odds(np.array([min(max(confidence, 1e-4), 1 - 1e-4)]))
    return float(1 / (1 + np.exp(-odds[0])))


def test_the_shapes_of_both_components_are_found() -> None:
    mixture = fitted(*drawn(20000, 0.7, (8, 2), (2, 4)))
    assert mixture.agreeing.shape == pytest.approx((8, 2), rel=0.05)
    assert mixture.disagreeing.shape == pytest.approx((2, 4), rel=0.05)


@pytest.mark.parametrize("target", [0.8, 0.9, 0.95, 0.98])
def test_tokens_at_the_threshold_agree_as_often_as_asked(target: float) -> None:
    """Judged on fresh tokens in a narrow window above the threshold."""
    shapes = (6.0, 1.5), (2.0, 3.0)
    threshold = fitted(*drawn(20000, 0.6, *shapes)).threshold(target)
    assert 0.3 < threshold < 1.0
    confidences, agreed = drawn(400_000, 0.6, *shapes, seed=2)
    window = (confidences >= threshold) & (confidences < threshold + 0.01)
    assert agreed[window].mean() == pytest.approx(target, abs=0.025)
    assert agreed[confidences >= threshold].mean() >= target


def test_a_higher_target_needs_a_higher_threshold() -> None:
    mixture = fitted(*drawn(5000, 0.6, (6, 1.5), (2, 3)))
    thresholds = [mixture.threshold(target) for target in (0.6, 0.8, 0.9, 0.95, 0.99, 0.9999)]
    assert thresholds == sorted(thresholds)
    assert posterior(mixture, thresholds[2]) == pytest.approx(0.9, abs=0.01)
    assert posterior(mixture, thresholds[2] - 0.01) < 0.9


def test_what_tells_nothing_apart_lets_nobody_leave() -> None:
    assert fitted(*drawn(5000, 0.6, (3, 3), (3, 3))).threshold(0.95) == NEVER
    assert fitted(*drawn(5000, 0.6, (2, 5), (5, 2))).threshold(0.95) == NEVER
    assert BetaMixture().threshold(0.9) == NEVER


def test_few_tokens_promise_little() -> None:
    """Three agreeing tokens are weaker evidence than three hundred of the same."""
    seen = np.array([0.9, 0.95, 0.99])
    few = fitted(seen, np.ones(3, dtype=bool))
    many = fitted(np.tile(seen, 100), np.ones(300, dtype=bool))
    assert few.threshold(0.98) > 0.99
    assert many.threshold(0.98) < few.threshold(0.98) - 0.1
    assert posterior(few, 0.9) < 0.95 < posterior(many, 0.9)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_values_and_edges_have_finite_answers(value: float) -> None:
    mixture = fitted(np.full(1000, value), np.arange(1000) % 2 == 0)
    for confidence in (0.0, 0.3, 1.0):
        assert posterior(mixture, confidence) == pytest.approx(0.5)
    assert mixture.threshold(0.9) == NEVER


def test_confidences_at_the_very_edges_are_told_apart() -> None:
    """All agreeing tokens say 1, all others 0."""
    agreed = np.arange(400) % 2 == 0
    mixture = fitted(agreed.astype(float), agreed)
    assert posterior(mixture, 1.0) > 0.95
    assert posterior(mixture, 0.0) < 0.05
    assert 0.4 < mixture.threshold(0.9) < 1.0
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        mixture.add(1.5, agreed=True)
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        mixture.add(float("nan"), agreed=True)


def test_old_tokens_fade() -> None:
    """A change of the text moves the threshold to where the new text alone would have it."""
    old, new = drawn(4000, 0.8, (8, 2), (2, 6)), drawn(4000, 0.5, (9, 1.5), (6, 3), seed=3)
    both = tuple(np.concatenate(pair) for pair in zip(old, new, strict=True))
    moved = fitted(both[0], both[1], decay=0.998).threshold(0.9)
    alone = fitted(*new, decay=0.998).threshold(0.9)
    before = fitted(*old, decay=0.998).threshold(0.9)
    assert moved == pytest.approx(alone, abs=0.01)
    assert moved > before + 0.1
