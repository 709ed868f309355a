"""Times of the decode loop: whole launches of all segments, and each segment alone.

One launch runs all segments from the bottom up. Each sequence then has its next token, or waits
above the segment that it reached. The next launch is started before the result of the one before is
read, as the engine does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from offramp.kernels.active_rows import EMPTY, SegmentBatch
from offramp.kernels.kv_fill import Projection, fill_kv
from offramp.models.device_loop import PendingLaunch, Recorder
from offramp.models.sampling_params import NEVER
from offramp.models.transformer import kv_projection
from offramp.server.bench.common import Refused
from offramp.server.bench.device import seconds_of, synchronise
from offramp.server.bench.engine.model import RandomModel, RecordedLoop
from offramp.server.bench.engine.options import BLOCK, WARM_UP, Options

# Launches of the trace whose fills are timed.
_FILLS = 16

Holds = Sequence[tuple[float, float]]
"""For each segment the share of ready sequences to wait for, and the most launches to wait."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to decode.

    ``draws`` int64 [tokens, sequences] are the depths that tokens take, as ExitTrace.draw gives
    them, ``trace`` fp32 [tokens, sequences, exits] the thresholds for that, on the device.
    """

    name: str
    loop: RecordedLoop
    draws: Tensor
    trace: Tensor
    holds: Holds


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the measured launches of a round took and made; times in seconds.

    ``layers`` is summed over all ``tokens``. ``launching`` is the host's time to start launches,
    ``waiting`` its time until their results were there. ``idle`` is the share of the time in which
    the GPU was between launches (None on a CPU); where the host is late inside a launch, that
    counts as busy.
    """

    wall: float
    launches: int
    tokens: int
    layers: int
    launching: float
    waiting: float
    idle: float | None


def decode(mode: Mode, options: Options, batch: int) -> Decoded:
    """Run WARM_UP launches and then those that are measured.

    Raises Refused where a token did not leave as it was drawn: then the figures would be those of
    another trace.
    """
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    on_gpu, loop = options.device.type == "cuda", mode.loop

    def launch() -> PendingLaunch:
        with torch.inference_mode():
            loop.set_thresholds()
        return loop.loop.launch(batch)

    def marked() -> PendingLaunch:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        started = launch()
        ended.record()
        marks.append((begun, ended))
        return started

    start = marked if on_gpu else launch
    loop.use_trace(mode.trace)
    loop.loop.hold(mode.holds)
    loop.start(batch, options.seed)
    synchronise(options.device)
    depths: list[list[int]] = [[] for _ in range(batch)]
    tokens = layers = 0
    launching = waiting = begun = 0.0
    running = start()
    for number in range(WARM_UP + options.tokens):
        if number == WARM_UP:
            tokens = layers = 0
            launching = waiting = 0.0
            begun = time.perf_counter()
        before = time.perf_counter()
        following = start()
        launched = time.perf_counter()
        made = running.result().tokens
        waiting += time.perf_counter() - launched
        launching += launched - before
        for seq, token in made.items():
            depths[seq].append(token.depth)
        tokens += len(made)
        layers += sum(token.depth for token in made.values())
        running = following
    wall = time.perf_counter() - begun
    running.result()
    _verify(mode, options, depths)
    # The last launch was only there so that the one before was followed by another.
    idle = _idle_share(marks[WARM_UP - 1 : -1]) if on_gpu else None
    return Decoded(wall, options.tokens, tokens, layers, launching, waiting, idle)


def _idle_share(marks: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    """Share of the time that lies between launches; ``marks`` are their begins and ends."""
    gaps = sum(before[1].elapsed_time(after[0]) for before, after in pairwise(marks))
    return float(gaps / marks[0][1].elapsed_time(marks[-1][1]))


def _verify(mode: Mode, options: Options, depths: Sequence[Sequence[int]]) -> None:
    of_draw = (*options.exits, options.config.num_layers)
    rows = len(mode.draws)
    for seq, found in enumerate(depths):
        drawn = mode.draws[:, seq].tolist()
        for index, depth in enumerate(found):
            wanted = of_draw[drawn[index % rows]]
            if depth != wanted:
                raise Refused(
                    f"mode {mode.name}, sequence {seq}: token {index} was to take {wanted} "
                    f"layers and took {depth}"
                )


@dataclass(frozen=True, slots=True)
class SegmentTime:
    """Seconds of one segment of a loop with ``batch`` active rows, the LM head with the last one.

    ``running`` is its time when all rows go on above it. ``leaving`` is what it takes longer when
    all of them leave behind it: the exit's adapter and LM head, sampling, and K,V of the layers
    above (None for the last segment). ``empty`` is its time without active rows: its launches
    alone.
    """

    batch: int
    segment: int
    running: float
    leaving: float | None
    empty: float


SegmentTimes = Mapping[int, Sequence[SegmentTime]]
"""Times of a loop's segments, bottom up, by the number of active rows."""


def segment_times(
    random_model: RandomModel, recorded: RecordedLoop, batch: int
) -> list[SegmentTime]:
    """Of all segments of the loop, bottom up, at the end of the contexts."""
    loop, device = recorded.loop, random_model.options.device
    thresholds = loop.params.thresholds
    loop.hold([(0.0, 0.0)] * recorded.num_segments)
    recorded.start(batch, random_model.options.seed)

    def timed(segment: int, stage: int, threshold: float) -> float:
        recorded.save(stage, batch)
        thresholds.fill_(threshold)
        launch = functools.partial(loop.launch_segment, segment, batch)
        found = seconds_of(device, launch, recorded.restore)
        recorded.restore()
        return found

    times = []
    for segment in range(recorded.num_segments):
        running = timed(segment, segment, NEVER)
        left = timed(segment, segment, 0.0) if segment < thresholds.shape[1] else None
        leaving = None if left is None else max(0.0, left - running)
        empty = timed(segment, EMPTY, NEVER)
        times.append(SegmentTime(batch, segment, running, leaving, empty))
    return times


@torch.inference_mode()
def fill_seconds(random_model: RandomModel, draws: Tensor, batch: int) -> float:
    """Mean time that K,V fills take in a launch whose tokens leave as in ``draws``.

    All exits' fills of the trace's first launches, run alone. A launch without tokens that leave
    pays for the kernels' start, as in the loop.
    """
    options = random_model.options
    recorder = Recorder(options.device)
    state = torch.randn(options.seqs, options.config.hidden_size, device=options.device)
    hidden = state.to(options.dtype)
    eps, angles = options.config.rms_norm_eps, random_model.model.rotary.angles
    rows = draws[:_FILLS, :batch].tolist()
    total = 0.0
    for point, head in enumerate(random_model.heads):
        # The loop's own projection cannot be reached from here, so it is made once more.
        projection, pages = (
            kv_projection(random_model.model, head),
            random_model.cache.pages[head.layer :],
        )
        leaving = [
            _leaving(random_model, [seq for seq, drawn in enumerate(row) if drawn == point], batch)
            for row in rows
        ]

        def launch(
            leaving: list[SegmentBatch] = leaving,
            projection: Projection = projection,
            pages: Tensor = pages,
        ) -> None:
            for each in leaving:
                fill_kv(hidden, each, projection, pages, angles, eps)

        total += seconds_of(options.device, recorder.record(launch))
    return total / len(rows)


def _leaving(random_model: RandomModel, seqs: list[int], batch: int) -> SegmentBatch:
    """``seqs`` as the rows that leave in a launch, at the end of their contexts."""
    options, position = random_model.options, random_model.options.context
    leaving = SegmentBatch.empty(1 << (batch - 1).bit_length(), options.device)
    places = [
        random_model.blocks[seq][position // BLOCK] * BLOCK + position % BLOCK for seq in seqs
    ]
    count = len(seqs)
    leaving.seqs[:count] = torch.tensor(seqs, dtype=torch.int32, device=options.device)
    leaving.positions[:count] = position
    leaving.places[:count] = torch.tensor(places, dtype=torch.int64, device=options.device)
    leaving.count.fill_(count)
    return leaving
