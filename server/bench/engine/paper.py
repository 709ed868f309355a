"""What exits can be worth on paper: segments take the time that reading their bytes takes.

No model is made. With few rows a segment costs its weights whoever rides it, so a batch whose
tokens leave at different depths saves little; this says how little, before anybody tunes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise, product

from offramp.models.config import ModelConfig
from offramp.server.bench.engine.options import WARM_UP, Options
from offramp.server.bench.report import table
from offramp.server.engine.rebatching import Costs, Curve, simulate

# Shares of ready slots and rides to wait among which the best way of holding is looked for.
_SHARES = (0.0, 0.5, 1.0, 2.0)
_RIDES = (2.0, 4.0)
_COLUMNS = (
    ("batch", "batch", "{}"),
    ("full tokens/s", "full_tokens_per_s", "{:.0f}"),
    ("x full, nobody held", "free_speed_up", "{:.3f}"),
    ("x full, best holds", "limit_speed_up", "{:.3f}"),
    ("efficiency", "limit_efficiency", "{:.2f}"),
)

Draws = Sequence[Sequence[int]]
"""For each token of each slot the segment behind which it leaves."""


def limit(draws: Draws, costs: Costs, rides: int) -> float:
    """Tokens a second with the best of many ways of holding."""
    points = len(costs.leaving)
    ways = (
        [(0.0, 0.0), *((share, longest) for share in shares)]
        for longest in _RIDES
        for shares in product(_SHARES, repeat=points)
    )
    return max(simulate(draws, costs, way, WARM_UP, rides).tokens_per_s for way in ways)


def paper(options: Options, bandwidth: float, command: str) -> str:
    """Tables, then one line of JSON, for memory that gives ``bandwidth`` bytes a second."""
    rows = [_row(options, bandwidth, batch) for batch in options.batches]
    document = {
        "command": command,
        "bandwidth": bandwidth,
        "shape": options.shape,
        "dtype": str(options.dtype),
        "exits": options.exits,
        "shares": options.trace.shares,
        "rows": rows,
    }
    head = (
        f"{options.shape}, {options.dtype}, on paper: bytes at {bandwidth / 1e9:.0f} GB/s; exits "
        f"after {options.exits}, mean depth {options.trace.mean_depth:.2f} of "
        f"{options.config.num_layers}, {options.context} tokens of context\n\n"
    )
    return f"{head}{table(rows, _COLUMNS)}\n\n{json.dumps(document)}\n"


def _row(options: Options, bandwidth: float, batch: int) -> Mapping[str, float]:
    draws = options.trace.draw(options.tokens, batch, options.seed).tolist()
    costs = _costs(options, bandwidth, batch)
    full = batch / sum(curve.at(batch) for curve in costs.segments)
    nobody = [(0.0, 0.0)] * len(costs.segments)
    free = simulate(draws, costs, nobody, WARM_UP, options.tokens).tokens_per_s / full
    best = limit(draws, costs, options.tokens) / full
    ideal = options.config.num_layers / options.trace.mean_depth
    return {
        "batch": batch,
        "full_tokens_per_s": round(full, 1),
        "free_speed_up": round(free, 4),
        "limit_speed_up": round(best, 4),
        "limit_efficiency": round((best - 1) / (ideal - 1), 4) if ideal > 1 else 0.0,
    }


def _costs(options: Options, bandwidth: float, batch: int) -> Costs:
    """Weights once a segment, K,V for each rider; leaving is free."""
    config, size = options.config, options.dtype.itemsize
    bounds = (0, *options.exits, config.num_layers)
    head = config.vocab_size * config.hidden_size
    segments = []
    for first, last in pairwise(bounds):
        weights = (last - first) * _layer(config) + (head if last == config.num_layers else 0)
        kv = 2 * (last - first) * config.kv_size * options.context
        seconds = tuple((weights + rows * kv) * size / bandwidth for rows in (1, batch))
        segments.append(Curve((1, batch), seconds) if batch > 1 else Curve((1,), seconds[:1]))
    free = Curve((1,), (0.0,))
    return Costs(tuple(segments), (free,) * len(options.exits))


def _layer(config: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    attention = 2 * config.query_size + 2 * config.kv_size
    return config.hidden_size * (attention + 3 * config.intermediate_size)
