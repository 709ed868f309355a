"""How long a launch takes in a long row of launches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offramp.models.device_loop import Recorder
from offramp.server.bench.kernels.case import Launch

_ROW_SECONDS = 2e-3
"""A row this long hides that the host was at work when it began."""
_MOST_LAUNCHES = 2000
_LEAST_SAMPLES, _MOST_SAMPLES = 3, 1000


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a launch, ``median`` and ``least`` of ``samples`` rows of ``launches`` each."""

    median: float
    least: float
    samples: int
    launches: int


class Clock:
    """Launches in a row, over and over: a CUDA graph on a GPU, plain calls on a CPU.

    In a graph nothing waits for Python; what a kernel's own start costs the GPU is part of a
    launch. Launches are compiled, and the device has run them, before anything is timed. Raises
    what compiling and launching raise.
    """

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # Each with a pool of memory of its own, given back with its graph.
        self._recorder = Recorder(device)
        self._launches = list(launches)
        self._row = self._recorder.record(self._call)
        seconds = self._elapsed()
        if self._on_gpu:
            wanted = max(1, int(_ROW_SECONDS / max(seconds, 1e-6)))
            times = min(wanted, max(1, _MOST_LAUNCHES // len(self._launches)))
            if times > 1:
                self._launches *= times
                self._row = self._recorder.record(self._call)

    def time(self, seconds: float) -> Timing:
        """Time rows for ``seconds``, at least three of them."""
        samples: list[float] = []
        ends = time.perf_counter() + seconds
        while len(samples) < _LEAST_SAMPLES or (
            time.perf_counter() < ends and len(samples) < _MOST_SAMPLES
        ):
            samples.append(self._elapsed() / len(self._launches))
        return Timing(statistics.median(samples), min(samples), len(samples), len(self._launches))

    def _call(self) -> None:
        for launch in self._launches:
            launch()

    def _elapsed(self) -> float:
        """Seconds of one row."""
        if not self._on_gpu:
            begun = time.perf_counter()
            self._row()
            return time.perf_counter() - begun
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the first row runs the host hands over the second, which therefore never waits.
        self._row()
        start.record()
        self._row()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3
