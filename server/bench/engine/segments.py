"""Times of a ride's parts, each alone on the device with every slot of a batch riding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.active_rows import EMPTY, SegmentBatch
from offramp.kernels.kv_fill import Projection, fill_kv
from offramp.models.device_loop import Recorder
from offramp.models.sampling_params import NEVER
from offramp.models.transformer import kv_projection
from offramp.server.bench.engine.clock import seconds
from offramp.server.bench.engine.options import BLOCK
from offramp.server.bench.engine.rig import Rig, Seat

# Rides of the trace whose fills are timed.
_FILLS = 16


@dataclass(frozen=True, slots=True)
class SegmentTime:
    """Seconds of one segment of a loop with ``batch`` riders, the LM head with the last one.

    ``leaving`` is what it takes longer when all of them leave behind it: the exit's adapter and LM
    head, sampling, and K,V of the layers above (None for the last). ``empty`` is its time with
    nobody there: its launches alone.
    """

    batch: int
    segment: int
    riding: float
    leaving: float | None
    empty: float


def segment_times(rig: Rig, seat: Seat, batch: int) -> list[SegmentTime]:
    """Of all segments of ``seat``'s loop, bottom up, at the end of the contexts."""
    loop, device = seat.loop, rig.options.device
    asked = loop.tables.thresholds
    loop.hold([(0.0, 0.0)] * seat.num_segments)
    seat.board(batch, rig.options.seed)

    def timed(segment: int, stage: int, threshold: float) -> float:
        seat.keep(stage, batch)
        asked.fill_(threshold)
        launch = functools.partial(loop.launch_segment, segment, batch)
        found = seconds(device, launch, seat.rewind)
        seat.rewind()
        return found

    times = []
    for segment in range(seat.num_segments):
        riding = timed(segment, segment, NEVER)
        left = timed(segment, segment, 0.0) if segment < asked.shape[1] else None
        leaving = None if left is None else max(0.0, left - riding)
        times.append(SegmentTime(batch, segment, riding, leaving, timed(segment, EMPTY, NEVER)))
    return times


@torch.inference_mode()
def fill_seconds(rig: Rig, draws: Tensor, batch: int) -> float:
    """Mean time that K,V fills take in a ride whose tokens leave as in ``draws`` [tokens, slots].

    All exits' fills of the trace's first rides, launched alone. A ride without leavers pays for the
    launch, as in the loop.
    """
    options = rig.options
    recorder = Recorder(options.device)
    state = torch.randn(options.slots, options.config.hidden_size, device=options.device)
    hidden = state.to(options.dtype)
    rows = draws[:_FILLS, :batch].tolist()
    total = 0.0
    for point, head in enumerate(rig.heads):
        # Made anew and dropped again: the loop's own is not for others to read.
        made = kv_projection(rig.model, head)
        leavers = [
            _leavers(rig, [slot for slot, drawn in enumerate(row) if drawn == point], batch)
            for row in rows
        ]
        launches = recorder.record(_fills(rig, hidden, leavers, made, head.layer))
        total += seconds(options.device, launches)
    return total / len(rows)


def _fills(
    rig: Rig, hidden: Tensor, leavers: list[SegmentBatch], projection: Projection, depth: int
) -> Callable[[], None]:
    pages, angles = rig.cache.pages[depth:], rig.model.rotary.angles
    eps = rig.options.config.rms_norm_eps

    def launch() -> None:
        for each in leavers:
            fill_kv(hidden, each, projection, pages, angles, eps)

    return launch


def _leavers(rig: Rig, slots: list[int], batch: int) -> SegmentBatch:
    """``slots`` as the leavers of a ride at the end of their contexts."""
    options, position = rig.options, rig.options.context
    leavers = SegmentBatch.empty(1 << (batch - 1).bit_length(), options.device)
    places = [rig.blocks[slot][position // BLOCK] * BLOCK + position % BLOCK for slot in slots]
    count = len(slots)
    leavers.slots[:count] = torch.tensor(slots, dtype=torch.int32, device=options.device)
    leavers.positions[:count] = position
    leavers.places[:count] = torch.tensor(places, dtype=torch.int64, device=options.device)
    leavers.count.fill_(count)
    return leavers
