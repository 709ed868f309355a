"""What a GPU has to be, and how its memory is shared out; the GPU is made up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.families import config_from_hf
from offramp.models.kv_cache import KVCache, bytes_per_block
from offramp.models.loading.formats import as_they_are
from offramp.models.loading.safetensors import load_weights
from offramp.models.runner import Runner
from offramp.models.transformer import Transformer
from offramp.server.config import GIB, EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.device import (
    blocks_that_fit,
    check_shape,
    decode_bytes,
    placement,
)
from offramp.server.errors import EngineConfigError

CUDA = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H100 whose memory is half used by weights."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * GIB, 80 * GIB))
    monkeypatch.setattr("offramp.server.engine.device.triton", object())
    return monkeypatch


@pytest.fixture
def shape(tiny_dir: Path) -> ModelConfig:
    return config_from_hf(tiny_dir)


def test_a_gpu_is_taken_where_there_is_one(gpu: pytest.MonkeyPatch) -> None:
    assert placement(EngineConfig()) == (CUDA, BF16)
    assert placement(EngineConfig(dtype="float16")) == (CUDA, torch.float16)
    assert placement(EngineConfig(device="cpu")) == (torch.device("cpu"), torch.float32)
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert placement(EngineConfig())[0].type == "cpu"


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineConfigError, match="torch sees no CUDA device; use --device cpu"):
        placement(EngineConfig(device="cuda"))


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_kernels_of_cpus_are_refused(gpu: pytest.MonkeyPatch, kernels: str) -> None:
    config = EngineConfig.model_validate({"device": "cuda", "kernels": kernels})
    with pytest.raises(EngineConfigError, match=f"--kernels {kernels} is for CPUs"):
        placement(config)


def test_a_gpu_without_triton_is_refused(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr("offramp.server.engine.device.triton", None)
    with pytest.raises(EngineConfigError, match=r"needs triton.*offramp\[gpu\].*--device cpu"):
        placement(EngineConfig())


def test_an_old_gpu_is_refused(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(EngineConfigError, match=r"this GPU has 7\.5; use --device cpu"):
        placement(EngineConfig())


@pytest.mark.parametrize("head_dim", [320, 33])
def test_heads_that_no_kernel_takes_are_refused(shape: ModelConfig, head_dim: int) -> None:
    odd = replace(shape, head_dim=head_dim)
    with pytest.raises(EngineConfigError, match=f"heads of {head_dim} do not fit"):
        check_shape(odd, CUDA)
    check_shape(odd, torch.device("cpu"))
    check_shape(shape, CUDA)


def test_keys_and_values_take_what_is_left(gpu: pytest.MonkeyPatch, shape: ModelConfig) -> None:
    """Nine tenths of 80, less 40 of weights and somewhat more than 1 of scratch."""
    config = EngineConfig()
    blocks = blocks_that_fit(shape, config, [], 2048, BF16, BF16, CUDA)
    taken = blocks * bytes_per_block(shape, config.block_size, BF16) / GIB
    assert 30.7 < taken < 31
    half = blocks_that_fit(
        shape, EngineConfig(gpu_memory_utilization=0.75), [], 2048, BF16, BF16, CUDA
    )
    assert blocks - half == pytest.approx(
        0.15 * 80 * GIB / bytes_per_block(shape, config.block_size, BF16), abs=1
    )
    said = blocks_that_fit(shape, EngineConfig(kv_cache_memory=2), [], 2048, BF16, BF16, CUDA)
    assert said * bytes_per_block(shape, config.block_size, BF16) == 2 * GIB


def test_a_model_of_no_size_takes_no_millions_of_blocks(shape: ModelConfig) -> None:
    small = replace(shape, num_layers=1, num_kv_heads=1, head_dim=2)
    blocks = blocks_that_fit(small, EngineConfig(), [], 2048, FP32, FP32, torch.device("cpu"))
    assert blocks == 2**20


def test_more_memory_than_there_is_says_what_to_change(tiny_dir: Path) -> None:
    config = EngineConfig(device="cpu", kv_cache_memory=2.0**30)
    with pytest.raises(EngineConfigError, match=r"no \d+ bytes: lower --kv-cache-memory"):
        build_engine(config, tiny_dir, model_name="tiny")


def test_a_share_that_leaves_nothing_is_refused(
    gpu: pytest.MonkeyPatch, shape: ModelConfig
) -> None:
    config = EngineConfig(gpu_memory_utilization=0.5)
    with pytest.raises(EngineConfigError, match=r"--gpu-memory-utilization gives 0; raise it"):
        blocks_that_fit(shape, config, [], 2048, BF16, BF16, CUDA)


def test_used_up_memory_says_what_to_change(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("offramp.server.engine.build.KVCache", full)
    with pytest.raises(EngineConfigError, match=r"lower --max-num-seqs.*or use --device cpu"):
        build_engine(EngineConfig(device="cpu"), tiny_dir, model_name="tiny")


def tensors(owner: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors an object holds, each once."""
    if isinstance(owner, Tensor):
        if owner.data_ptr() not in seen:
            seen.add(owner.data_ptr())
            yield owner
    elif hasattr(owner, "__dict__") and not isinstance(owner, Enum):
        for value in vars(owner).values():
            yield from tensors(value, seen)
    elif hasattr(owner, "__dataclass_fields__"):
        for field in fields(owner):  # type: ignore[arg-type]
            yield from tensors(getattr(owner, field.name), seen)
    elif isinstance(owner, list | tuple):
        for value in owner:
            yield from tensors(value, seen)


def test_the_estimate_is_what_decoding_holds(tiny_dir: Path, shape: ModelConfig) -> None:
    weights = load_weights(tiny_dir, shape, dtype=torch.float32)
    model = Transformer(shape, weights, (1, 3), 256, as_they_are())
    heads = [new_head(e, model, TrainOptions(width=8, router=8)) for e in (1, 3)]
    cache = KVCache(shape, 40, 8, torch.float32, model.device)
    runner = Runner(model, heads, cache, 8)
    loop = runner.device_loop(64, 32)
    known: set[int] = set()
    for owner in (model, runner.exits, cache):
        list(tensors(owner, known))
    held = [*tensors(loop._pass._scratch, known), *tensors(loop._pass._projections, known)]
    actual = sum(tensor.nbytes for tensor in held)
    assert decode_bytes(shape, heads, 64, torch.float32) == pytest.approx(actual, rel=0.1)
