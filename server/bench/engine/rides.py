"""Rides of one mode at one batch, launched one ahead as the engine does, and what they made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from offramp.models.device_loop import DeviceToken, Ride
from offramp.server.bench.engine.clock import synchronise
from offramp.server.bench.engine.options import WARM_UP, Options
from offramp.server.bench.engine.rig import Seat
from offramp.server.bench.errors import Refused


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to decode.

    ``draws`` int64 [tokens, slots] are the depths that tokens take, as ExitTrace.draw gives them,
    ``trace`` fp32 [tokens, slots, exits] the thresholds for that, on the device; ``holds`` as in
    DeviceLoop.hold.
    """

    name: str
    seat: Seat
    draws: Tensor
    trace: Tensor
    holds: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Stretch:
    """What the measured rides took and made; times in seconds, ``layers`` over all tokens.

    ``launching`` is the host's time to start rides, ``waiting`` its time until their results were
    there. ``idle`` is the share of the time in which the GPU was between rides (None on a CPU);
    where the host is late inside a ride, that counts as busy.
    """

    wall: float
    rides: int
    tokens: int
    layers: int
    launching: float
    waiting: float
    idle: float | None


def ride(mode: Mode, options: Options, batch: int) -> Stretch:
    """WARM_UP rides and then those that are measured.

    Raises Refused where a token did not leave as it was drawn: then the figures would be those of
    another trace.
    """
    seat = mode.seat
    seat.follow(mode.trace)
    seat.loop.hold(mode.holds)
    seat.board(batch, options.seed)
    synchronise(options.device)
    stretch, landed = _Measurement(seat, batch, options).run()
    _verify(mode, options, landed)
    return stretch


class _Measurement:
    """One stretch of rides under way."""

    def __init__(self, seat: Seat, batch: int, options: Options) -> None:
        self._seat, self._batch = seat, batch
        self._rides = options.tokens
        self._timed = options.device.type == "cuda"
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._landed: list[list[int]] = [[] for _ in range(batch)]

    def run(self) -> tuple[Stretch, list[list[int]]]:
        """The stretch, and the depths of each slot's tokens since it boarded."""
        begun = tokens = layers = 0
        launching = waiting = started = 0.0
        flying = self._launch()
        for number in range(WARM_UP + self._rides):
            if number == WARM_UP:
                begun, started = tokens, time.perf_counter()
                launching = waiting = 0.0
                layers = 0
            before = time.perf_counter()
            following = self._launch()
            launched = time.perf_counter()
            landed = flying.result().landed
            waiting += time.perf_counter() - launched
            launching += launched - before
            self._note(landed)
            tokens += len(landed)
            layers += sum(each.depth for each in landed.values())
            flying = following
        wall = time.perf_counter() - started
        flying.result()
        idle = self._idle() if self._timed else None
        made = tokens - begun
        return Stretch(wall, self._rides, made, layers, launching, waiting, idle), self._landed

    def _launch(self) -> Ride:
        seat = self._seat
        if not self._timed:
            with torch.inference_mode():
                seat.ask()
            return seat.loop.launch(self._batch)
        mark = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        mark[0].record()
        with torch.inference_mode():
            seat.ask()
        ride = seat.loop.launch(self._batch)
        mark[1].record()
        self._marks.append(mark)
        return ride

    def _note(self, landed: dict[int, DeviceToken]) -> None:
        for slot, each in landed.items():
            self._landed[slot].append(each.depth)

    def _idle(self) -> float:
        # The last ride was launched only so that the one before had company.
        measured = self._marks[WARM_UP - 1 : -1]
        gaps = sum(before[1].elapsed_time(after[0]) for before, after in pairwise(measured))
        return float(gaps / measured[0][1].elapsed_time(measured[-1][1]))


def _verify(mode: Mode, options: Options, landed: Sequence[Sequence[int]]) -> None:
    depths = (*options.exits, options.config.num_layers)
    rows = len(mode.draws)
    for slot, found in enumerate(landed):
        drawn = mode.draws[:, slot].tolist()
        for index, depth in enumerate(found):
            wanted = depths[drawn[index % rows]]
            if depth != wanted:
                raise Refused(
                    f"mode {mode.name}, slot {slot}: token {index} was to take {wanted} layers and "
                    f"took {depth}"
                )
