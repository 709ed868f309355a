"""Which thresholds are in force."""

from __future__ import annotations

from offramp.models.exits.file import OperatingPoint
from offramp.models.sampling_params import NEVER, ExitCriterion, ExitMode, ExitSettings, KVFill
from offramp.server.engine.targets import GUARD_OFF, ExitTargets

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


def under_load(targets: ExitTargets, waiting: int, steps: int) -> None:
    for _ in range(steps):
        targets.observe_load(waiting)


def test_the_point_asked_for_or_the_files_own() -> None:
    assert ExitTargets(DEFAULT).thresholds == DEFAULT
    assert ExitTargets(DEFAULT).quality is None
    chosen = ExitTargets(DEFAULT, POINTS, 0.93)
    assert chosen.quality == 0.95
    assert chosen.thresholds == POINTS[1].thresholds


def test_overload_falls_to_the_floor_and_no_further() -> None:
    targets = ExitTargets(DEFAULT, POINTS, 0.98, floor=0.95)
    under_load(targets, 3, 1000)
    assert targets.quality == 0.95
    assert targets.of(ANY, late=False) == POINTS[1].thresholds
    under_load(targets, 0, 1000)
    assert targets.quality == 0.98


def test_a_short_burst_costs_no_quality() -> None:
    targets = ExitTargets(DEFAULT, POINTS, 0.98, floor=0.9)
    for _ in range(20):
        under_load(targets, 5, 8)
        under_load(targets, 0, 1)
    assert targets.quality == 0.98


def test_without_a_floor_load_changes_nothing() -> None:
    targets = ExitTargets(DEFAULT, POINTS, 0.98)
    under_load(targets, 9, 1000)
    assert targets.quality == 0.98


def test_a_request_that_names_its_thresholds_keeps_them_under_load() -> None:
    targets = ExitTargets(DEFAULT, POINTS, 0.98, floor=0.9)
    under_load(targets, 9, 1000)
    mine = ExitSettings(ExitMode.ADAPTIVE, thresholds=(0.7, 0.6), late_thresholds=(0.5, 0.4))
    assert targets.of(mine, late=False) == (0.7, 0.6)
    assert targets.of(mine, late=True) == (0.5, 0.4)


def test_the_guard_tightens_everything_and_then_closes() -> None:
    targets = ExitTargets(DEFAULT)
    targets.tighten()
    assert targets.thresholds == (0.95, 0.9)
    assert targets.of(ExitSettings(thresholds=(0.5, 0.0)), late=False) == (0.75, 0.5)
    for _ in range(GUARD_OFF + 2):
        targets.tighten()
    assert targets.guard_level == GUARD_OFF
    assert targets.thresholds == (NEVER, NEVER)
    assert targets.of(ExitSettings(thresholds=(0.5, 0.0)), late=False) == (NEVER, NEVER)
