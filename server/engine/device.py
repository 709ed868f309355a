"""Where the model runs, whether it can, and how much memory K,V may take there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offramp.kernels.backend import triton
from offramp.kernels.native import library
from offramp.models.config import ModelConfig
from offramp.models.exits.head import ExitHead
from offramp.models.kv_cache import bytes_per_block
from offramp.server.config import GIB, EngineConfig
from offramp.server.errors import EngineConfigError

# What CUDA, its libraries and recorded graphs take beside the tensors counted here.
_OVERHEAD = GIB
_ON_A_CPU = float(GIB)
_LEAST_CAPABILITY = (8, 0)
_LARGEST_HEAD = 256
# Blocks of a tiny model are so small that lists of those that fit would take more than they do.
_MOST_BLOCKS = 2**20
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_KV_DTYPES = _DTYPES | {"int16": torch.int16}


def placement(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype; on a CPU fp32, since bf16 there is slower and less exact.

    Raises EngineConfigError where the device, or its kernels, cannot serve.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        _check_gpu(config)
    auto = torch.float32 if name == "cpu" else torch.bfloat16
    return torch.device(name), _DTYPES.get(config.dtype, auto)


def native_kernels(config: EngineConfig) -> bool:
    """Whether the C kernels may serve; raises EngineConfigError if they must and cannot."""
    if config.kernels == "native" and library() is None:
        raise EngineConfigError(
            "--kernels native: they cannot be compiled here (see the warning); use --kernels auto"
        )
    return config.kernels != "torch"


def check_shape(shape: ModelConfig, device: torch.device) -> None:
    """Raise EngineConfigError if the device's kernels cannot take the model's sizes."""
    if device.type == "cuda" and (shape.head_dim % 2 or shape.head_dim > _LARGEST_HEAD):
        raise EngineConfigError(
            f"the model's heads of {shape.head_dim} do not fit the kernels of GPUs, which take "
            f"even sizes up to {_LARGEST_HEAD}; use --device cpu"
        )


def context_length(shape: ModelConfig, config: EngineConfig) -> int:
    """Longest prompt plus answer in tokens."""
    if config.max_model_len is None:
        return shape.max_position_embeddings
    if config.max_model_len > shape.max_position_embeddings:
        raise EngineConfigError(
            f"--max-model-len {config.max_model_len} is over the model's "
            f"{shape.max_position_embeddings} positions"
        )
    return config.max_model_len


def takes_coarse_inputs(config: EngineConfig, shape: ModelConfig, *, integers: bool) -> bool:
    """Whether layers, whose weights may be ``integers``, can take inputs of 8 bits.

    Raises EngineConfigError where they have to and cannot.
    """
    takes = integers and _fits_c_kernels(shape)
    if config.activation_dtype == "int8" and not takes:
        raise EngineConfigError(
            "--activation-dtype int8 is for weights that C kernels keep in 4 or 8 bits; use auto"
        )
    return takes


def kv_cache_dtype(
    config: EngineConfig,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    integers: bool,
) -> torch.dtype:
    """Number format of K and V beside a model of ``dtype``, whose weights may be ``integers``.

    Those are products of the C kernels, whose inputs have 16 bits: K and V then need no more.
    """
    if config.kv_cache_dtype == "auto" and integers and _fits_c_kernels(shape):
        return torch.int16
    wish = _KV_DTYPES.get(config.kv_cache_dtype, dtype)
    if wish is not dtype and (device.type != "cpu" or wish.itemsize != 2):
        raise EngineConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype} does not go with {dtype} on "
            f"{device.type}; use auto"
        )
    return wish


def _fits_c_kernels(shape: ModelConfig) -> bool:
    found = library()
    return found is not None and shape.head_dim % found.constant("HEAD_DIM_MULTIPLE") == 0


def blocks_that_fit(
    shape: ModelConfig,
    config: EngineConfig,
    heads: Sequence[ExitHead],
    max_model_len: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
    extra_layers: int = 0,
) -> int:
    """K,V blocks that fit beside a model of ``dtype``; at least one full-length request must.

    Weights have to be in place: on a GPU, K,V take what they leave of the share that
    --gpu-memory-utilization grants, unless --kv-cache-memory says how much.
    """
    flag = "--kv-cache-memory"
    if config.kv_cache_memory is not None:
        memory = config.kv_cache_memory * GIB
    elif device.type == "cpu":
        memory = _ON_A_CPU
    else:
        flag, memory = "--gpu-memory-utilization", _spare(shape, config, heads, dtype, device)
    size = bytes_per_block(shape, config.block_size, cache_dtype, extra_layers)
    needed = -(-max_model_len // config.block_size)
    if memory < needed * size:
        raise EngineConfigError(
            f"K,V for one request of {max_model_len} tokens need {needed * size / GIB:.3g} GiB, "
            f"{flag} gives {max(memory, 0) / GIB:.3g}; raise it or lower --max-model-len"
        )
    blocks = int(memory // size)
    if config.kv_cache_memory is None and device.type == "cpu":
        return min(blocks, max(needed, _MOST_BLOCKS))
    return blocks


def decode_bytes(
    shape: ModelConfig, heads: Sequence[ExitHead], rows: int, dtype: torch.dtype
) -> int:
    """Bytes that decoding ``rows`` sequences at once holds beside weights and K,V (DevicePass)."""
    wide = shape.hidden_size * 3 + shape.query_size + 2 * shape.kv_size + shape.intermediate_size
    logits = 4 * shape.vocab_size * (2 if heads else 1)
    maps = [
        2 * (shape.num_layers - head.layer) * shape.kv_size * shape.hidden_size for head in heads
    ]
    return rows * (wide * dtype.itemsize + logits) + sum(maps) * dtype.itemsize


def _spare(
    shape: ModelConfig,
    config: EngineConfig,
    heads: Sequence[ExitHead],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Bytes that K,V may take."""
    free, total = torch.cuda.mem_get_info(device)
    # A chunk of a prompt holds its widest activations several times over.
    chunk = 4 * config.max_num_batched_tokens * 3 * shape.intermediate_size * dtype.itemsize
    held = decode_bytes(shape, heads, config.max_num_seqs, dtype) + chunk + _OVERHEAD
    return config.gpu_memory_utilization * total - (total - free) - held


def _check_gpu(config: EngineConfig) -> None:
    if not torch.cuda.is_available():
        raise EngineConfigError("--device cuda: torch sees no CUDA device; use --device cpu")
    if config.kernels != "auto":
        raise EngineConfigError(
            f"--kernels {config.kernels} is for CPUs; a GPU's kernels are Triton's: use auto"
        )
    if triton is None:
        raise EngineConfigError(
            "--device cuda needs triton, which torch's CUDA builds bring; "
            "install offramp[gpu], or use --device cpu"
        )
    found = torch.cuda.get_device_capability()
    if found < _LEAST_CAPABILITY:
        raise EngineConfigError(
            f"--device cuda: kernels need compute capability 8.0 (A100) or more, this GPU has "
            f"{found[0]}.{found[1]}; use --device cpu"
        )
