"""An engine put together from a folder: what it tells the front, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.kernels.native import library
from offramp.models.config import Weights
from offramp.models.exits.file import ExitFileError
from offramp.models.exits.points import OperatingPoint
from offramp.models.runner import Runner
from offramp.models.sampling_params import (
    ExitCriterion,
    ExitMode,
    ExitSettings,
    KVFill,
    SamplingParams,
)
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine, exit_thresholds
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import GenerationRequest
from offramp.server.errors import EngineConfigError

from .test_engine_machine import host_of


def build(folder: Path, **options: Any) -> Engine:
    config = EngineConfig(device="cpu", max_num_seqs=4, **options)
    return build_engine(config, folder, model_name="tiny")


def test_the_front_learns_what_was_built(tiny_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = EngineConfig(device="cpu", max_num_seqs=4, max_model_len=100)
    engine = build_engine(
        config, tiny_dir, model_name="tiny", progress=lambda done, total: seen.append((done, total))
    )
    info = engine.info
    assert (info.model_name, info.num_layers, info.max_model_len) == ("tiny", 4, 100)
    assert info.dtype == "float32"
    assert info.exit_layers == info.exit_thresholds == ()
    assert info.num_blocks * info.block_size >= 100
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_built_engine_answers(tiny_dir: Path) -> None:
    engine = build(tiny_dir, max_model_len=64)
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    request = GenerationRequest("a", (5, 6, 7), sampling)
    done = run_all(engine, [request], concurrency=1)
    assert len(done[0].token_ids) == 5
    assert done[0].exit_layers == [4] * 5


@pytest.mark.parametrize("kernels", ["auto", "native", "torch"])
def test_both_kinds_of_kernels_give_the_same_answer(tiny_dir: Path, kernels: str) -> None:
    if kernels == "native" and library() is None:
        pytest.skip("no C kernels on this machine")
    engine = build(tiny_dir, max_model_len=64, weights=Weights.FP32, kernels=kernels)
    runner = host_of(engine).runner
    assert isinstance(runner, Runner)
    native = [segment.is_native for segment in runner.model.segments]
    assert native == [kernels != "torch" and library() is not None] * len(native)
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    request = GenerationRequest("a", tuple(range(5, 25)), sampling)
    reference = build(tiny_dir, max_model_len=64, weights=Weights.FP32, kernels="torch")
    expected = run_all(reference, [request], concurrency=1)
    assert run_all(engine, [request], concurrency=1)[0].token_ids == expected[0].token_ids


@pytest.mark.parametrize("own", ["float16", "int16"])
@pytest.mark.parametrize("fill", [KVFill.PROJECT, KVFill.COPY, KVFill.RECOMPUTE])
def test_keys_and_values_may_take_half_the_memory(tiny_dir: Path, fill: KVFill, own: str) -> None:
    """Every way of filling them included."""
    if library() is None:
        pytest.skip("no C kernels on this machine")
    config = EngineConfig(max_model_len=64, exits="shared:1,3", device="cpu")
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    leave = ExitSettings(ExitMode.ADAPTIVE, thresholds=(0.0, 0.0), kv_fill=fill)
    found = []
    for dtype in ("auto", own):
        changed = config.model_copy(update={"kv_cache_dtype": dtype})
        engine = build_engine(
            changed, tiny_dir, model_name="t", every_exit=True, check_invariants=True
        )
        requests = [
            GenerationRequest(str(n), tuple(range(5, 25 + n)), sampling, exits)
            for n, exits in enumerate((ExitSettings(), leave))
        ]
        done = run_all(engine, requests, concurrency=2)
        assert len({*done[1].exit_layers}) > 1
        found.append((engine.info, [item.token_ids for item in done]))
    (whole, expected), (half, got) = found
    assert (whole.cache_dtype, half.cache_dtype) == ("float32", own)
    assert half.num_blocks > 1.7 * whole.num_blocks
    same = [
        a == b
        for own, other in zip(got, expected, strict=True)
        for a, b in zip(own, other, strict=True)
    ]
    assert sum(same) >= 20


def in_eight_bits(tiny_dir: Path, folder: Path) -> Path:
    """The tiny model with matrices of its layers that 8 bits can hold."""
    shutil.copytree(tiny_dir, folder, dirs_exist_ok=True)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if ".layers." in name and tensor.dim() == 2:
                levels = torch.randint(-127, 128, tensor.shape)
                levels[:, ::32] = 127
                tensors[name] = levels / 2**12
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "int16"),
        ({"kv_cache_dtype": "float32"}, "float32"),
        ({"weights": Weights.FP32}, "float32"),
        ({"kernels": "torch"}, "float32"),
    ],
)
def test_keys_and_values_are_integers_beside_weights_that_are(
    tiny_dir: Path, tmp_path: Path, options: dict[str, Any], found: str
) -> None:
    if library() is None:
        pytest.skip("no C kernels on this machine")
    folder = in_eight_bits(tiny_dir, tmp_path)
    assert build(folder, max_model_len=64, **options).info.cache_dtype == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "torch"}, "--kv-cache-dtype float16 needs the C kernels"),
        (
            {"kernels": "torch", "kv_cache_dtype": "int16"},
            "--kv-cache-dtype int16 needs the C kernels",
        ),
        ({"kv_cache_dtype": "float32", "dtype": "bfloat16"}, "does not go with torch.bfloat16"),
    ],
)
def test_formats_of_keys_and_values_that_cannot_be(
    tiny_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineConfigError, match=message):
        build(tiny_dir, **{"max_model_len": 64, "kv_cache_dtype": "float16", **options})


@pytest.mark.parametrize("options", [{}, {"weights": Weights.FP16}, {"kernels": "torch"}])
def test_inputs_of_8_bits_are_for_weights_in_integers(
    tiny_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = in_eight_bits(tiny_dir, tmp_path) if options else tiny_dir
    with pytest.raises(EngineConfigError, match="--activation-dtype int8 is for weights"):
        build(folder, max_model_len=64, activation_dtype="int8", **options)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, True),
        ({"activation_dtype": "int16"}, False),
        ({"activation_dtype": "int8"}, False),
        ({"weights": Weights.FP16}, False),
        ({"exits": "none"}, False),
    ],
    ids=str,
)
def test_who_may_choose_inputs_of_8_bits(
    smollm2_dir: Path, options: dict[str, Any], *, allowed: bool
) -> None:
    """Requests, where the weights are in integers and it was calibrated what that keeps."""
    if library() is None:
        pytest.skip("no C kernels on this machine")
    info = build(smollm2_dir, max_model_len=64, kv_cache_memory=0.1, **options).info
    assert (info.coarse_quality is not None) == allowed
    assert info.coarse == (options.get("activation_dtype") == "int8")


def test_kernels_that_must_and_cannot_be_compiled_are_refused(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.server.engine.device.library", lambda: None)
    with pytest.raises(EngineConfigError, match="--kernels native: they cannot be compiled here"):
        build(tiny_dir, kernels="native")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 4096}, "--max-model-len 4096 is over the model's 2048"),
        ({"kv_cache_memory": 0.0001}, r"--kv-cache-memory gives 0\.0001; raise it"),
    ],
    ids=["context", "memory"],
)
def test_what_does_not_fit_is_refused(
    tiny_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineConfigError, match=message):
        build(tiny_dir, **options)


def test_exits_that_are_not_there_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExitFileError, match="no such file"):
        build(tiny_dir, exits=str(tmp_path / "none.safetensors"))


def test_a_floor_above_the_quality_served_is_refused(tiny_dir: Path) -> None:
    def point(quality: float) -> OperatingPoint:
        scores = (quality, quality)
        kinds = (ExitCriterion.TWO_KEY, KVFill.PROJECT)
        return OperatingPoint(quality, 0.95, *kinds, scores, quality, 0.1, 3.0, 10, 100)

    bare = build(tiny_dir, max_model_len=64).info
    info = replace(bare, exit_layers=(2, 3), points=(point(0.95), point(0.98)))
    low, high = EngineConfig(exit_quality=0.95), EngineConfig(exit_quality=0.96)
    with pytest.raises(EngineConfigError, match=r"0\.98 is above the quality served, 0\.95"):
        exit_thresholds(info, low.model_copy(update={"quality_floor": 0.98}))
    same = exit_thresholds(info, low.model_copy(update={"quality_floor": 0.95}))
    assert same.quality == 0.95
    # What is served is the point's promise, which may be above the quality asked for.
    above = exit_thresholds(info, high.model_copy(update={"quality_floor": 0.98}))
    assert above.quality == 0.98
