"""What no loop can beat: memory's bandwidth, and exits that cost nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offramp.server.bench.engine.options import WARM_UP, Options
from offramp.server.bench.engine.paper import limit
from offramp.server.bench.engine.rig import Rig
from offramp.server.bench.engine.segments import SegmentTime
from offramp.server.engine.rebatching import Costs, Curve, Simulated, simulate


def ride_bytes(rig: Rig, batch: int) -> int:
    """Weights and K,V that a ride of ``batch`` slots reads at full depth, half way through."""
    options, config = rig.options, rig.options.config
    context = options.context + WARM_UP + options.tokens // 2
    span = min(context, config.sliding_window or context)
    row = 2 * config.num_layers * config.kv_size * options.dtype.itemsize
    return rig.model.weight_bytes + batch * span * row


@dataclass(frozen=True, slots=True)
class Best:
    """Simulated speed-ups over `full`'s segment alone.

    ``free``: leaving costs nothing and segments take their part of full's time. ``paid``: segments
    with their gates and leaving with its head and K,V, as measured. ``limit``: as ``free``, with
    the best of many ways of holding: what the batch itself allows.
    """

    free: float
    paid: float
    limit: float


def best(
    options: Options,
    draws: Sequence[Sequence[int]],
    holds: Sequence[tuple[float, float]],
    full: Mapping[int, Sequence[SegmentTime]],
    exits: Mapping[int, Sequence[SegmentTime]],
    batch: int,
) -> Best:
    """For the first ``batch`` slots of ``draws``; times by batch as `segment_times` gives them."""
    rows = [row[:batch] for row in draws]
    base = batch / full[batch][0].riding

    def speed_up(costs: Costs) -> float:
        made: Simulated = simulate(rows, costs, holds, WARM_UP, options.tokens)
        return made.tokens_per_s / base

    free = _costs(exits, full)
    most = limit(rows, free, options.tokens) / base
    return Best(speed_up(free), speed_up(_costs(exits, None)), most)


def _costs(
    exits: Mapping[int, Sequence[SegmentTime]], full: Mapping[int, Sequence[SegmentTime]] | None
) -> Costs:
    """As measured; with ``full``'s times segments share those and leaving is free."""
    batches = tuple(sorted(exits))
    number = len(exits[batches[0]])
    scale = dict.fromkeys(batches, 1.0)
    if full is not None:
        scale = {n: full[n][0].riding / sum(t.riding for t in exits[n]) for n in batches}
    riding = [
        Curve(batches, tuple(scale[n] * exits[n][segment].riding for n in batches))
        for segment in range(number)
    ]
    leaving = [
        Curve(
            batches,
            tuple((exits[n][segment].leaving or 0.0) if full is None else 0.0 for n in batches),
        )
        for segment in range(number - 1)
    ]
    return Costs(tuple(riding), tuple(leaving))
