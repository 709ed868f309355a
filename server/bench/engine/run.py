"""One run of ``offramp bench engine``, from the check to the report.

Modes: ``full`` is a loop without exits, ``nobody`` one with exits that no token takes, ``exits``
one whose tokens leave as in the trace, ``exits-no-hold`` the same without holding tokens back.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp import __version__
from offramp.kernels.backend import triton
from offramp.server.bench.common import (
    BenchError,
    Column,
    Report,
    Say,
    exit_efficiency,
    table,
    today,
)
from offramp.server.bench.device import bandwidth, processor
from offramp.server.bench.engine.check import check_loop
from offramp.server.bench.engine.decode import (
    Decoded,
    Holds,
    Mode,
    SegmentTime,
    decode,
    fill_seconds,
    segment_times,
)
from offramp.server.bench.engine.model import RandomModel
from offramp.server.bench.engine.options import Options, check_memory, read_options, thresholds
from offramp.server.bench.engine.simulation import Best, best, holds_for, launch_bytes, paper_report

FULL, NO_EXIT, EXITS, NO_HOLD = "full", "nobody", "exits", "exits-no-hold"

_ROWS: tuple[Column, ...] = (
    ("mode", "mode", "{}"),
    ("batch", "batch", "{}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("x full", "speed_up", "{:.3f}"),
    ("best", "best_speed_up", "{:.3f}"),
    ("best, paid", "best_paid_speed_up", "{:.3f}"),
    ("limit", "limit_speed_up", "{:.3f}"),
    ("ride ms", "ride_ms", "{:.3f}"),
    ("tokens/ride", "tokens_per_ride", "{:.2f}"),
    ("depth", "mean_depth", "{:.2f}"),
    ("efficiency", "exit_efficiency", "{:.2f}"),
    ("launch ms", "launch_ms", "{:.3f}"),
    ("host waits", "host_wait_share", "{:.2f}"),
    ("GPU idle", "gpu_idle_share", "{:.3f}"),
)
_SEGMENTS: tuple[Column, ...] = (
    ("mode", "mode", "{}"),
    ("batch", "batch", "{}"),
    ("segment", "segment", "{}"),
    ("layers", "layers", "{}"),
    ("ms", "ms", "{:.3f}"),
    ("if all leave", "leaving_ms", "+{:.3f}"),
    ("nobody there", "empty_ms", "{:.3f}"),
)
_BOUNDS: tuple[Column, ...] = (
    ("batch", "batch", "{}"),
    ("MB a ride", "ride_mb", "{:.1f}"),
    ("bound ms", "bound_ms", "{:.3f}"),
    ("full ms", "full_ride_ms", "{:.3f}"),
    ("roofline", "roofline_share", "{:.3f}"),
    ("nobody/full", "machinery", "{:.3f}"),
    ("fill ms", "fill_ms", "{:.3f}"),
    ("fill share", "fill_share", "{:.3f}"),
)


@dataclass(slots=True)
class Findings:
    """What a run found, times in seconds.

    ``full`` and ``exits`` are the segments' times of both loops by batch; ``decoded`` the measured
    rounds, ``best`` what the trace allows and ``holds`` what tokens were held back for, by mode and
    batch; ``fills`` the time of a launch's K,V fills by batch. ``bandwidth`` is in bytes a second,
    ``launch_bytes`` what a launch of a batch reads.
    """

    options: Options
    check: Mapping[str, object]
    weight_bytes: int
    bandwidth: float
    launch_bytes: dict[int, int]
    full: dict[int, list[SegmentTime]] = field(default_factory=dict)
    exits: dict[int, list[SegmentTime]] = field(default_factory=dict)
    fills: dict[int, float] = field(default_factory=dict)
    decoded: dict[tuple[str, int], list[Decoded]] = field(default_factory=dict)
    best: dict[tuple[str, int], Best] = field(default_factory=dict)
    holds: dict[tuple[str, int], Holds] = field(default_factory=dict)
    gpu_bytes: int | None = None


def bench(args: argparse.Namespace, command: str, say: Say) -> Report:
    """Check, then measure; raises BenchError, and Refused where the loop is wrong."""
    options = read_options(args)
    if args.on_paper is not None:
        return paper_report(options, args.on_paper, command)
    findings = measure(options, say)
    rows = [_row(findings, key) for key in findings.decoded]
    segments = _segments(findings)
    bounds = [_bound(findings, batch) for batch in options.batches]
    tables = _tables(findings, rows, segments, bounds)
    document = {
        "command": command,
        "date": today(),
        "device": _device(options),
        "versions": {
            "offramp": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": getattr(triton, "__version__", None),
        },
        "shape": _shape(options),
        "trace": {
            "depths": options.trace.depths,
            "shares": [round(share, 6) for share in options.trace.shares],
            "mean_depth": round(options.trace.mean_depth, 4),
            "rule": options.trace.rule,
            "seed": options.seed,
        },
        "check": findings.check,
        "context": options.context,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "hold": options.hold,
        "rows": rows,
        "segments": segments,
        "bounds": {
            "bandwidth_bytes_per_s": round(findings.bandwidth),
            "weight_bytes": findings.weight_bytes,
            "gpu_bytes_reserved": findings.gpu_bytes,
            "rows": bounds,
        },
    }
    return Report(f"{tables}\n", document, tables)


def measure(options: Options, say: Say) -> Findings:
    """Check the loop, then time it; raises BenchError, and Refused where the loop is wrong."""
    check_memory(options)
    say("checking the decode loop against single steps")
    checked = check_loop(options.device, options.seed)
    say(f"bandwidth of the {options.device.type}'s memory")
    speed = max(bandwidth(options.device))
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    say(f"making {options.shape} with random weights and recording its loops")
    owner = _model(options)
    read = {batch: launch_bytes(owner, batch) for batch in options.batches}
    findings = Findings(options, checked, owner.model.weight_bytes, speed, read)
    draws = options.trace.draw(options.tokens, options.slots, options.seed)
    # One row's times are what holding is weighed with, whether or not --batch has it.
    for batch in sorted({1, *options.batches}):
        say(f"segments alone, {batch} active rows")
        findings.full[batch] = segment_times(owner, owner.full, batch)
        findings.exits[batch] = segment_times(owner, owner.exits, batch)
    for batch in options.batches:
        findings.fills[batch] = fill_seconds(owner, draws, batch)
        _measure_batch(owner, findings, draws, batch, say)
    if options.device.type == "cuda":
        findings.gpu_bytes = torch.cuda.max_memory_reserved(options.device)
    return findings


def _model(options: Options) -> RandomModel:
    try:
        return RandomModel(options)
    except torch.OutOfMemoryError as error:
        raise BenchError(
            f"{options.shape} with {options.slots} slots does not fit the GPU's memory beside what "
            "else is there; lower --batch or --context"
        ) from error


def _measure_batch(
    owner: RandomModel, findings: Findings, draws: Tensor, batch: int, say: Say
) -> None:
    options = owner.options
    modes = _modes(owner, findings, draws, batch)
    for number in range(options.rounds):
        for mode in reversed(modes) if number % 2 else modes:
            say(f"batch {batch}, round {number + 1}, {mode.name}")
            found = findings.decoded.setdefault((mode.name, batch), [])
            found.append(decode(mode, options, batch))
    for mode in modes:
        key = mode.name, batch
        findings.holds[key] = mode.holds
        if mode.name in {EXITS, NO_HOLD}:
            times = findings.full, findings.exits
            findings.best[key] = best(options, draws.tolist(), mode.holds, *times, batch)


def _modes(owner: RandomModel, findings: Findings, draws: Tensor, batch: int) -> list[Mode]:
    options, exits = owner.options, len(owner.options.exits)
    top = torch.full_like(draws, exits)
    stays, leaves = (thresholds(drawn, exits).to(options.device) for drawn in (top, draws))
    no_holds = [(0.0, 0.0)] * (exits + 1)
    modes = [
        Mode(FULL, owner.full, top, stays, no_holds[:1]),
        Mode(NO_EXIT, owner.exits, top, stays, no_holds),
        Mode(EXITS, owner.exits, draws, leaves, holds_for(options, findings.exits, batch)),
    ]
    if options.hold != "off":
        modes.append(Mode(NO_HOLD, owner.exits, draws, leaves, no_holds))
    return modes


def _row(found: Findings, key: tuple[str, int]) -> dict[str, Any]:
    """Medians over the rounds of a mode at a batch."""
    rounds = found.decoded[key]
    speeds = [each.tokens / each.wall for each in rounds]
    tokens, layers = (sum(getattr(each, name) for each in rounds) for name in ("tokens", "layers"))
    launches = sum(each.launches for each in rounds)
    idle = [each.idle for each in rounds if each.idle is not None]
    row: dict[str, Any] = {
        "mode": key[0],
        "batch": key[1],
        "tokens_per_s": round(statistics.median(speeds), 3),
        "tokens_per_s_min": round(min(speeds), 3),
        "tokens_per_s_max": round(max(speeds), 3),
        "ride_ms": _ms(_launch_seconds(found, *key)),
        "tokens_per_ride": round(tokens / launches, 4),
        "mean_depth": round(layers / tokens, 4) if tokens else None,
        "layers_executed": layers,
        "launch_ms": _ms(statistics.median(each.launching / each.launches for each in rounds)),
        "host_wait_share": round(statistics.median(s.waiting / s.wall for s in rounds), 4),
        "gpu_idle_share": round(statistics.median(idle), 4) if idle else None,
        "holds": [(round(share, 4), round(longest, 3)) for share, longest in found.holds[key]],
    }
    if key[0] == FULL:
        return row
    # Over the loop without exits in the same round.
    pairs = zip(rounds, found.decoded[FULL, key[1]], strict=True)
    speed_up = statistics.median((a.tokens / a.wall) / (b.tokens / b.wall) for a, b in pairs)
    row["speed_up"] = round(speed_up, 4)
    if tokens:
        efficiency = exit_efficiency(speed_up, found.options.config.num_layers, layers / tokens)
        row["exit_efficiency"] = None if efficiency is None else round(efficiency, 4)
    if key in found.best:
        row["best_speed_up"] = round(found.best[key].free, 4)
        row["best_paid_speed_up"] = round(found.best[key].paid, 4)
        row["limit_speed_up"] = round(found.best[key].limit, 4)
    return row


def _segments(found: Findings) -> list[dict[str, Any]]:
    """Both loops' segments at every batch; the one without exits has a single segment."""
    options = found.options
    bounds = (0, *options.exits, options.config.num_layers)
    rows = []
    for mode, by_batch in ((FULL, found.full), (NO_EXIT, found.exits)):
        for time in (time for times in by_batch.values() for time in times):
            first, last = bounds[time.segment], bounds[time.segment + 1]
            rows.append(
                {
                    "mode": mode,
                    "batch": time.batch,
                    "segment": time.segment,
                    "layers": options.config.num_layers if mode == FULL else last - first,
                    "ms": _ms(time.running),
                    "leaving_ms": None if time.leaving is None else _ms(time.leaving),
                    "empty_ms": _ms(time.empty),
                }
            )
    return rows


def _bound(found: Findings, batch: int) -> dict[str, Any]:
    """Memory's bound on a launch at full depth, and what exits add to a launch."""
    full, no_exit = (_launch_seconds(found, mode, batch) for mode in (FULL, NO_EXIT))
    leaving = _launch_seconds(found, EXITS if found.options.hold == "off" else NO_HOLD, batch)
    least = found.launch_bytes[batch] / found.bandwidth
    return {
        "batch": batch,
        "ride_mb": round(found.launch_bytes[batch] / 1e6, 3),
        "bound_ms": _ms(least),
        "full_ride_ms": _ms(full),
        "roofline_share": round(least / full, 4),
        "machinery": round(no_exit / full, 4),
        "fill_ms": _ms(found.fills[batch]),
        "fill_share": round(found.fills[batch] / leaving, 4),
    }


def _launch_seconds(found: Findings, mode: str, batch: int) -> float:
    """Median over the rounds of the mean time of a launch."""
    return statistics.median(each.wall / each.launches for each in found.decoded[mode, batch])


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def _tables(
    found: Findings,
    rows: Sequence[Mapping[str, Any]],
    segments: Sequence[Mapping[str, Any]],
    bounds: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown, with what its columns mean."""
    options, trace = found.options, found.options.trace
    pairs = zip(trace.depths, trace.shares, strict=True)
    shares = ", ".join(f"{depth}: {share:.3f}" for depth, share in pairs)
    return (
        f"{options.shape}, random weights, {_dtype(options)}, {_device(options)}; "
        f"{options.context} tokens of context, {options.rounds} x {options.tokens} rides\n"
        f"tokens by layers ({trace.rule}): {shares}; mean {trace.mean_depth:.2f} of "
        f"{options.config.num_layers}\n\n"
        f"{table(rows, _ROWS)}\n\n"
        "best: the same policy and trace simulated with segment times as measured, no "
        "overhead, leaving free; paid: with gates and leaving as measured; limit: as best, "
        "with the best of many ways of holding\n\n"
        f"{table(segments, _SEGMENTS)}\n\n"
        f"{table(bounds, _BOUNDS)}\n\n"
        f"bound: weights ({found.weight_bytes / 1e6:.1f} MB) and K,V of a ride at "
        f"{found.bandwidth / 1e9:.1f} GB/s as measured\n"
    )


def _dtype(options: Options) -> str:
    return str(options.dtype).removeprefix("torch.")


def _device(options: Options) -> str:
    if options.device.type == "cuda":
        return torch.cuda.get_device_name(options.device)
    return f"CPU {processor()}, {torch.get_num_threads()} threads (references, no kernels)"


def _shape(options: Options) -> dict[str, Any]:
    config = options.config
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    return {
        "name": options.shape,
        "weights": "random",
        "dtype": _dtype(options),
        **{name: getattr(config, name) for name in (*names, "head_dim", "vocab_size")},
        "tied": config.tie_word_embeddings,
        "exit_layers": options.exits,
        "exit_width": options.width,
        "exit_gate": options.gate,
        "exit_vocab": options.vocab,
    }
