"""Put an engine together: weights, exits, memory, decoders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from offramp.models.config import ModelConfig
from offramp.models.costs import CostModel, profile_costs
from offramp.models.cpu import ThreadGovernor, keep_freed_memory, return_freed_memory
from offramp.models.deciding import Decider
from offramp.models.device_loop import DeviceLoop, profile_device
from offramp.models.drafting import Drafter
from offramp.models.errors import ModelError
from offramp.models.exits.calibration import OnlineThresholds
from offramp.models.exits.decision_heads import (
    DecisionFile,
    DecisionFileError,
    DecisionTask,
    load_decision_heads,
    shipped_decision_heads,
)
from offramp.models.exits.deltas import (
    apply_deltas,
    delta_paths,
    load_deltas,
    tuned_fingerprint,
)
from offramp.models.exits.draft_head import (
    DraftFile,
    DraftFileError,
    load_draft_head,
    shipped_draft_head,
)
from offramp.models.exits.file import (
    ExitFile,
    ExitFileError,
    check_fit,
    load_exits,
    shipped_exits,
)
from offramp.models.exits.head import shared_heads
from offramp.models.exits.points import points_under
from offramp.models.families import config_from_hf, sampling_defaults
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import (
    RoundedWeights,
    as_they_are,
    choose,
    keeps_integers,
    rounded,
)
from offramp.models.loading.safetensors import StoredWeights, fingerprint
from offramp.models.runner import Runner
from offramp.models.sampling_params import DEFAULT_CRITERION, KVFill
from offramp.models.step import StepRunner
from offramp.models.transformer import Transformer
from offramp.server.config import EngineConfig
from offramp.server.engine.admission import Admission
from offramp.server.engine.batch_delay import BatchDelay
from offramp.server.engine.blocks import BlockPool, SequenceMemory
from offramp.server.engine.decisions import Decisions
from offramp.server.engine.decoder import Decoder
from offramp.server.engine.device import (
    blocks_that_fit,
    check_shape,
    context_length,
    kv_cache_dtype,
    native_kernels,
    placement,
    takes_coarse_inputs,
)
from offramp.server.engine.device_decoder import DeviceDecoder
from offramp.server.engine.engine import Engine
from offramp.server.engine.governor import ExitGovernor, device_patience
from offramp.server.engine.guard import LiveGuard
from offramp.server.engine.host_decoder import HostDecoder
from offramp.server.engine.kv_debt import DebtLedger, RowPool
from offramp.server.engine.request import MOST_STATES, DecisionInfo, EngineInfo
from offramp.server.engine.thresholds import ExitThresholds
from offramp.server.errors import EngineConfigError

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
    on_device: bool | None = None,
    every_exit: bool = False,
    check_invariants: bool = False,
    server: int | None = None,
) -> Engine:
    """Load the model in ``folder`` and make it ready to serve.

    ``progress`` is called with tensors loaded and total. ``every_exit`` lets tokens leave wherever
    their score allows it, whether or not that pays, so that quality can be judged apart from speed.
    ``server`` is the process that speaks HTTP for this one, if that is another.
    For tests: ``num_blocks`` fixes the number of K,V blocks whatever their memory, ``on_device``
    whether decoding is decided on the device (None: on a GPU), and ``check_invariants`` checks them
    after every step.
    Raises EngineConfigError, or a ModelError of the loader or the exit file.
    """
    try:
        runner, info = _load(config, folder, model_name, progress, num_blocks, on_device=on_device)
        loop = None
        if _decides_on_device(runner.model.device, on_device=on_device):
            loop = runner.device_loop(info.max_num_seqs, -(-info.max_model_len // info.block_size))
        thresholds = exit_thresholds(info, config)
        made = assemble(config, info, runner, thresholds, loop, every_exit=every_exit)
    except torch.OutOfMemoryError as error:
        raise EngineConfigError(
            "the GPU's memory is used up: lower --max-num-seqs, --max-num-batched-tokens or "
            "--gpu-memory-utilization, see what else uses the GPU, or use --device cpu"
        ) from error
    except MemoryError as error:
        raise EngineConfigError(f"{error}: lower --kv-cache-memory") from error
    if runner.model.device.type == "cpu":
        # After the profile: costs are those of all threads.
        runner.threads = ThreadGovernor(torch.get_num_threads(), torch.set_num_threads, server)
    made.check_invariants = check_invariants
    return made


def assemble(
    config: EngineConfig,
    info: EngineInfo,
    runner: StepRunner,
    thresholds: ExitThresholds,
    loop: DeviceLoop | None = None,
    *,
    every_exit: bool = False,
) -> Engine:
    """The engine over a runner and, where decoding is decided on the device, a device loop."""
    rows = RowPool(hidden_rows(info))
    memory = SequenceMemory(
        BlockPool(info.num_blocks, info.block_size),
        rows,
        DebtLedger(rows, info.num_segments),
        prefix_caching=config.enable_prefix_caching,
    )
    admission = Admission(info, memory)
    max_hold = config.exit_max_hold_ms / 1000
    most = min(info.max_num_seqs, info.num_blocks)
    coarse = info.coarse_quality is not None and not every_exit
    costs = profile_costs(runner, info.num_segments, most, drafts=info.draft_head, coarse=coarse)
    if coarse and info.coarse_quality is not None:
        pays = thresholds.allow_coarse(info.coarse_quality, costs.coarse_gain)
        who = f"adaptive requests up to {info.coarse_quality:g}" if pays else "no request"
        gain = costs.coarse_gain
        logger.info("inputs of 8 bits make layers %.2f times as fast; %s will take them", gain, who)
    governor = ExitGovernor(
        costs, thresholds, max_hold, every_exit=every_exit, head_chances=info.head_chances
    )
    decoders: list[Decoder] = [
        HostDecoder(info, admission, memory, governor, runner, alone=loop is None)
    ]
    if loop is not None:
        costs = profile_device(loop, info.num_segments, info.max_num_seqs)
        delay = None
        if config.exit_hold == "throughput":
            delay = _batch_delay(info, costs, max_hold)
        governor = ExitGovernor(costs, thresholds, max_hold, delay, every_exit=every_exit)
        decoders.insert(0, DeviceDecoder(info, admission, memory, governor, loop))
    guard = LiveGuard(thresholds, config.exit_audit_rate)
    decisions = Decisions(info, memory, runner)
    return Engine(info, admission, memory, decoders, decisions, guard)


def runner_of(engine: Engine) -> Runner:
    """The runner of an engine that `build_engine` made."""
    host = engine.decoders[-1]
    assert isinstance(host, HostDecoder)
    assert isinstance(host.runner, Runner)
    return host.runner


def hidden_rows(info: EngineInfo) -> int:
    """Rows of the hidden buffer: a step's, those owed layers, and states for the draft head."""
    held = 1 + info.max_exit_debt + (2 * MOST_STATES if info.draft_head else 0)
    return info.max_num_seqs * held + info.max_num_batched_tokens


def exit_thresholds(info: EngineInfo, config: EngineConfig) -> ExitThresholds:
    """Thresholds for requests that name none; raises EngineConfigError for an empty promise."""
    # Requests that name no fill may have any of these.
    points = points_under(info.points, DEFAULT_CRITERION, KVFill.AUTO)
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
    thresholds = ExitThresholds(info.exit_thresholds, points, quality, floor, online)
    if floor is not None and thresholds.quality is not None and floor > thresholds.quality:
        raise EngineConfigError(
            f"--quality-floor {floor:g} is above the quality served, {thresholds.quality:g}; "
            "lower it or raise --exit-quality"
        )
    return thresholds


def _load(
    config: EngineConfig,
    folder: Path,
    model_name: str,
    progress: Callable[[int, int], None] | None,
    num_blocks: int | None,
    *,
    on_device: bool | None,
) -> tuple[Runner, EngineInfo]:
    """Weights, exits and K,V pages in place."""
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = placement(config)
    shape = config_from_hf(folder)
    check_shape(shape, device)
    stored = StoredWeights(folder, shape, dtype=dtype, progress=progress)
    weights, own = tuned_weights(config.exits, stored)
    if device.type == "cpu":
        native, quantized = native_kernels(config), stored.quantized
        weights = rounded(config.weights, weights, quantized=quantized, native=native)
    else:
        weights = {name: tensor.to(device) for name, tensor in weights.items()}
    exits = exit_file(config.exits, own, weights, shape, dtype, device)
    heads, max_len = exits.heads, context_length(shape, config)
    on_device = _decides_on_device(device, on_device=on_device)
    drafts = draft_file(config.draft_head, own, shape, on_device=on_device)
    decisions = decision_file(config.decision_heads, own, shape, device)
    tasks = decisions.tasks if decisions else {}
    cuts = decisions.layers[:-1] if tasks and decisions else _cuts(shape.num_layers)
    extra = 0 if drafts is None else 1
    recipes = choose(config.weights, weights, native=native_kernels(config))
    recipes = as_they_are() if on_device else recipes
    integers = keeps_integers(recipes, weights)
    takes_coarse = takes_coarse_inputs(config, shape, integers=integers)
    cache_dtype = kv_cache_dtype(config, shape, dtype, device, integers=integers)
    blocks = num_blocks or blocks_that_fit(
        shape, config, heads, max_len, dtype, cache_dtype, device, extra
    )
    if config.exit_hold == "throughput" and not on_device:
        raise EngineConfigError("--exit-hold throughput is for GPUs; use --exit-hold latency")
    layers = tuple(head.layer for head in heads)
    model = Transformer(shape, weights, layers, max_len, recipes)
    if isinstance(weights, RoundedWeights) and weights.changed:
        _tell_of_rounding(weights, config, exits)
    del weights
    return_freed_memory()
    cache = _pages(config, model, blocks, cache_dtype, extra)
    info = EngineInfo(
        model_name=model_name,
        num_layers=shape.num_layers,
        exit_layers=layers,
        exit_thresholds=tuple(head.threshold for head in heads),
        vocab_size=shape.vocab_size,
        max_model_len=max_len,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        max_num_seqs=config.max_num_seqs,
        dtype=str(model.dtype).removeprefix("torch."),
        cache_dtype=str(cache.pages.dtype).removeprefix("torch."),
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_exit_debt=config.max_exit_debt,
        eos_token_ids=shape.eos_token_ids,
        points=exits.points,
        prompt_threshold=_prompt_threshold(config, exits),
        quality_floor=config.quality_floor,
        head_chances=() if drafts is None else drafts.chances,
        decides_on_device=on_device,
        decision_layers=cuts,
        decision_tasks={name: _decision_info(task) for name, task in tasks.items()},
        sampling_defaults=sampling_defaults(folder) if config.generation_config == "auto" else {},
        hidden_size=shape.hidden_size,
        coarse=config.activation_dtype == "int8",
        coarse_quality=_coarse_quality(config, exits) if takes_coarse else None,
    )
    rows = hidden_rows(info)
    drafter = None if drafts is None else Drafter(model, drafts.head, cache, rows)
    decider = Decider(model, cache, cuts, tasks)
    return Runner(model, heads, cache, rows, exits.vocab, drafter, decider), info


def _tell_of_rounding(weights: RoundedWeights, config: EngineConfig, exits: ExitFile) -> None:
    told = "%d matrices are rounded to at most %s, by up to %.2g of their norm%s"
    spoilt = ""
    if exits.points and exits.weights is not config.weights:
        spoilt = f"; what exits promise was found with --weights {exits.weights}"
    logger.warning(told, len(weights.changed), weights.form, weights.error, spoilt)


def _pages(
    config: EngineConfig, model: Transformer, blocks: int, dtype: torch.dtype, extra_layers: int
) -> KVCache:
    """K,V of the model; they are used at once, to make its LM head faster."""
    is_native = all(each.is_native for each in model.segments)
    if dtype is not model.dtype and not is_native:
        raise EngineConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype} needs the C kernels; use auto"
        )
    size, device = config.block_size, model.device
    cache = KVCache(model.config, blocks, size, dtype, device, extra_layers, by_block=is_native)
    model.screen_head(cache)
    return_freed_memory()
    return cache


def _decides_on_device(device: torch.device, *, on_device: bool | None) -> bool:
    return device.type == "cuda" if on_device is None else on_device


def _batch_delay(info: EngineInfo, costs: CostModel, max_hold: float) -> BatchDelay:
    patience = device_patience(costs, info.max_num_seqs, max_hold)
    return BatchDelay(costs, patience, (*info.exit_layers, info.num_layers))


def _prompt_threshold(config: EngineConfig, exits: ExitFile) -> float | None:
    """Gate score at which prompt tokens may leave, None without one."""
    if config.exit_prefill_threshold is not None:
        return config.exit_prefill_threshold
    found = [p.prefill_threshold for p in exits.points if p.prefill_threshold is not None]
    return max(found, default=None)


def _coarse_quality(config: EngineConfig, exits: ExitFile) -> float | None:
    """What inputs of 8 bits promise, where requests may have them."""
    if config.activation_dtype != "auto" or exits.coarse is None:
        return None
    return exits.coarse.quality


def tuned_weights(
    choice: str, weights: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, torch.Tensor], str]:
    """The weights with the deltas beside the exit file, if there are any, and their fingerprint."""
    own = fingerprint(weights)
    paths = [] if choice in {"auto", "none"} else delta_paths(Path(choice))
    if not paths:
        return weights, own
    deltas = load_deltas(paths, fingerprint=own)
    return apply_deltas(weights, deltas), tuned_fingerprint(deltas)


def exit_file(
    choice: str,
    own: str,
    weights: Mapping[str, torch.Tensor],
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> ExitFile:
    """The exits that --exits names, of the model whose fingerprint is ``own``."""
    if choice.startswith(_SHARED):
        heads = shared_heads(weights, shape, _layers(choice))
        return ExitFile(own, heads, {}, {})
    path = _chosen("--exits", choice, own, shipped_exits, ExitFileError)
    if path is None:
        return ExitFile(own, (), {}, {})
    file = load_exits(
        path, fingerprint=own, hidden_size=shape.hidden_size, dtype=dtype, device=device
    )
    check_fit(path, file, shape)
    return file


def draft_file(choice: str, own: str, shape: ModelConfig, *, on_device: bool) -> DraftFile | None:
    """The draft head that --draft-head names, None without one.

    Where decoding is decided on the device, only one that is named: guesses are made outside of its
    loop.
    """
    if on_device and choice == "auto":
        return None
    path = _chosen("--draft-head", choice, own, shipped_draft_head, DraftFileError)
    return None if path is None else load_draft_head(path, fingerprint=own, config=shape)


def decision_file(
    choice: str, own: str, shape: ModelConfig, device: torch.device
) -> DecisionFile | None:
    """The heads that --decision-heads names, None without any."""
    path = _chosen("--decision-heads", choice, own, shipped_decision_heads, DecisionFileError)
    if path is None:
        return None
    return load_decision_heads(path, fingerprint=own, config=shape, device=device)


def _cuts(num_layers: int) -> tuple[int, ...]:
    """Where decisions without heads cut the stack, so that a long input stalls nobody."""
    step = max(1, num_layers // 5)
    return tuple(range(step, num_layers, step))


def _decision_info(task: DecisionTask) -> DecisionInfo:
    heads = task.heads
    layers = heads.layers[:-1]
    return DecisionInfo(task.wording, task.labels, task.labelled, layers, heads.points, task.scale)


def _chosen(
    flag: str,
    choice: str,
    own: str,
    shipped: Callable[[str], Path | None],
    failure: type[ModelError],
) -> Path | None:
    """The file an option names; ``shipped`` finds the one for the fingerprint ``own``."""
    if choice == "auto":
        return shipped(own)
    if choice == "none":
        return None
    if not Path(choice).exists():
        raise failure(f"{flag} {choice}: no such file")
    return Path(choice)


def _layers(choice: str) -> list[int]:
    try:
        return [int(layer) for layer in choice.removeprefix(_SHARED).split(",")]
    except ValueError:
        raise EngineConfigError(f"--exits {choice}: write layers as in shared:8,12") from None
