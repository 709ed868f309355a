"""Put an engine together: weights, exits, memory, scheduler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.models.config import ModelConfig
from offramp.models.exit_head import ExitHead
from offramp.models.exits.file import ExitFileError, load_exits, shipped_exits
from offramp.models.families import config_from_hf
from offramp.models.kv_cache import KVCache, bytes_per_block
from offramp.models.loader import fingerprint, load_weights
from offramp.models.runner import Runner
from offramp.models.transformer import Transformer
from offramp.server.engine.blocks import BlockPool
from offramp.server.engine.debt import DebtLedger, RowPool
from offramp.server.engine.engine import Engine
from offramp.server.engine.memory import SlotMemory
from offramp.server.engine.policy import ExitPolicy
from offramp.server.engine.request import EngineInfo
from offramp.server.engine.scheduler import Limits, Scheduler

logger = logging.getLogger("offramp.engine")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Sizes and choices of one engine.

    ``kv_cache_gib`` is the memory for K,V pages; ``num_blocks`` fixes their number instead (tests).
    ``exits`` is "auto" (the file shipped for this model, if any), "none" or a path. ``max_hold_s``
    bounds the wait for company at a segment. ``threads`` 0 leaves torch's choice.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 32
    kv_cache_gib: float = 1.0
    num_blocks: int | None = None
    prefix_caching: bool = True
    exits: str = "auto"
    max_debt: int = 16
    max_hold_s: float = 0.05
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    audit: bool = False


class EngineConfigError(Exception):
    """The engine cannot be built as asked; the message says what would work."""


def build_engine(
    folder: Path,
    options: EngineOptions,
    *,
    model_name: str,
    progress: Callable[[int, int], None] | None = None,
) -> Engine:
    """Load the model in ``folder`` and make it ready to serve.

    ``progress`` is called with tensors loaded and total. Raises EngineConfigError, or the loader's
    and exit file's own errors.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = _placement(options)
    config = config_from_hf(folder)
    weights = load_weights(folder, config, dtype=dtype, progress=progress)
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    heads = _exit_heads(options.exits, weights, config, dtype, device)
    max_model_len = _context(config, options)
    num_blocks = _num_blocks(config, options, max_model_len, dtype)
    cache = KVCache(config, num_blocks, options.block_size, dtype, device)
    exit_layers = tuple(head.layer for head in heads)
    model = Transformer(config, weights, exit_layers, max_model_len)
    num_rows = options.max_num_seqs * (1 + options.max_debt) + options.max_num_batched_tokens
    runner = Runner(model, heads, cache, num_rows)
    info = EngineInfo(
        model_name=model_name,
        num_layers=config.num_layers,
        exit_layers=exit_layers,
        exit_thresholds=tuple(head.threshold for head in heads),
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_num_seqs=options.max_num_seqs,
        dtype=str(dtype).removeprefix("torch."),
        eos_token_ids=config.eos_token_ids,
    )
    return Engine(info, _scheduler(info, options, num_rows), runner, audit=options.audit)


def _scheduler(info: EngineInfo, options: EngineOptions, num_rows: int) -> Scheduler:
    limits = Limits(
        info.num_layers,
        info.exit_layers,
        info.exit_thresholds,
        options.max_num_seqs,
        options.max_num_batched_tokens,
        options.max_debt,
    )
    rows = RowPool(num_rows)
    memory = SlotMemory(
        BlockPool(info.num_blocks, options.block_size),
        rows,
        DebtLedger(rows, limits.num_segments),
        prefix_caching=options.prefix_caching,
    )
    return Scheduler(limits, memory, ExitPolicy(limits.num_segments, options.max_hold_s))


def _placement(options: EngineOptions) -> tuple[torch.device, torch.dtype]:
    """Device and dtype; on a CPU fp32, since bf16 there is slower and less exact."""
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineConfigError("--device cuda: torch sees no CUDA device; use --device cpu")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    auto = torch.float32 if name == "cpu" else torch.bfloat16
    return torch.device(name), dtypes.get(options.dtype, auto)


def _exit_heads(
    choice: str,
    weights: dict[str, torch.Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[ExitHead, ...]:
    if choice == "none":
        return ()
    own = fingerprint(weights)
    path = shipped_exits(own) if choice == "auto" else Path(choice)
    if path is None:
        return ()
    if choice != "auto" and not path.exists():
        raise ExitFileError(f"--exits {choice}: no such file")
    file = load_exits(
        path, fingerprint=own, hidden_size=config.hidden_size, dtype=dtype, device=device
    )
    return file.heads


def _context(config: ModelConfig, options: EngineOptions) -> int:
    """Longest prompt plus answer in tokens."""
    if options.max_model_len is None:
        return config.max_position_embeddings
    if options.max_model_len > config.max_position_embeddings:
        raise EngineConfigError(
            f"--max-model-len {options.max_model_len} is over the model's "
            f"{config.max_position_embeddings} positions"
        )
    return options.max_model_len


def _num_blocks(
    config: ModelConfig, options: EngineOptions, max_model_len: int, dtype: torch.dtype
) -> int:
    """Blocks that fit the memory for K,V; at least one full-length request must."""
    size = bytes_per_block(config, options.block_size, dtype)
    blocks = options.num_blocks or int(options.kv_cache_gib * 2**30) // size
    needed = -(-max_model_len // options.block_size)
    if blocks < needed:
        raise EngineConfigError(
            f"K,V for one request of {max_model_len} tokens need {needed * size / 2**30:.2f} GiB, "
            f"--kv-cache-memory gives {blocks * size / 2**30:.2f}; raise it or lower --max-model-len"
        )
    return blocks


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
