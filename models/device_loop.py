"""Decoding of many sequences at once, one pass after another, without waiting for the host.

A pass runs every segment once, from the first to the head. Which rows run, leave or are held is
decided on the device (device_pass.py), and the tokens come back in pinned memory while the next
pass is already under way. Each sequence has a row of the device's state; the host gives rows out
and learns of their tokens one pass late.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.active_rows import EMPTY, DecodeState
from offramp.kernels.kv_fill import Projection
from offramp.kernels.noise import signed
from offramp.kernels.sampling import SamplingTable
from offramp.models.costs import CostModel
from offramp.models.device_pass import DecodeParams, DevicePass
from offramp.models.exits.checks import Exits
from offramp.models.kv_cache import KVCache
from offramp.models.sampling_params import NEVER, SamplingParams

_TIMES = 3


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence takes ``row``: its newest ``token``, not yet run, stands at ``position``.

    The next token made has number ``index`` in the answer. ``table`` lists the K,V blocks; from
    position ``end`` on nothing is run. ``thresholds`` are the scores at which a token leaves each
    exit.
    """

    row: int
    token: int
    position: int
    index: int
    table: Sequence[int]
    end: int
    sampling: SamplingParams
    thresholds: Sequence[float]


@dataclass(frozen=True, slots=True)
class DeviceToken:
    """A row's new token, after ``depth`` layers."""

    token: int
    depth: int


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """``tokens`` of a pass by row; rows that are held or free made none.

    ``waiting`` counts for each segment the rows that wait there now; ``head_rows`` are the rows
    that exits' LM heads were run for.
    """

    tokens: dict[int, DeviceToken]
    waiting: tuple[int, ...]
    head_rows: int


class PendingLaunch:
    """A pass under way; the tensors are its results, on their way to the host."""

    def __init__(
        self,
        emitted: Tensor,
        depth: Tensor,
        stage: Tensor,
        head_rows: Tensor,
        num_segments: int,
        ended: torch.cuda.Event | None,
    ) -> None:
        self._emitted, self._depth, self._stage = emitted, depth, stage
        self._head_rows = head_rows
        self._num_segments = num_segments
        self._ended = ended

    def result(self) -> LaunchResult:
        """Wait for the end of the pass."""
        if self._ended is not None:
            self._ended.synchronize()
        depths, stages = self._depth.tolist(), Counter(self._stage.tolist())
        made = enumerate(self._emitted.tolist())
        tokens = {row: DeviceToken(token, depths[row]) for row, token in made if token != EMPTY}
        waiting = tuple(stages[segment] for segment in range(self._num_segments))
        return LaunchResult(tokens, waiting, int(self._head_rows))


Launches = Callable[[], None]


class Recorder:
    """Records sequences of launches on ``device``; all share one pool of memory.

    What is recorded reads and writes memory that stays where it is, and never waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None

    def record(self, launches: Launches) -> Launches:
        """What replays ``launches``. They run once first, which compiles their kernels."""
        if not self._on_gpu:
            return launches
        # Off the default stream, as torch requires of what will be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launches()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            launches()
        return graph.replay


class DeviceLoop:
    """Owns the state of the sequences that decode on the device.

    ``rows`` is the most of them at once, ``max_blocks`` the K,V blocks of the longest. Passes are
    recorded for powers of two of live rows.
    """

    def __init__(
        self,
        exits: Exits,
        projections: Sequence[Projection],
        cache: KVCache,
        rows: int,
        max_blocks: int,
    ) -> None:
        device = exits.model.device
        self._device = device
        self._num_segments = len(exits.heads) + 1
        self.state = DecodeState.empty(rows, max_blocks, device)
        sampling = SamplingTable.greedy(rows, device)
        thresholds = torch.full((rows, len(exits.heads)), NEVER, device=device)
        holds = torch.zeros(self._num_segments, 2, device=device)
        self.params = DecodeParams(sampling, thresholds, holds)
        self._pass = DevicePass(exits, projections, cache, self.state, self.params)
        self._limits = [*_powers_below(rows), rows]
        # All of them now, while no row is taken: recording runs what it records.
        recorder = Recorder(device)
        self._recorded = {
            (segment, limit): self._record(recorder, segment, limit)
            for limit in self._limits
            for segment in range(self._num_segments)
        }

    def add(self, new: Sequence[NewRow]) -> None:
        """Give rows to sequences; they run from the next launch on."""
        if not new:
            return
        state, sampling = self.state, self.params.sampling
        rows = self._index([each.row for each in new])
        numbers = [(each.token, each.position, each.index) for each in new]
        state.token[rows], state.position[rows], state.index[rows] = self._index(numbers).T
        wanted = [each.sampling for each in new]
        sampling.temperature[rows] = self._reals([each.temperature for each in wanted])
        sampling.top_p[rows] = self._reals([each.top_p for each in wanted])
        sampling.min_p[rows] = self._reals([each.min_p for each in wanted])
        sampling.top_k[rows] = self._index([each.top_k for each in wanted]).to(torch.int32)
        sampling.seed[rows] = self._index([signed(each.seed, 64) for each in wanted])
        self.params.thresholds[rows] = self._reals([list(each.thresholds) for each in new])
        blocks = {(each.row, i): block for each in new for i, block in enumerate(each.table)}
        self.grow(blocks, {each.row: each.end for each in new})
        state.waited.index_fill_(0, rows, 0)
        state.stage.index_fill_(0, rows, 0)

    def grow(self, blocks: Mapping[tuple[int, int], int], ends: Mapping[int, int]) -> None:
        """Write K,V blocks, by row and index in its table, and rows' new ends."""
        if blocks:
            rows, places = self._index(list(blocks)).T
            self.state.table[rows, places] = self._index(list(blocks.values()))
        if ends:
            self.state.end[self._index(list(ends))] = self._index(list(ends.values()))

    def set_thresholds(self, thresholds: Mapping[int, Sequence[float]]) -> None:
        """Change the scores at which rows' tokens leave."""
        if thresholds:
            values = self._reals([list(row) for row in thresholds.values()])
            self.params.thresholds[self._index(list(thresholds))] = values

    def hold(self, holds: Sequence[tuple[float, float]]) -> None:
        """For each segment the share of ready rows to wait for, and the passes to wait at most."""
        self.params.holds.copy_(self._reals([list(pair) for pair in holds]), non_blocking=True)

    def clear(self, rows: Sequence[int]) -> None:
        """Free rows; a pass under way may still make a token for them."""
        if rows:
            self.state.stage.index_fill_(0, self._index(rows), EMPTY)

    def launch(self, live: int) -> PendingLaunch:
        """Start a pass for the rows given out, ``live`` in all."""
        with torch.inference_mode():
            for segment in range(self._num_segments):
                self.launch_segment(segment, live)
            emitted, depth = self._to_host(self.state.emitted), self._to_host(self.state.depth)
            stage, head_rows = self._to_host(self.state.stage), self._to_host(self._pass.head_rows)
        ended = None
        if self._device.type == "cuda":
            ended = torch.cuda.Event()
            ended.record()
        return PendingLaunch(emitted, depth, stage, head_rows, self._num_segments, ended)

    def launch_segment(self, segment: int, live: int) -> None:
        """Start one segment of a pass."""
        limit = self._limits[bisect_left(self._limits, live)]
        self._recorded[segment, limit]()

    def seconds(self, segment: int, rows: int, *, leaving: bool = False) -> float:
        """Time of one segment for ``rows`` rows at a first position; no row may be given out yet.

        With ``leaving`` all of them leave at its end, so their exit head and K,V are included.
        """
        state, times = self.state, []
        for _ in range(_TIMES):
            state.position.zero_()
            state.end.fill_(1)
            state.stage[:rows] = segment
            self.params.thresholds.fill_(0.0 if leaving else NEVER)
            self._wait()
            begun = time.perf_counter()
            with torch.inference_mode():
                self.launch_segment(segment, rows)
            self._wait()
            times.append(time.perf_counter() - begun)
            state.stage.fill_(EMPTY)
        self.params.thresholds.fill_(NEVER)
        for each in (state.position, state.end, state.index):
            each.zero_()
        return min(times)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _record(self, recorder: Recorder, segment: int, limit: int) -> Launches:
        with torch.inference_mode():
            return recorder.record(lambda: self._pass.run(segment, limit))

    def _index(self, values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        return self._to_device(torch.tensor(values, dtype=torch.int64))

    def _reals(self, values: Sequence[float] | Sequence[list[float]]) -> Tensor:
        return self._to_device(torch.tensor(values, dtype=torch.float32))

    def _to_device(self, values: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return values
        # Pinned, so that the copy is in line behind the pass under way instead of waiting for it.
        return values.pin_memory().to(self._device, non_blocking=True)

    def _to_host(self, values: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return values.clone()
        held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return held.copy_(values, non_blocking=True)


def _powers_below(number: int) -> Iterator[int]:
    power = 1
    while power < number:
        yield power
        power *= 2


def profile_device(loop: DeviceLoop, num_segments: int, rows: int) -> CostModel:
    """Costs of segments for one row and for ``rows``, before any row is given out.

    The last segment includes the LM head. The cost of a check is what tokens that leave add: the
    exit's head and the K,V of the layers above, which are made in the same pass, so that no later
    fill is to be paid.
    """
    costs = CostModel.of(num_segments)
    for count in sorted({1, rows}):
        for segment in range(num_segments):
            seconds = loop.seconds(segment, count)
            costs.segments[segment].add(count, seconds)
            if segment + 1 < num_segments:
                leaving = loop.seconds(segment, count, leaving=True)
                costs.checks[segment].add(count, max(0.0, leaving - seconds))
        costs.fill.add(count, 0.0)
    return costs
