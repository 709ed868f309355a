"""Time of launches on a device: by CUDA events, or by the clock where there are none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_REPEATS = {"cuda": 25, "cpu": 5}


def synchronise(device: torch.device) -> None:
    """Wait for all that the device was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def seconds(
    device: torch.device,
    launches: Callable[[], None],
    before: Callable[[], None] | None = None,
) -> float:
    """Time of ``launches`` on the device; ``before`` prepares each and is not counted.

    On a GPU it is the median, and all repeats are queued without waiting, so that launching hides
    behind the work of the one before. On a CPU it is the least, since neighbours only add to it.
    """
    repeats = _REPEATS[device.type]
    if device.type != "cuda":
        return min(_clocked(launches, before) for _ in range(repeats))
    marks = []
    for _ in range(repeats + 1):
        if before is not None:
            before()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        launches()
        ended.record()
        marks.append((begun, ended))
    torch.cuda.synchronize(device)
    # The first found an idle device, so it shows how long its launch took.
    times = [float(begun.elapsed_time(ended)) / 1000 for begun, ended in marks[1:]]
    return statistics.median(times)


def _clocked(launches: Callable[[], None], before: Callable[[], None] | None) -> float:
    if before is not None:
        before()
    begun = time.perf_counter()
    launches()
    return time.perf_counter() - begun
