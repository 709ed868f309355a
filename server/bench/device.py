"""How benchmarks time launches on a device, and what that device can do at best.

On a GPU times come from CUDA events and launches are queued without waiting, so that the work of
Python hides behind the launches before. On a CPU times come from the process's clock.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offramp.models.device_loop import Recorder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Number formats by the names that --dtype takes."""
Launch = Callable[[], object]
"""Starts work on the device; what it returns is not used."""

# A sequence of launches this long hides that the host was at work when it began.
_SEQUENCE_SECONDS = 2e-3
_MOST_LAUNCHES = 2000
_LEAST_SAMPLES, _MOST_SAMPLES = 3, 1000
_REPEATS = {"cuda": 25, "cpu": 5}
# Bytes of the tensors that bandwidth is measured with: beyond any cache.
_BYTES = {"cuda": 1 << 30, "cpu": 512 << 20}
# Edge of the square matrices whose product is timed; small on a CPU, where it is a rehearsal.
_EDGE = {"cuda": 8192, "cpu": 256}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a launch, ``median`` and ``least`` of ``samples`` sequences of ``launches``."""

    median: float
    least: float
    samples: int
    launches: int


class Clock:
    """Times launches that follow each other: a CUDA graph on a GPU, plain calls on a CPU.

    In a graph nothing waits for Python; what a kernel's own start costs the GPU is part of a
    launch. Launches are compiled, and the device has run them, before anything is timed. Raises
    what compiling and launching raise.
    """

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # Each with a pool of memory of its own, given back with its graph.
        self._recorder = Recorder(device)
        self._launches = list(launches)
        self._sequence = self._recorder.record(self._call)
        seconds = self._elapsed()
        if self._on_gpu:
            wanted = max(1, int(_SEQUENCE_SECONDS / max(seconds, 1e-6)))
            times = min(wanted, max(1, _MOST_LAUNCHES // len(self._launches)))
            if times > 1:
                self._launches *= times
                self._sequence = self._recorder.record(self._call)

    def time(self, seconds: float) -> Timing:
        """Repeat the sequence for ``seconds``, at least three times."""
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
        """Seconds of the sequence."""
        if not self._on_gpu:
            return _clocked(self._sequence, None)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the first sequence runs the host hands over the second, which so never waits.
        self._sequence()
        start.record()
        self._sequence()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


@torch.inference_mode()
def seconds_of(device: torch.device, launch: Launch, before: Launch | None = None) -> float:
    """Seconds of ``launch`` on the device; ``before`` prepares each repeat and is not counted.

    On a GPU it is the median of repeats that are queued without waiting. On a CPU it is the least,
    since other processes only add to it.
    """
    repeats = _REPEATS[device.type]
    if device.type != "cuda":
        return min(_clocked(launch, before) for _ in range(repeats))
    marks = []
    for _ in range(repeats + 1):
        if before is not None:
            before()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        launch()
        ended.record()
        marks.append((begun, ended))
    torch.cuda.synchronize(device)
    # The first found an idle device, so it shows how long its launch took.
    times = [float(begun.elapsed_time(ended)) / 1000 for begun, ended in marks[1:]]
    return statistics.median(times)


def _clocked(launch: Launch, before: Launch | None) -> float:
    if before is not None:
        before()
    begun = time.perf_counter()
    launch()
    return time.perf_counter() - begun


def bandwidth(device: torch.device, seconds: float = 0.1) -> tuple[float, float]:
    """Bytes a second that a copy moves (read and written) and that a sum reads.

    From the least times of copying and of summing a large tensor of fp32, each tried for
    ``seconds``.
    """
    size = _BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = Clock([lambda: target.copy_(source)], device).time(seconds)
    summed = Clock([source.sum], device).time(seconds)
    return 2 * size / copied.least, size / summed.least


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second of a copy (read and written) and of a sum; a matrix product's flops."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float

    def bound(self, size: int, flops: int) -> tuple[float, str]:
        """Seconds that ``size`` bytes and ``flops`` take at least, and what bounds them.

        The bound is memory, at the better of the two bandwidths, or compute.
        """
        memory = size / max(self.copy_bytes_per_s, self.read_bytes_per_s)
        compute = flops / self.flops_per_s
        return (memory, "memory") if memory >= compute else (compute, "compute")


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Best of a copy and a sum of fp32 numbers, and of a square product of ``dtype``."""
    edge = _EDGE[device.type]
    copied, read = bandwidth(device, seconds)
    left, right = (torch.randn(edge, edge, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    multiplied = Clock([lambda: torch.mm(left, right, out=product)], device).time(seconds)
    return Ceilings(copied, read, 2 * edge**3 / multiplied.least)


def processor() -> str:
    """Name of the CPU."""
    return platform.processor() or platform.machine()


def machine_facts() -> dict[str, Any]:
    """The machine of a run on a CPU, as reports name it."""
    return {
        "processor": processor(),
        "torch": torch.__version__,
        **cpu_facts(),
        "load_average": os.getloadavg()[0],
    }


def cpu_facts() -> dict[str, Any]:
    """What decides a CPU's speed beside its name."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
    }
