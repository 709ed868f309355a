"""The one-parameter family of thresholds, on exits whose scores are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from offramp.models.exits.calibration import (
    Scored,
    candidates,
    stepwise_candidates,
    teacher_forced,
    thresholds_at,
    uniform_candidates,
)
from offramp.models.sampling_params import NEVER

LAYERS = (18, 22, 26)


def calibrated(count: int = 20000) -> Scored:
    """Scores that are true probabilities, higher at higher exits."""
    generator = torch.Generator().manual_seed(1)
    ease = torch.rand(count, generator=generator)
    scores = torch.stack([ease.pow(power) for power in (3.0, 1.0, 0.3)])
    right = torch.rand(scores.shape, generator=generator) < scores
    return Scored(scores, right, LAYERS, 30)


def test_thresholds_follow_from_what_leaving_saves() -> None:
    """Saving 40 % of the stack pays for an error of 10 % where errors cost four stacks."""
    assert thresholds_at(4.0, (18,), 30) == pytest.approx((0.9,))
    low, middle, high = thresholds_at(2.0, LAYERS, 30)
    assert low < middle < high < 1
    assert thresholds_at(0.1, LAYERS, 30) == pytest.approx((0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="positive"):
        thresholds_at(0.0, LAYERS, 30)


def test_every_threshold_rises_with_mu() -> None:
    line = [thresholds_at(0.05 * 1.3**step, LAYERS, 30) for step in range(60)]
    for loose, strict in pairwise(line):
        assert all(a <= b for a, b in zip(loose, strict, strict=True))
    assert line[0] != line[-1]
    assert max(line[-1]) <= NEVER


def test_a_token_counts_at_the_first_exit_that_fires() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.8], [0.9, 0.9, 0.2, 0.9]])
    right = torch.tensor([[False, False, True, True], [True, True, False, False]])
    scored = Scored(scores, right, (2, 3), 4)
    assert teacher_forced(scored, (0.5, 0.5)) == (0.25, (2 + 1 + 2) / 16)
    assert teacher_forced(scored, (NEVER, 0.5)) == (0.25, 3 / 16)
    assert teacher_forced(scored, (NEVER, NEVER)) == (0.0, 0.0)
    # A score equal to its threshold leaves.
    assert teacher_forced(scored, (0.9, NEVER)) == (0.25, 2 / 16)
    with pytest.raises(ValueError, match="needed"):
        Scored(scores, right[:1], (2, 3), 4)


@pytest.mark.parametrize("make", [candidates, uniform_candidates])
def test_candidates_span_the_risks_from_careful_to_aggressive(make: type) -> None:
    scored = calibrated()
    found = make(scored, 9, 0.002, 0.08)
    assert 6 <= len(found) <= 9
    risks = [each.risk for each in found]
    assert risks == sorted(risks)
    assert risks[0] <= 0.002 * 1.5
    assert 0.04 < risks[-1] <= 0.08
    for careful, bold in pairwise(found):
        assert all(a >= b for a, b in zip(careful.thresholds, bold.thresholds, strict=True))
        assert careful.skipped < bold.skipped
    for each in found:
        assert (each.risk, each.skipped) == teacher_forced(scored, each.thresholds)


def test_exits_that_are_always_wrong_have_no_candidates() -> None:
    scores = torch.full((3, 50), 0.9)
    scored = Scored(scores, torch.zeros(3, 50, dtype=torch.bool), LAYERS, 30)
    assert candidates(scored) == []
    assert uniform_candidates(scored) == []


def test_without_tokens_there_are_none() -> None:
    scored = Scored(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool), LAYERS, 30)
    assert candidates(scored) == []
    assert uniform_candidates(scored) == []


def test_fixed_depths_go_down_exit_by_exit() -> None:
    found = stepwise_candidates(calibrated())
    assert [each.skipped for each in found] == pytest.approx([4 / 30, 8 / 30, 12 / 30])
    for careful, bold in pairwise(found):
        assert all(a >= b for a, b in zip(careful.thresholds, bold.thresholds, strict=True))
