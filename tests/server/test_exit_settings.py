"""Early-exit wishes: what the engine is told, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from offramp.models.exits.points import OperatingPoint
from offramp.models.sampling_params import NEVER, ExitCriterion, ExitMode, KVFill
from offramp.server.api.plan import default_fault, exit_settings
from offramp.server.api.schemas import EarlyExit
from offramp.server.config import EngineConfig, ServerConfig
from offramp.server.engine.request import EngineInfo
from offramp.server.errors import InvalidRequest


def point(quality: float, criterion: ExitCriterion = ExitCriterion.TWO_KEY) -> OperatingPoint:
    return OperatingPoint(
        quality=quality,
        confidence=0.95,
        criterion=criterion,
        kv_fill=KVFill.PROJECT,
        thresholds=(quality, quality),
        agreement=quality,
        layers_skipped=0.1,
        mean_depth=27.0,
        prompts=100,
        tokens=6400,
    )


INFO = EngineInfo(
    model_name="m",
    num_layers=30,
    exit_layers=(20, 24),
    exit_thresholds=(0.9, 0.9),
    vocab_size=100,
    max_model_len=64,
    block_size=16,
    num_blocks=4,
    max_num_seqs=4,
    dtype="float32",
    points=(point(0.95), point(0.98), point(0.9, ExitCriterion.MAX_PROB)),
    prompt_threshold=0.7,
)
BARE = replace(INFO, exit_layers=(), exit_thresholds=(), points=(), prompt_threshold=None)
UNCALIBRATED = replace(INFO, points=(), prompt_threshold=None)


def settings(wish: dict[str, Any], info: EngineInfo = INFO, **config: Any) -> Any:
    return exit_settings(ServerConfig(**config), EarlyExit.model_validate(wish), info)


def test_the_servers_defaults() -> None:
    plain = settings({})
    assert plain.mode is ExitMode.ADAPTIVE
    assert plain.thresholds is None
    assert plain.criterion is ExitCriterion.TWO_KEY
    other = settings({}, early_exit="off", exit_threshold=0.7, exit_min_layer=22)
    assert (other.mode, other.thresholds, other.min_layer) == (ExitMode.OFF, (0.7, 0.7), 22)


def test_a_draft_head_makes_lossless_the_default() -> None:
    drafts = replace(INFO, head_chances=((0.1, 0.5),) * 10)
    assert settings({}, drafts).mode is ExitMode.LOSSLESS
    assert settings({}, replace(BARE, head_chances=((0.1, 0.5),) * 10)).mode is ExitMode.LOSSLESS
    # Guesses are made outside of the device's loop, which is the faster way for most.
    on_device = replace(drafts, decides_on_device=True)
    assert settings({}, on_device).mode is ExitMode.ADAPTIVE
    assert settings({}, on_device, early_exit="lossless").mode is ExitMode.LOSSLESS
    assert settings({"quality": 0.95}, drafts).mode is ExitMode.ADAPTIVE
    assert settings({}, drafts, early_exit="adaptive").mode is ExitMode.ADAPTIVE
    assert settings({}, drafts, exit_threshold=0.7).mode is ExitMode.ADAPTIVE
    asked = EngineConfig(exit_quality=0.95)
    assert settings({}, drafts, engine=asked).mode is ExitMode.ADAPTIVE


def test_a_wish_about_exits_is_a_wish_to_exit() -> None:
    assert settings({"quality": 0.95}, early_exit="off").mode is ExitMode.ADAPTIVE
    assert settings({"prefill": False}, early_exit="off").mode is ExitMode.OFF
    assert settings({"mode": "lossless"}).mode is ExitMode.LOSSLESS


def test_quality_takes_the_loosest_point_that_promises_it() -> None:
    assert settings({"quality": 0.9}).thresholds == (0.95, 0.95)
    assert settings({"quality": 0.96}).thresholds == (0.98, 0.98)


def test_inputs_of_8_bits_may_keep_more_than_exits() -> None:
    info = replace(INFO, coarse_quality=0.985)
    found = settings({"quality": 0.985}, info)
    assert found.quality == 0.985
    assert set(found.thresholds) == {NEVER}
    assert settings({"quality": 0.98}, info) == settings({"quality": 0.98})
    with pytest.raises(InvalidRequest, match=r"0\.98 at best, inputs of 8 bits 0\.985"):
        settings({"quality": 0.99}, info)
    # Who names how K,V are made wants exits, and these have no promise.
    with pytest.raises(InvalidRequest, match="'project'"):
        settings({"quality": 0.9, "kv_fill": "copy"}, info)


def test_points_hold_for_the_fill_they_were_calibrated_with() -> None:
    exact = replace(point(0.98), kv_fill=KVFill.RECOMPUTE, thresholds=(0.8, 0.7))
    info = replace(INFO, points=(*INFO.points, exact))
    for fill, thresholds in (
        ("recompute", (0.8, 0.7)),
        ("project", (0.98, 0.98)),
        ("auto", (0.98, 0.98)),
    ):
        assert settings({"quality": 0.97, "kv_fill": fill}, info).thresholds == thresholds
    assert settings({"quality": 0.97}, info, kv_fill="recompute").thresholds == (0.8, 0.7)
    # Exact keys and values keep what projected ones promise.
    assert settings({"quality": 0.97, "kv_fill": "recompute"}).thresholds == (0.98, 0.98)


def test_a_deadline_starts_strict_and_may_fall_to_the_quality() -> None:
    made = settings({"quality": 0.95, "deadline_ms": 250})
    assert (made.thresholds, made.late_thresholds) == ((0.98, 0.98), (0.95, 0.95))
    assert made.deadline_s == 0.25
    floor = settings({"deadline_ms": 250}, engine=EngineConfig(quality_floor=0.95))
    assert floor.late_thresholds == (0.95, 0.95)


def test_other_criteria() -> None:
    assert settings({"criterion": "max_prob"}).thresholds == (0.9, 0.9)
    assert settings({"criterion": "top2_gap", "threshold": 0.8}).thresholds == (0.8, 0.8)
    assert settings({"criterion": "fixed", "min_layer": 24}).thresholds == (1.0, 1.0)


def test_without_exits_full_depth_is_all_there_is() -> None:
    assert settings({}, BARE).mode is ExitMode.OFF
    # Guesses can still be looked up in the text.
    assert settings({"mode": "lossless"}, BARE).mode is ExitMode.LOSSLESS


@pytest.mark.parametrize(
    ("wish", "info", "field", "said"),
    [
        ({"quality": 0.99}, INFO, "quality", "0.98 at best"),
        ({"quality": 0.9}, UNCALIBRATED, "quality", "no calibrated"),
        ({"quality": 0.95, "threshold": 0.5}, INFO, "threshold", "exclude"),
        ({"mode": "adaptive"}, BARE, "mode", "no exits"),
        ({"min_layer": 31}, INFO, "min_layer", "30 layers"),
        ({"prefill": True}, UNCALIBRATED, "prefill", "--exit-prefill-threshold"),
        ({"prefill": True, "kv_fill": "recompute"}, INFO, "kv_fill", "skip"),
        ({"criterion": "gate", "quality": 0.95}, INFO, "quality", "for 'max_prob', 'two_key', not"),
        (
            {"criterion": "gate", "quality": 0.9, "deadline_ms": 5},
            INFO,
            "quality",
            "not for 'gate'",
        ),
        ({"quality": 0.9, "kv_fill": "copy"}, INFO, "quality", "with 'kv_fill' 'project'"),
        ({"criterion": "entropy"}, INFO, "threshold", "no calibrated"),
        ({"deadline_ms": 5}, INFO, "deadline_ms", "--quality-floor"),
        ({"deadline_ms": 5, "quality": 0.99}, INFO, "quality", "out of reach"),
    ],
)
def test_refusals(wish: dict[str, Any], info: EngineInfo, field: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        settings(wish, info)
    assert caught.value.param == f"early_exit.{field}"


@pytest.mark.parametrize("early_exit", ["off", "adaptive", "lossless"])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("criterion", list(ExitCriterion))
@pytest.mark.parametrize("info", [INFO, BARE, UNCALIBRATED])
def test_a_start_is_refused_just_where_every_plain_request_would_be(
    info: EngineInfo, criterion: ExitCriterion, threshold: float | None, early_exit: str
) -> None:
    options: dict[str, Any] = {
        "early_exit": early_exit,
        "exit_threshold": threshold,
        "exit_criterion": criterion,
    }
    fault = default_fault(ServerConfig(**options), info)
    if fault is None:
        settings({}, info, **options)
        return
    assert f"--exit-criterion {criterion} " in fault
    with pytest.raises(InvalidRequest):
        settings({}, info, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_min_layer": 31}, "--exit-min-layer 31: this model has 30 layers"),
        (
            {"exit_threshold": 0.5, "engine": EngineConfig(exit_quality=0.95)},
            "--exit-quality and --exit-threshold exclude each other",
        ),
    ],
    ids=["min layer", "quality and threshold"],
)
def test_defaults_no_request_could_ask_for_are_refused(
    options: dict[str, Any], message: str
) -> None:
    assert default_fault(ServerConfig(**options), INFO) == message
    assert default_fault(ServerConfig(exit_min_layer=30, exit_threshold=0.5), INFO) is None


def test_who_leaves_whatever_it_costs() -> None:
    """Who names a rule and its bound, or says so; a server may say it for all."""
    assert not settings({}).always
    assert not settings({"threshold": 0.5}).always
    assert not settings({"criterion": "max_prob"}).always
    assert settings({"criterion": "max_prob", "threshold": 0.5}).always
    assert not settings({"criterion": "max_prob", "threshold": 0.5, "when": "pays"}).always
    assert settings({"when": "always"}).mode is ExitMode.ADAPTIVE
    assert settings({"when": "always"}).always
    assert settings({}, exit_when="always").always
    assert not settings({"when": "pays"}, exit_when="always").always
    for mode in ("off", "lossless"):
        with pytest.raises(InvalidRequest) as caught:
            settings({"mode": mode, "when": "always"})
        assert caught.value.param == "early_exit.when"
