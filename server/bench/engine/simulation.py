"""What exits could be worth at best: limits by memory bandwidth and by simulation.

The loop's own policy is simulated with given segment times. Either they were measured on the
device, or nothing is run and a segment takes the time that reading its bytes takes (--on-paper).
With few active rows a segment costs the reading of its weights, however many rows there are, so a
batch whose tokens leave at different depths saves little; the simulation says how little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

from offramp.models.costs import CostModel, StepCost
from offramp.server.bench.common import Report, columns, table
from offramp.server.bench.engine.decode import Holds, SegmentTimes
from offramp.server.bench.engine.model import RandomModel
from offramp.server.bench.engine.options import WARM_UP, Options, layer_weights
from offramp.server.engine.batch_delay import BatchDelay, simulate
from offramp.server.engine.governor import ExitGovernor, device_patience
from offramp.server.engine.thresholds import ExitThresholds

# The server's default of --exit-max-hold-ms, in seconds.
_MAX_HOLD = 0.05
# Tokens of the trace that the server is taken to have seen.
_SEEN = 1000
# Shares of ready sequences and launches to wait among which the best way of holding is looked for.
_SHARES = (0.0, 0.5, 1.0, 2.0)
_WAITS = (2.0, 4.0)
_COLUMNS = columns(
    "batch {batch} | full tokens/s {full_tokens_per_s:.0f} | "
    "x full, none held {free_speed_up:.3f} | x full, best holds {limit_speed_up:.3f} | "
    "efficiency {limit_efficiency:.2f}"
)

Draws = Sequence[Sequence[int]]
"""For each token of each sequence [tokens, sequences] the segment behind which it leaves."""


def launch_bytes(random_model: RandomModel, batch: int) -> int:
    """Bytes of weights and K,V that a launch of ``batch`` rows reads at full depth, half way."""
    options, config = random_model.options, random_model.options.config
    context = options.context + WARM_UP + options.tokens // 2
    span = min(context, config.sliding_window or context)
    row = 2 * config.num_layers * config.kv_size * options.dtype.itemsize
    return random_model.model.weight_bytes + batch * span * row


def holds_for(options: Options, times: SegmentTimes, batch: int) -> Holds:
    """As the engine would hold with these times; a longest wait in seconds becomes launches."""
    trace = options.trace
    costs = CostModel.of(len(times[batch]))
    costs.segments = [
        StepCost.of({1: one.running, batch: many.running})
        for one, many in zip(times[1], times[batch], strict=True)
    ]
    if options.hold == "latency":
        return ExitGovernor(costs, ExitThresholds(()), _MAX_HOLD).device_holds(batch)
    if options.hold == "off":
        return [(0.0, 0.0)] * len(costs.segments)
    delay = BatchDelay(costs, device_patience(costs, batch, _MAX_HOLD), trace.depths)
    for depth, share in zip(trace.depths, trace.shares, strict=True):
        for _ in range(round(_SEEN * share)):
            delay.observe(depth)
    return delay.choose(batch)


def simulated(
    options: Options,
    draws: Draws,
    holds: Holds,
    full: SegmentTimes,
    exits: SegmentTimes,
    batch: int,
) -> dict[str, float]:
    """Speed-ups over the loop without exits, for the first ``batch`` sequences of ``draws``.

    ``best``: leaving costs nothing and segments take their part of that loop's time. ``best_paid``:
    segments with their gates, and leaving with its head and K,V, as measured. ``limit``: as
    ``best``, with the best of many ways of holding: what the batch itself allows.
    """
    rows = [row[:batch] for row in draws]
    base = batch / full[batch][0].running
    free, paid = _measured_costs(exits, full), _measured_costs(exits, None)
    found = [_speed(rows, costs, holds, options.tokens) for costs in (free, paid)]
    return {
        "best_speed_up": round(found[0] / base, 4),
        "best_paid_speed_up": round(found[1] / base, 4),
        "limit_speed_up": round(_limit(rows, free, options.tokens) / base, 4),
    }


def _speed(draws: Draws, costs: CostModel, holds: Holds, launches: int) -> float:
    """Tokens a second."""
    tokens, seconds = simulate(draws, costs, holds, WARM_UP, launches)
    return tokens / seconds


def _limit(draws: Draws, costs: CostModel, launches: int) -> float:
    """Tokens a second with the best of many ways of holding."""
    ways = (
        [(0.0, 0.0), *((share, longest) for share in shares)]
        for longest in _WAITS
        for shares in product(_SHARES, repeat=len(costs.segments) - 1)
    )
    return max(_speed(draws, costs, way, launches) for way in ways)


def _measured_costs(exits: SegmentTimes, full: SegmentTimes | None) -> CostModel:
    """As measured; with ``full``'s times segments share those and leaving is free."""
    batches = sorted(exits)
    scale = dict.fromkeys(batches, 1.0)
    if full is not None:
        scale = {n: full[n][0].running / sum(t.running for t in exits[n]) for n in batches}
    costs = CostModel.of(len(exits[batches[0]]))
    for n in batches:
        for segment, measured in enumerate(exits[n]):
            costs.segments[segment].add(n, scale[n] * measured.running)
            costs.checks[segment].add(n, 0.0 if full else measured.leaving or 0.0)
    return costs


def paper_report(options: Options, bandwidth: float, command: str) -> Report:
    """Simulated for memory that gives ``bandwidth`` bytes a second."""
    rows = [_paper_row(options, bandwidth, batch) for batch in options.batches]
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
    return Report(f"{head}{table(rows, _COLUMNS)}\n\n", document)


def _paper_row(options: Options, bandwidth: float, batch: int) -> Mapping[str, float]:
    draws = options.trace.draw(options.tokens, batch, options.seed).tolist()
    costs = _paper_costs(options, bandwidth, batch)
    full = batch / sum(curve.at(batch) for curve in costs.segments)
    no_holds = [(0.0, 0.0)] * len(costs.segments)
    free = _speed(draws, costs, no_holds, options.tokens) / full
    most = _limit(draws, costs, options.tokens) / full
    ideal = options.config.num_layers / options.trace.mean_depth
    return {
        "batch": batch,
        "full_tokens_per_s": round(full, 1),
        "free_speed_up": round(free, 4),
        "limit_speed_up": round(most, 4),
        "limit_efficiency": round((most - 1) / (ideal - 1), 4) if ideal > 1 else 0.0,
    }


def _paper_costs(options: Options, bandwidth: float, batch: int) -> CostModel:
    """Weights once a segment, K,V for each active row; leaving is free."""
    config, size = options.config, options.dtype.itemsize
    bounds = (0, *options.exits, config.num_layers)
    head = config.vocab_size * config.hidden_size
    costs = CostModel.of(len(options.exits) + 1)
    for segment, (first, last) in enumerate(pairwise(bounds)):
        weights = (last - first) * layer_weights(config)
        weights += head if last == config.num_layers else 0
        kv = 2 * (last - first) * config.kv_size * options.context
        for rows in sorted({1, batch}):
            costs.segments[segment].add(rows, (weights + rows * kv) * size / bandwidth)
    return costs
