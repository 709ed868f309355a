"""From trials to promises, without an engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from offramp.models.exits.calibration import Candidate, betting_p_value, upper_bound
from offramp.models.exits.points import OperatingPoint
from offramp.models.sampling_params import ExitCriterion, KVFill
from offramp.server.lab.selection import (
    Choice,
    Trial,
    best_quality,
    fastest,
    joined,
    monotone,
    operating_point,
    p_values,
    within_depth,
)


def trial(risk: float, seconds: float = 1.0, depth: float = 20.0, count: int = 400) -> Trial:
    rng = np.random.default_rng(int(risk * 1e6))
    losses = rng.binomial(64, risk, count) / 64
    return Trial(
        Candidate((1 - risk,), risk, 0.1), tuple(losses), 64 * count, 1 - risk, depth, 0.1, seconds
    )


def test_the_fastest_of_those_shown_is_taken() -> None:
    trials = [trial(0.002, 1.0), trial(0.01, 0.7), trial(0.02, 0.8), trial(0.2, 0.1)]
    assert fastest(trials, 0.95, 0.95) == Choice(1, 0.95)
    assert fastest(trials, 0.99, 0.95) == Choice(0, 0.99)
    assert fastest(trials, 0.999, 0.95) is None
    values = p_values(trials, 0.95, 0.95)
    assert values == [betting_p_value(each.losses, 0.05) for each in trials]
    assert [value <= 0.05 for value in values] == [True, True, True, False]


def test_nothing_after_the_first_failure_counts() -> None:
    """A better result further on is luck or at least not looked at."""
    trials = [trial(0.002, 1.0), trial(0.2, 0.9), trial(0.003, 0.1)]
    assert fastest(trials, 0.95, 0.95) == Choice(0, 0.95)
    assert fastest(trials[1:], 0.95, 0.95) is None


def test_a_looser_quality_is_never_slower() -> None:
    trials = [trial(risk, 1 - 3 * risk) for risk in (0.002, 0.006, 0.015, 0.03, 0.05)]
    found = [fastest(trials, quality, 0.95) for quality in (0.9, 0.95, 0.98, 0.99)]
    chosen = [each.trial for each in found if each is not None]
    assert len(chosen) == 4
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[-1]


def test_a_budget_takes_the_first_within_it_and_bounds_its_quality() -> None:
    trials = [trial(0.002, depth=28), trial(0.01, depth=24), trial(0.03, depth=22)]
    choice = within_depth(trials, 25, 0.95, 5)
    assert choice is not None
    assert choice.trial == 1
    assert choice.quality == pytest.approx(1 - upper_bound(trials[1].losses, 0.99))
    assert choice.quality < 1 - upper_bound(trials[1].losses, 0.95) < 0.99
    assert within_depth(trials, 21, 0.95, 5) is None


def test_the_best_quality_is_what_could_have_been_asked() -> None:
    trials = [trial(0.01), trial(0.03)]
    best = best_quality(trials, 0.95)
    assert fastest(trials, best - 1e-6, 0.95) is not None
    assert fastest(trials, best + 1e-4, 0.95) is None


def test_claims_fall_as_thresholds_fall() -> None:
    choices = [Choice(3, 0.95), Choice(1, 0.98), Choice(4, 0.97), Choice(1, 0.99)]
    found = monotone(choices)
    assert [each.trial for each in found] == [4, 3, 1, 1]
    assert [each.quality for each in found] == pytest.approx([0.9499, 0.95, 0.98, 0.99])
    for loose, strict in pairwise(found):
        assert loose.quality < strict.quality


def test_a_point_says_what_was_measured() -> None:
    tried = trial(0.01)
    point = operating_point(
        Choice(0, 0.98),
        tried,
        confidence=0.95,
        criterion=ExitCriterion.MAX_PROB,
        kv_fill=KVFill.COPY,
    )
    assert (point.quality, point.confidence) == (0.98, 0.95)
    assert point.thresholds == tried.candidate.thresholds
    assert (point.prompts, point.tokens) == (400, 64 * 400)
    assert (point.criterion, point.kv_fill) == (ExitCriterion.MAX_PROB, KVFill.COPY)


def test_earlier_points_stay_where_they_do_not_contradict() -> None:
    def point(quality: float, score: float, criterion: ExitCriterion) -> OperatingPoint:
        scores, fill = (score, score), KVFill.PROJECT
        return OperatingPoint(quality, 0.95, criterion, fill, scores, quality, 0.1, 3.0, 10, 100)

    own, other = ExitCriterion.TWO_KEY, ExitCriterion.GATE
    low, replaced, high = point(0.8, 0.5, own), point(0.9, 0.6, own), point(0.95, 0.65, own)
    foreign, new = point(0.9, 0.1, other), point(0.9, 0.7, own)
    exact = replace(replaced, kv_fill=KVFill.RECOMPUTE)
    kept, wrong = joined((low, replaced, high, foreign, exact), (new,))
    assert kept == [low, foreign, exact, new]
    assert wrong == [high]
