"""Decoding of many slots at once, one ride after another, without waiting for the host.

A ride runs every segment once, from the ground to the head: riders gather, leave and are held on
the device (decode_pass.py), and what they made comes back in pinned memory while the next ride is
already under way. The host says who has which slot and learns a ride late what became of them.
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
from offramp.kernels.sampling import SamplingTable
from offramp.models.device_pass import DecodeParams, DevicePass
from offramp.models.exits.checks import Exits
from offramp.models.kv_cache import KVCache
from offramp.models.sampling_params import NEVER, SamplingParams

_TIMES = 3


@dataclass(frozen=True, slots=True)
class Boarding:
    """A request takes ``slot``: its newest ``token``, not yet run, stands at ``position``.

    The next token made has number ``index`` in the answer. ``table`` lists the K,V blocks; from
    position ``end`` on nothing is run. ``thresholds`` are the scores at which a token leaves each
    exit.
    """

    slot: int
    token: int
    position: int
    index: int
    table: Sequence[int]
    end: int
    sampling: SamplingParams
    thresholds: Sequence[float]


@dataclass(frozen=True, slots=True)
class DeviceToken:
    """A slot's new token, from ``depth`` layers."""

    token: int
    depth: int


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """``landed``: what slots made; who is held or has no slot made nothing.

    ``waiting`` counts for each segment the slots that wait there now; ``head_rows`` are the rows
    that exits' LM heads were run for.
    """

    landed: dict[int, DeviceToken]
    waiting: tuple[int, ...]
    head_rows: int


class Ride:
    """A ride under way; the tensors are its results, on their way to the host."""

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
        """Wait for the ride's end."""
        if self._ended is not None:
            self._ended.synchronize()
        depths, stages = self._depth.tolist(), Counter(self._stage.tolist())
        made = enumerate(self._emitted.tolist())
        landed = {slot: DeviceToken(token, depths[slot]) for slot, token in made if token != EMPTY}
        waiting = tuple(stages[segment] for segment in range(self._num_segments))
        return LaunchResult(landed, waiting, int(self._head_rows))


Launches = Callable[[], None]


class Recorder:
    """Records sequences of launches on ``device``; all share one pool of memory.

    What is recorded reads and writes memory that stays where it is, and asks the device nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None

    def record(self, launches: Launches) -> Launches:
        """What replays ``launches``. They run once first, which compiles their kernels."""
        if not self._on_gpu:
            return launches
        # Off the default stream, as torch asks of what will be captured.
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
    """Owns the slots' states on the device.

    ``slots`` is the most requests that may decode at once, ``max_blocks`` the K,V blocks of the
    longest of them. Rides are recorded for powers of two of live slots.
    """

    def __init__(
        self,
        exits: Exits,
        projections: Sequence[Projection],
        cache: KVCache,
        slots: int,
        max_blocks: int,
    ) -> None:
        device = exits.model.device
        self._device = device
        self._num_segments = len(exits.heads) + 1
        self.states = DecodeState.empty(slots, max_blocks, device)
        sampling = SamplingTable.greedy(slots, device)
        thresholds = torch.full((slots, len(exits.heads)), NEVER, device=device)
        holds = torch.zeros(self._num_segments, 2, device=device)
        self.tables = DecodeParams(sampling, thresholds, holds)
        self._pass = DevicePass(exits, projections, cache, self.states, self.tables)
        self._limits = [*_powers_below(slots), slots]
        # All of them now, while nobody has a slot: recording runs what it records.
        recorder = Recorder(device)
        self._recorded = {
            (segment, limit): self._record(recorder, segment, limit)
            for limit in self._limits
            for segment in range(self._num_segments)
        }

    def board(self, boardings: Sequence[Boarding]) -> None:
        """Give slots to requests; they ride from the next launch on."""
        if not boardings:
            return
        states, sampling = self.states, self.tables.sampling
        slots = self._index([each.slot for each in boardings])
        numbers = [(each.token, each.position, each.index) for each in boardings]
        states.token[slots], states.position[slots], states.index[slots] = self._index(numbers).T
        params = [each.sampling for each in boardings]
        sampling.temperature[slots] = self._reals([each.temperature for each in params])
        sampling.top_p[slots] = self._reals([each.top_p for each in params])
        sampling.min_p[slots] = self._reals([each.min_p for each in params])
        sampling.top_k[slots] = self._index([each.top_k for each in params]).to(torch.int32)
        sampling.seed[slots] = self._index([_signed(each.seed) for each in params])
        self.tables.thresholds[slots] = self._reals([list(each.thresholds) for each in boardings])
        blocks = {(each.slot, i): b for each in boardings for i, b in enumerate(each.table)}
        self.grow(blocks, {each.slot: each.end for each in boardings})
        states.waited.index_fill_(0, slots, 0)
        states.stage.index_fill_(0, slots, 0)

    def grow(self, blocks: Mapping[tuple[int, int], int], ends: Mapping[int, int]) -> None:
        """Write K,V blocks, by slot and place in its table, and slots' new ends."""
        if blocks:
            slots, places = self._index(list(blocks)).T
            self.states.table[slots, places] = self._index(list(blocks.values()))
        if ends:
            self.states.end[self._index(list(ends))] = self._index(list(ends.values()))

    def ask(self, thresholds: Mapping[int, Sequence[float]]) -> None:
        """Change the scores at which slots' tokens leave."""
        if thresholds:
            rows = self._reals([list(row) for row in thresholds.values()])
            self.tables.thresholds[self._index(list(thresholds))] = rows

    def hold(self, holds: Sequence[tuple[float, float]]) -> None:
        """For each segment the share of ready slots to wait for, and the rides to wait at most."""
        self.tables.holds.copy_(self._reals([list(pair) for pair in holds]), non_blocking=True)

    def clear(self, slots: Sequence[int]) -> None:
        """Take slots back; a ride under way may still make a token for them."""
        if slots:
            self.states.stage.index_fill_(0, self._index(slots), EMPTY)

    def launch(self, live: int) -> Ride:
        """Start a ride for the slots given out, ``live`` in all."""
        with torch.inference_mode():
            for segment in range(self._num_segments):
                self.launch_segment(segment, live)
            emitted, depth = self._to_host(self.states.emitted), self._to_host(self.states.depth)
            stage, head_rows = self._to_host(self.states.stage), self._to_host(self._pass.head_rows)
        ended = None
        if self._device.type == "cuda":
            ended = torch.cuda.Event()
            ended.record()
        return Ride(emitted, depth, stage, head_rows, self._num_segments, ended)

    def launch_segment(self, segment: int, live: int) -> None:
        """Start one segment of a ride."""
        limit = self._limits[bisect_left(self._limits, live)]
        self._recorded[segment, limit]()

    def seconds(self, segment: int, riders: int) -> float:
        """Time of one segment for ``riders`` at a first position; nobody may have a slot yet."""
        states, times = self.states, []
        for _ in range(_TIMES):
            states.position.zero_()
            states.end.fill_(1)
            states.stage[:riders] = segment
            self._wait()
            begun = time.perf_counter()
            with torch.inference_mode():
                self.launch_segment(segment, riders)
            self._wait()
            times.append(time.perf_counter() - begun)
            states.stage.fill_(EMPTY)
        for each in (states.position, states.end, states.index):
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
        # Pinned, so that the copy is in line behind the ride under way instead of waiting for it.
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


def _signed(seed: int) -> int:
    """The same 64 bits as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
