"""Put an engine together: weights, exits, memory, scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from offramp.models.config import ModelConfig
from offramp.models.exits.deltas import (
    apply_deltas,
    delta_paths,
    load_deltas,
    tuned_fingerprint,
)
from offramp.models.exits.file import (
    ExitFile,
    ExitFileError,
    check_fit,
    load_exits,
    shipped_exits,
)
from offramp.models.exits.head import shared_heads
from offramp.models.families import config_from_hf
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import as_they_are, choose
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.runner import Runner
from offramp.models.sampling_params import ExitCriterion
from offramp.models.transformer import Transformer
from offramp.server.config import EngineConfig
from offramp.server.engine.blocks import BlockPool
from offramp.server.engine.debt import DebtLedger, RowPool
from offramp.server.engine.device import (
    EngineConfigError,
    blocks_that_fit,
    check_shape,
    context_length,
    native_kernels,
    placement,
)
from offramp.server.engine.engine import Engine
from offramp.server.engine.guard import LiveGuard
from offramp.server.engine.memory import SequenceMemory
from offramp.server.engine.online import OnlineThresholds
from offramp.server.engine.policy import ExitPolicy
from offramp.server.engine.process import keep_freed_memory, return_freed_memory
from offramp.server.engine.rebatching import Rebatching
from offramp.server.engine.request import EngineInfo
from offramp.server.engine.rides import hold_shares
from offramp.server.engine.scheduler import Limits, Scheduler
from offramp.server.engine.targets import ExitTargets
from offramp.server.engine.threads import ThreadGovernor
from offramp.server.engine.warm_up import measure_costs

__all__ = ["EngineConfigError", "build_engine"]

logger = logging.getLogger("offramp.engine")

# Promise to requests that name no quality, if the exits reach it.
_DEFAULT_QUALITY = 0.98
_SHARED = "shared:"


def build_engine(
    config: EngineConfig,
    folder: Path,
    *,
    model_name: str,
    progress: Callable[[int, int], None] | None = None,
    num_blocks: int | None = None,
    rides: bool | None = None,
    audit: bool = False,
) -> Engine:
    """Load the model in ``folder`` and make it ready to serve.

    ``progress`` is called with tensors loaded and total. For tests: ``num_blocks`` fixes the number
    of K,V blocks whatever their memory, ``rides`` whether decoding is decided on the device (None:
    on a GPU), and ``audit`` checks the invariants after every step. Raises EngineConfigError, or a
    ModelError of the loader or the exit file.
    """
    try:
        return _assemble(config, folder, model_name, progress, num_blocks, rides, audit=audit)
    except torch.OutOfMemoryError as error:
        raise EngineConfigError(
            "the GPU's memory is used up: lower --max-num-seqs, --max-num-batched-tokens or "
            "--gpu-memory-utilization, see what else uses the GPU, or use --device cpu"
        ) from error


def _assemble(
    config: EngineConfig,
    folder: Path,
    model_name: str,
    progress: Callable[[int, int], None] | None,
    num_blocks: int | None,
    rides: bool | None,  # noqa: FBT001 (as build_engine got it)
    *,
    audit: bool,
) -> Engine:
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = placement(config)
    shape = config_from_hf(folder)
    check_shape(shape, device)
    weights = load_weights(folder, shape, dtype=dtype, progress=progress)
    weights, own = _tuned(config.exits, weights)
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    exits = _exits(config.exits, own, weights, shape, dtype, device)
    max_model_len = context_length(shape, config)
    blocks = num_blocks or blocks_that_fit(shape, config, exits.heads, max_model_len, dtype, device)
    cache = KVCache(shape, blocks, config.block_size, dtype, device)
    heads = exits.heads
    exit_layers = tuple(head.layer for head in heads)
    rides = device.type == "cuda" if rides is None else rides
    if config.exit_hold == "throughput" and not rides:
        raise EngineConfigError("--exit-hold throughput is for GPUs; use --exit-hold latency")
    recipes = choose(config.weights, weights, native=native_kernels(config))
    recipes = as_they_are() if rides else recipes
    model = Transformer(shape, weights, exit_layers, max_model_len, recipes, consume=True)
    del weights
    return_freed_memory()
    num_rows = config.max_num_seqs * (1 + config.max_exit_debt) + config.max_num_batched_tokens
    info = _info(model_name, config, model, exits, cache, max_model_len)
    runner = Runner(model, heads, cache, num_rows, exits.vocab)
    scheduler = _scheduler(info, config, num_rows)
    measure_costs(runner, info, scheduler.policy.costs)
    if rides:
        _decode_on_device(runner, scheduler, info, config)
    guard = LiveGuard(scheduler.targets, config.exit_audit_rate)
    threads = None
    if device.type == "cpu":
        threads = ThreadGovernor(torch.get_num_threads(), torch.set_num_threads)
    return Engine(info, scheduler, runner, guard, threads, audit=audit)


def _decode_on_device(
    runner: Runner, scheduler: Scheduler, info: EngineInfo, config: EngineConfig
) -> None:
    """A loop that holds riders where that pays by the times measured here."""
    slots = info.max_num_seqs
    loop = runner.decode_loop(slots, -(-info.max_model_len // info.block_size))
    depths = (*info.exit_layers, info.num_layers)
    seconds = [(loop.seconds(i, 1), loop.seconds(i, slots)) for i in range(len(depths))]
    rides = config.exit_max_hold_ms / 1000 / sum(many for _, many in seconds)
    rebatching = None
    if config.exit_hold == "throughput":
        rebatching = Rebatching(seconds, slots, rides, depths)
    else:
        loop.hold(hold_shares(seconds, rides))
    scheduler.boarding.decode_on(loop, scheduler.targets, rebatching)


def _info(
    model_name: str,
    config: EngineConfig,
    model: Transformer,
    exits: ExitFile,
    cache: KVCache,
    max_model_len: int,
) -> EngineInfo:
    return EngineInfo(
        model_name=model_name,
        num_layers=model.config.num_layers,
        exit_layers=model.exit_layers,
        exit_thresholds=tuple(head.threshold for head in exits.heads),
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        max_num_seqs=config.max_num_seqs,
        dtype=str(model.dtype).removeprefix("torch."),
        eos_token_ids=model.config.eos_token_ids,
        points=exits.points,
        prompt_threshold=_prompt_threshold(config, exits),
        quality_floor=config.quality_floor,
    )


def _prompt_threshold(config: EngineConfig, exits: ExitFile) -> float | None:
    """Gate score at which prompt tokens may leave, None if nobody said."""
    if config.exit_prefill_threshold is not None:
        return config.exit_prefill_threshold
    found = [p.prefill_threshold for p in exits.points if p.prefill_threshold is not None]
    return max(found, default=None)


def _scheduler(info: EngineInfo, config: EngineConfig, num_rows: int) -> Scheduler:
    limits = Limits(
        info.num_layers,
        info.exit_layers,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_exit_debt,
        info.max_model_len,
    )
    rows = RowPool(num_rows)
    memory = SequenceMemory(
        BlockPool(info.num_blocks, config.block_size),
        rows,
        DebtLedger(rows, limits.num_segments),
        prefix_caching=config.enable_prefix_caching,
    )
    policy = ExitPolicy(limits.num_segments, config.exit_max_hold_ms / 1000)
    return Scheduler(limits, memory, policy, _targets(info, config))


def _targets(info: EngineInfo, config: EngineConfig) -> ExitTargets:
    """Thresholds for requests that name none; raises EngineConfigError for an empty promise."""
    points = [p for p in info.points if p.criterion is ExitCriterion.TWO_KEY]
    best = max((point.quality for point in points), default=None)
    quality = config.exit_quality
    for flag, wish in (("--exit-quality", quality), ("--quality-floor", config.quality_floor)):
        if wish is None:
            continue
        if best is None:
            raise EngineConfigError(
                f"{flag} {wish:g}: the exits have no calibrated operating points; make some with "
                "`offramp exits calibrate`"
            )
        if wish > best:
            raise EngineConfigError(
                f"{flag} {wish:g} is out of reach of these exits; the best calibrated is {best:g}"
            )
    if quality is None and best is not None:
        quality = min(_DEFAULT_QUALITY, best)
    online = None
    if config.exit_online_quality is not None:
        if config.exit_quality is not None:
            raise EngineConfigError("--exit-quality and --exit-online-quality exclude each other")
        online = OnlineThresholds(len(info.exit_layers), config.exit_online_quality)
        quality = None
    floor = config.quality_floor
    targets = ExitTargets(info.exit_thresholds, points, quality, floor, online)
    if floor is not None and targets.quality is not None and floor > targets.quality:
        raise EngineConfigError(
            f"--quality-floor {floor:g} is above the quality served, {targets.quality:g}; "
            "lower it or raise --exit-quality"
        )
    return targets


def _tuned(choice: str, weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """The weights with the deltas beside the exit file, if there are any, and their fingerprint."""
    own = fingerprint(weights)
    paths = [] if choice in {"auto", "none"} else delta_paths(Path(choice))
    if not paths:
        return weights, own
    deltas = load_deltas(paths, fingerprint=own)
    return apply_deltas(weights, deltas), tuned_fingerprint(deltas)


def _exits(
    choice: str,
    own: str,
    weights: dict[str, torch.Tensor],
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> ExitFile:
    if choice.startswith(_SHARED):
        heads = shared_heads(weights, shape, _layers(choice))
        return ExitFile(own, heads, {}, {})
    path = None
    if choice == "auto":
        path = shipped_exits(own)
    elif choice != "none":
        path = Path(choice)
        if not path.exists():
            raise ExitFileError(f"--exits {choice}: no such file")
    if path is None:
        return ExitFile(own, (), {}, {})
    file = load_exits(
        path, fingerprint=own, hidden_size=shape.hidden_size, dtype=dtype, device=device
    )
    check_fit(path, file, shape)
    return file


def _layers(choice: str) -> list[int]:
    try:
        return [int(layer) for layer in choice.removeprefix(_SHARED).split(",")]
    except ValueError:
        raise EngineConfigError(f"--exits {choice}: write layers as in shared:8,12") from None
