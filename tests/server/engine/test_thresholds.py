"""Which thresholds are in force."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offramp.models.exits.points import OperatingPoint
from offramp.models.sampling_params import NEVER, ExitCriterion, ExitMode, ExitSettings, KVFill
from offramp.server.engine.thresholds import GUARD_OFF, ExitThresholds

DEFAULT = (0.9, 0.8)


def point(quality: float) -> OperatingPoint:
    return OperatingPoint(
        quality=quality,
        confidence=0.95,
        criterion=ExitCriterion.TWO_KEY,
        kv_fill=KVFill.PROJECT,
        thresholds=(quality, quality - 0.1),
        agreement=quality,
        layers_skipped=0.1,
        mean_depth=27.0,
        prompts=100,
        tokens=6400,
    )


POINTS = [point(0.9), point(0.95), point(0.98)]
ANY = ExitSettings(ExitMode.ADAPTIVE)


def under_load(thresholds: ExitThresholds, waiting: int, steps: int) -> None:
    for _ in range(steps):
        thresholds.observe_load(waiting)


def test_the_point_asked_for_or_the_files_own() -> None:
    assert ExitThresholds(DEFAULT).thresholds == DEFAULT
    assert ExitThresholds(DEFAULT).quality is None
    chosen = ExitThresholds(DEFAULT, POINTS, 0.93)
    assert chosen.quality == 0.95
    assert chosen.thresholds == POINTS[1].thresholds


def test_overload_falls_to_the_floor_and_no_further() -> None:
    thresholds = ExitThresholds(DEFAULT, POINTS, 0.98, floor=0.95)
    under_load(thresholds, 3, 1000)
    assert thresholds.quality == 0.95
    assert thresholds.of(ANY, late=False) == POINTS[1].thresholds
    under_load(thresholds, 0, 1000)
    assert thresholds.quality == 0.98


def test_a_short_burst_costs_no_quality() -> None:
    thresholds = ExitThresholds(DEFAULT, POINTS, 0.98, floor=0.9)
    for _ in range(20):
        under_load(thresholds, 5, 8)
        under_load(thresholds, 0, 1)
    assert thresholds.quality == 0.98


def test_without_a_floor_load_changes_nothing() -> None:
    thresholds = ExitThresholds(DEFAULT, POINTS, 0.98)
    under_load(thresholds, 9, 1000)
    assert thresholds.quality == 0.98


def test_a_request_that_names_its_thresholds_keeps_them_under_load() -> None:
    thresholds = ExitThresholds(DEFAULT, POINTS, 0.98, floor=0.9)
    under_load(thresholds, 9, 1000)
    mine = ExitSettings(ExitMode.ADAPTIVE, thresholds=(0.7, 0.6), late_thresholds=(0.5, 0.4))
    assert thresholds.of(mine, late=False) == (0.7, 0.6)
    assert thresholds.of(mine, late=True) == (0.5, 0.4)


def test_the_guard_tightens_everything_and_then_closes() -> None:
    thresholds = ExitThresholds(DEFAULT)
    thresholds.tighten()
    assert thresholds.thresholds == (0.95, 0.9)
    assert thresholds.of(ExitSettings(thresholds=(0.5, 0.0)), late=False) == (0.75, 0.5)
    for _ in range(GUARD_OFF + 2):
        thresholds.tighten()
    assert thresholds.guard_level == GUARD_OFF
    assert thresholds.thresholds == (NEVER, NEVER)
    assert thresholds.of(ExitSettings(thresholds=(0.5, 0.0)), late=False) == (NEVER, NEVER)


def test_a_quality_is_spent_on_what_spares_more() -> None:
    """The points skip a tenth of the layers, and inputs of 8 bits may spare more or less time."""
    thresholds = ExitThresholds(DEFAULT, POINTS, 0.98)
    assert not thresholds.takes_coarse(ANY)
    thresholds.allow_coarse(0.98, 1.04)
    assert not thresholds.takes_coarse(replace(ANY, quality=0.9))
    thresholds.allow_coarse(0.98, 1.1)
    assert not thresholds.takes_coarse(ANY)
    thresholds.allow_coarse(0.98, 1.2)
    assert thresholds.takes_coarse(ANY)
    assert thresholds.takes_coarse(replace(ANY, quality=0.9))
    thresholds.tighten()
    assert not thresholds.takes_coarse(ANY)


def test_no_more_is_promised_of_inputs_than_was_calibrated() -> None:
    thresholds = ExitThresholds(DEFAULT, POINTS, 0.98)
    thresholds.allow_coarse(0.95, 1.2)
    assert not thresholds.takes_coarse(ANY)
    assert thresholds.takes_coarse(replace(ANY, quality=0.95))
    assert not thresholds.takes_coarse(replace(ANY, quality=0.96))
    # Without a promise nobody said what may differ.
    unpromised = ExitThresholds(DEFAULT)
    unpromised.allow_coarse(0.98, 1.2)
    assert not unpromised.takes_coarse(ANY)


@pytest.mark.parametrize(
    "named",
    [
        {"mode": ExitMode.OFF},
        {"mode": ExitMode.LOSSLESS},
        {"criterion": ExitCriterion.MAX_PROB},
        {"always": True},
        {"prefill_threshold": 0.5},
        {"late_thresholds": DEFAULT},
        {"thresholds": DEFAULT},
    ],
    ids=str,
)
def test_who_names_exits_gets_exits(named: dict[str, object]) -> None:
    thresholds = ExitThresholds(DEFAULT, POINTS, 0.98)
    thresholds.allow_coarse(0.98, 1.2)
    assert not thresholds.takes_coarse(replace(ANY, **named))  # type: ignore[arg-type]
