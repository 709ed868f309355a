"""A case's figures beside what the device could do."""

from __future__ import annotations

from typing import Any

from offramp.server.bench.kernels.case import Case
from offramp.server.bench.kernels.ceilings import Ceilings
from offramp.server.bench.kernels.clock import Clock, Timing
from offramp.server.bench.kernels.setup import Setup
from offramp.server.bench.report import Column

COLUMNS: tuple[Column, ...] = (
    ("op", "op", "{}"),
    ("of", "what", "{}"),
    ("rows", "rows", "{}"),
    ("us", "us", "{:.2f}"),
    ("least", "us_least", "{:.2f}"),
    ("empty us", "empty_us", "{:.2f}"),
    ("MB", "megabytes", "{:.3f}"),
    ("GFLOP", "gigaflops", "{:.3f}"),
    ("GB/s", "gb_per_s", "{:.1f}"),
    ("TFLOP/s", "tflop_per_s", "{:.3f}"),
    ("ceiling", "ceiling", "{}"),
    ("share", "share", "{:.3f}"),
)


def measure_case(setup: Setup, case: Case, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """Time a case, then the same launches with nobody riding, for ``seconds`` each."""
    clock = Clock(case.launches, setup.device)
    timing = clock.time(seconds)
    nobody = None
    if case.empty is not None:
        case.empty()
        nobody = clock.time(seconds)
    return figures(case, timing, nobody, ceilings)


def figures(
    case: Case, timing: Timing, nobody: Timing | None, ceilings: Ceilings
) -> dict[str, Any]:
    """Times in microseconds; ``share`` is the least time by the ceilings to the median one."""
    work = case.work
    least, ceiling = ceilings.bound(work)
    return {
        "op": case.op,
        "what": case.what,
        "rows": case.rows,
        "us": round(1e6 * timing.median, 3),
        "us_least": round(1e6 * timing.least, 3),
        "empty_us": None if nobody is None else round(1e6 * nobody.median, 3),
        "read_bytes": work.read,
        "written_bytes": work.written,
        "flops": work.flops,
        "megabytes": work.bytes / 1e6,
        "gigaflops": work.flops / 1e9,
        "gb_per_s": round(work.bytes / timing.median / 1e9, 3),
        "tflop_per_s": round(work.flops / timing.median / 1e12, 6),
        "ceiling": ceiling,
        "share": round(least / timing.median, 6),
        "cold_bytes": case.cold,
        "samples": timing.samples,
        "launches": timing.launches,
    }
