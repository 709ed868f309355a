"""What an engine bench measures: options, checked against the model shape, and the exit trace.

The trace says at which depth tokens leave: a distribution over exits and a draw for every token.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.backend import triton
from offramp.models.config import ModelConfig
from offramp.models.sampling_params import NEVER
from offramp.models.shapes import MODEL_SHAPES
from offramp.server.bench.common import BenchError
from offramp.server.bench.device import DTYPES

WARM_UP = 16
"""Launches before those that are measured: until then sequences have spread over the segments."""
BLOCK = 32
"""Tokens in a K,V block, as the server has them."""

# CUDA's libraries, recorded graphs, and what bandwidth is measured with.
_OVERHEAD = 4 << 30
# Models of fewer channels get exits in proportion to them.
_NARROW = 256
# Steps of the bisection for the trace with maximum entropy.
_HALVINGS = 200


@dataclass(frozen=True, slots=True)
class ExitTrace:
    """AcceptanceRates of tokens by the layers they take.

    ``depths`` are the exit layers, ascending, and last all layers of the stack; ``shares``, one
    each, sum to 1. ``rule`` says where the shares come from.
    """

    depths: tuple[int, ...]
    shares: tuple[float, ...]
    rule: str

    @property
    def mean_depth(self) -> float:
        """Layers a token takes on average."""
        return sum(d * s for d, s in zip(self.depths, self.shares, strict=True))

    def draw(self, tokens: int, seqs: int, seed: int) -> Tensor:
        """For each token of each sequence the index of its depth, int64 [tokens, sequences].

        Every sequence's draws are spread evenly over the distribution and then shuffled, so that
        few tokens have the right mean too.
        """
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(1, seqs, generator=generator, dtype=torch.float64)
        at = (torch.arange(tokens).unsqueeze(1) + start) / tokens
        bounds = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)[:-1]
        even = torch.bucketize(at, bounds, right=True)
        order = torch.rand(tokens, seqs, generator=generator).argsort(dim=0)
        return even.gather(0, order)


@dataclass(frozen=True, slots=True)
class Options:
    """All that shapes a run.

    ``tokens`` are the measured launches of all segments in a round: a sequence that never waits
    makes as many tokens. It is also the number of rows of the trace. ``hold`` is latency,
    throughput or off. ``width`` and ``gate`` are the inner widths of an exit's adapter and gate,
    ``vocab`` the number of tokens that exits choose from (None: all).
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
    def seqs(self) -> int:
        """Sequences of the loops: the largest batch."""
        return max(self.batches)

    @property
    def length(self) -> int:
        """Positions that a sequence may reach; the last launch is never read."""
        return self.context + WARM_UP + self.tokens + 2

    @property
    def blocks(self) -> int:
        """K,V blocks of a sequence."""
        return -(-self.length // BLOCK)


def read_options(args: argparse.Namespace) -> Options:
    """Raises BenchError."""
    config = MODEL_SHAPES.get(args.model_shape)
    if config is None:
        known = ", ".join(MODEL_SHAPES)
        raise BenchError(f"--model-shape {args.model_shape}: there are {known}")
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
        device=device,
        dtype=dtype,
        width=args.exit_width or (config.hidden_size // 2 if narrow else 1024),
        gate=args.exit_gate or (config.hidden_size // 4 if narrow else 256),
        vocab=args.exit_vocab,
        **{name: getattr(args, name) for name in ("context", "tokens", "rounds", "hold", "seed")},
    )
    if options.vocab is not None and options.vocab > config.vocab_size:
        raise BenchError(f"--exit-vocab {options.vocab}: the model has {config.vocab_size} tokens")
    if options.length > config.max_position_embeddings:
        raise BenchError(
            f"--context {options.context} and {options.length - options.context} passes are over "
            f"the model's {config.max_position_embeddings} positions"
        )
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
        raise BenchError(
            f"--exits {exits[-1]}: the model has {num_layers} layers, so exits come after layers "
            f"1 to {num_layers - 1}"
        )
    return exits


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name == "cuda" and triton is None:
        raise BenchError("--device cuda needs triton, which torch's CUDA builds bring")
    return torch.device(name)


def check_memory(options: Options) -> None:
    """Raise BenchError before memory runs out half way: weights come first."""
    needed = needed_bytes(options)
    if options.device.type == "cuda":
        kind, free = "GPU memory", torch.cuda.mem_get_info(options.device)[0]
    else:
        kind, free = "memory", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise BenchError(
            f"{options.shape} with {options.seqs} sequences of {options.length} tokens needs "
            f"about {needed / 2**30:.1f} GiB of {kind}, there are {free / 2**30:.1f}; lower "
            "--batch or --context, or take a smaller --model-shape"
        )


def layer_weights(config: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    attention = 2 * config.query_size + 2 * config.kv_size
    return config.hidden_size * (attention + 3 * config.intermediate_size)


def needed_bytes(options: Options) -> int:
    """Bytes that are held at once: weights, K,V, exits, scratch, and what CUDA takes."""
    config, size = options.config, options.dtype.itemsize
    d, kv = config.hidden_size, config.kv_size
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    maps = [2 * (config.num_layers - exit_layer) * kv * d for exit_layer in options.exits]
    # A map is cut together from pieces, and once more where its fill is timed alone.
    fills = sum(maps) + 2 * max(maps)
    heads = len(options.exits) * d * (3 * options.width + options.gate)
    heads += (options.vocab or 0) * d
    pages = 2 * config.num_layers * kv * options.seqs * options.blocks * BLOCK
    # Logits of two loops, one of them with exits, and hidden and inner states.
    scratch = options.seqs * (3 * 4 * config.vocab_size + 8 * config.intermediate_size * size)
    numbers = config.num_layers * layer_weights(config) + embeddings + fills + heads + pages
    return numbers * size + scratch + (_OVERHEAD if options.device.type == "cuda" else 0)


def thresholds(draws: Tensor, exits: int) -> Tensor:
    """Scores fp32 [tokens, sequences, exits] that make tokens leave as in ``draws``.

    They are 0 where the token leaves, whatever the gate says, and NEVER at all other exits.
    """
    return torch.where(draws.unsqueeze(-1) == torch.arange(exits), 0.0, NEVER)


def read_trace(text: str, exits: Sequence[int], num_layers: int) -> ExitTrace:
    """The trace that ``text`` names: a mean depth share (0.6) or layer:share pairs (8:0.4,32:0.6).

    Raises BenchError.
    """
    depths = (*exits, num_layers)
    if ":" in text:
        return _listed(text, depths)
    share = _number(text, text)
    mean = share * num_layers
    if not depths[0] <= mean <= num_layers:
        raise BenchError(
            f"--exit-trace {text}: a mean of {mean:g} of {num_layers} layers is out of reach; "
            f"with a first exit after layer {depths[0]} the share is "
            f"{depths[0] / num_layers:.3f} to 1"
        )
    rule = f"maximum entropy with a mean of {share:g} of the layers"
    return ExitTrace(depths, maximum_entropy(depths, mean), rule)


def maximum_entropy(depths: Sequence[int], mean: float) -> tuple[float, ...]:
    """The shares of ``depths`` (ascending) that have this mean and favour nothing else.

    They are proportional to exp(rate * depth) (Jaynes 1957); the rate is found by bisection. At
    either end of the range all tokens take that depth.
    """
    if mean <= depths[0] or mean >= depths[-1]:
        return tuple(float(depth == min(max(mean, depths[0]), depths[-1])) for depth in depths)
    low, high = -100.0, 100.0
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        shares = _tilted(depths, rate)
        if sum(d * s for d, s in zip(depths, shares, strict=True)) < mean:
            low = rate
        else:
            high = rate
    return _tilted(depths, (low + high) / 2)


def _tilted(depths: Sequence[int], rate: float) -> tuple[float, ...]:
    heaviest = depths[-1] if rate > 0 else depths[0]
    weights = [math.exp(rate * (depth - heaviest)) for depth in depths]
    return tuple(weight / sum(weights) for weight in weights)


def _listed(text: str, depths: tuple[int, ...]) -> ExitTrace:
    shares = dict.fromkeys(depths, 0.0)
    seen: set[int] = set()
    for pair in text.split(","):
        layer_text, _, share_text = pair.partition(":")
        layer, share = _number(layer_text, text), _number(share_text, text)
        if layer not in shares:
            raise BenchError(
                f"--exit-trace {text}: {layer_text} is neither an exit layer nor the whole stack; "
                f"there are {', '.join(map(str, depths))}"
            )
        if share < 0 or int(layer) in seen:
            raise BenchError(f"--exit-trace {text}: {pair} is negative or a second time")
        seen.add(int(layer))
        shares[int(layer)] = share
    total = sum(shares.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise BenchError(f"--exit-trace {text}: shares sum to {total:g}, not to 1")
    return ExitTrace(depths, tuple(shares[depth] / total for depth in depths), "as listed")


def _number(part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BenchError(
            f"--exit-trace {text}: write a mean share of the depth (0.6) or layer:share pairs "
            "(8:0.4,16:0.2,32:0.4)"
        )
    return value
