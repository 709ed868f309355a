"""What an engine bench measures, read from the command line and checked against the shape."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offramp.kernels.backend import triton
from offramp.models.config import ModelConfig
from offramp.models.shapes import MODEL_SHAPES
from offramp.server.bench.engine.errors import EngineBenchError
from offramp.server.bench.engine.trace import ExitTrace, read_trace
from offramp.server.bench.formats import DTYPES

WARM_UP = 16
"""Rides before those that are measured: until then slots have spread over the segments."""
BLOCK = 32
"""Tokens in a K,V block, as the server has them."""

# CUDA's libraries, recorded graphs, and what bandwidth is measured with.
_OVERHEAD = 4 << 30
# Models of fewer channels get exits in proportion to them.
_NARROW = 256


@dataclass(frozen=True, slots=True)
class Options:
    """All that shapes a run.

    ``hold`` is latency, throughput or off. ``tokens`` are measured rides a round, so the tokens
    that a slot makes which nobody holds, and the rows of the trace. ``width`` and ``gate`` are
    inner widths of an exit's adapter and gate, ``vocab`` the tokens that exits tell apart (None:
    all).
    """

    shape: str
    config: ModelConfig
    exits: tuple[int, ...]
    trace: ExitTrace
    batches: tuple[int, ...]
    context: int
    tokens: int
    rounds: int
    device: torch.device
    dtype: torch.dtype
    hold: str
    seed: int
    width: int
    gate: int
    vocab: int | None

    @property
    def slots(self) -> int:
        """Slots of the loops: the largest batch."""
        return max(self.batches)

    @property
    def length(self) -> int:
        """Positions that a slot may reach; one ride more than is read is under way at the end."""
        return self.context + WARM_UP + self.tokens + 2

    @property
    def blocks(self) -> int:
        """K,V blocks of a slot."""
        return -(-self.length // BLOCK)


def read_options(args: argparse.Namespace) -> Options:
    """Raises EngineBenchError."""
    config = MODEL_SHAPES.get(args.model_shape)
    if config is None:
        known = ", ".join(MODEL_SHAPES)
        raise EngineBenchError(f"--model-shape {args.model_shape}: there are {known}")
    exits = _exits(args.exits, config.num_layers)
    device = _device(args.device)
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    narrow = config.hidden_size < _NARROW
    options = Options(
        shape=args.model_shape,
        config=config,
        exits=exits,
        trace=read_trace(args.exit_trace, exits, config.num_layers),
        batches=tuple(sorted(set(args.batch))),
        context=args.context,
        tokens=args.tokens,
        rounds=args.rounds,
        device=device,
        dtype=dtype,
        hold=args.hold,
        seed=args.seed,
        width=args.exit_width or (config.hidden_size // 2 if narrow else 1024),
        gate=args.exit_gate or (config.hidden_size // 4 if narrow else 256),
        vocab=args.exit_vocab,
    )
    _check(options)
    return options


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Exits at a quarter, half and three quarters of the stack."""
    layers = {num_layers * part // 4 for part in (1, 2, 3)}
    return tuple(sorted(layers - {0}))


def _exits(wanted: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    if wanted is None:
        return default_exits(num_layers)
    exits = tuple(sorted(set(wanted)))
    if exits[-1] >= num_layers:
        raise EngineBenchError(
            f"--exits {exits[-1]}: the model has {num_layers} layers, so exits come after layers "
            f"1 to {num_layers - 1}"
        )
    return exits


def _device(wish: str) -> torch.device:
    name = wish
    if wish == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineBenchError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name == "cuda" and triton is None:
        raise EngineBenchError("--device cuda needs triton, which torch's CUDA builds bring")
    return torch.device(name)


def _check(options: Options) -> None:
    config = options.config
    if options.vocab is not None and options.vocab > config.vocab_size:
        raise EngineBenchError(
            f"--exit-vocab {options.vocab}: the model has {config.vocab_size} tokens"
        )
    if options.length > config.max_position_embeddings:
        raise EngineBenchError(
            f"--context {options.context} and {options.length - options.context} rides are over "
            f"the model's {config.max_position_embeddings} positions"
        )


def check_memory(options: Options) -> None:
    """Raise EngineBenchError before memory runs out half way: weights come first."""
    needed = needed_bytes(options)
    if options.device.type == "cuda":
        kind, free = "GPU memory", torch.cuda.mem_get_info(options.device)[0]
    else:
        kind, free = "memory", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise EngineBenchError(
            f"{options.shape} with {options.slots} slots of {options.length} tokens needs about "
            f"{needed / 2**30:.1f} GiB of {kind}, there are {free / 2**30:.1f}; lower --batch or "
            "--context, or take a smaller --model-shape"
        )


def needed_bytes(options: Options) -> int:
    """Memory of all that is held at once: weights, K,V, exits, scratch, and what CUDA takes."""
    config, size = options.config, options.dtype.itemsize
    d, kv = config.hidden_size, config.kv_size
    layer = d * (2 * config.query_size + 2 * kv + 3 * config.intermediate_size)
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    maps = [2 * (config.num_layers - exit_layer) * kv * d for exit_layer in options.exits]
    # A map is cut together from pieces, and once more where its fill is timed alone.
    fills = sum(maps) + 2 * max(maps)
    heads = len(options.exits) * d * (3 * options.width + options.gate)
    heads += (options.vocab or 0) * d
    pages = 2 * config.num_layers * kv * options.slots * options.blocks * BLOCK
    # Logits of two loops, one of them with exits, and hidden and inner states.
    scratch = options.slots * (3 * 4 * config.vocab_size + 8 * config.intermediate_size * size)
    numbers = config.num_layers * layer + embeddings + fills + heads + pages
    return numbers * size + scratch + (_OVERHEAD if options.device.type == "cuda" else 0)
