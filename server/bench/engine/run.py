"""One run of ``offramp bench engine``, from the check to the report.

Modes: ``full`` is a loop without exits, ``exits-closed`` one with exits that no token takes,
``exits`` one whose tokens leave as in the trace, ``exits-no-hold`` the same without holding tokens
back.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp import __version__
from offramp.kernels.backend import triton
from offramp.server.bench.common import (
    BenchError,
    Report,
    Say,
    columns,
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
from offramp.server.bench.engine.simulation import holds_for, launch_bytes, paper_report, simulated

FULL, NO_EXIT, EXITS, NO_HOLD = "full", "exits-closed", "exits", "exits-no-hold"

_ROWS = columns(
    "mode {mode} | batch {batch} | tokens/s {tokens_per_s:.1f} | x full {speed_up:.3f} | "
    "best {best_speed_up:.3f} | best, paid {best_paid_speed_up:.3f} | "
    "limit {limit_speed_up:.3f} | pass ms {pass_ms:.3f} | tokens/pass {tokens_per_pass:.2f} | "
    "depth {mean_depth:.2f} | efficiency {exit_efficiency:.2f} | launch ms {launch_ms:.3f} | "
    "host waits {host_wait_share:.2f} | GPU idle {gpu_idle_share:.3f}"
)
_SEGMENTS = columns(
    "mode {mode} | batch {batch} | segment {segment} | layers {layers} | ms {ms:.3f} | "
    "if all leave +{leaving_ms:.3f} | no rows {empty_ms:.3f}"
)
_BOUNDS = columns(
    "batch {batch} | MB a pass {pass_mb:.1f} | bound ms {bound_ms:.3f} | "
    "full ms {full_pass_ms:.3f} | roofline {roofline_share:.3f} | closed/full {machinery:.3f} | "
    "fill ms {fill_ms:.3f} | fill share {fill_share:.3f}"
)


def bench(args: argparse.Namespace, command: str, say: Say) -> Report:
    """Check the loop, then time it; raises BenchError, and Refused where the loop is wrong."""
    options = read_options(args)
    if args.on_paper is not None:
        return paper_report(options, args.on_paper, command)
    check_memory(options)
    say("checking the decode loop against single steps")
    checked = check_loop(options.device, options.seed)
    say(f"bandwidth of the {options.device.type}'s memory")
    speed = max(bandwidth(options.device))
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    say(f"making {options.shape} with random weights and recording its loops")
    random_model = _model(options)
    draws = options.trace.draw(options.tokens, options.seqs, options.seed)
    full, exits = dict[int, list[SegmentTime]](), dict[int, list[SegmentTime]]()
    # One row's times are what holding is weighed with, whether or not --batch has it.
    for batch in sorted({1, *options.batches}):
        say(f"segments alone, {batch} active rows")
        full[batch] = segment_times(random_model, random_model.full, batch)
        exits[batch] = segment_times(random_model, random_model.exits, batch)
    rows, bounds = list[dict[str, Any]](), list[dict[str, Any]]()
    for batch in options.batches:
        fill = fill_seconds(random_model, draws, batch)
        modes = _modes(random_model, draws, holds_for(options, exits, batch))
        rounds = _rounds(options, modes, batch, say)
        for mode in modes:
            row = _row(options, mode, batch, rounds[mode.name], rounds[FULL])
            if mode.name in {EXITS, NO_HOLD}:
                row |= simulated(options, draws.tolist(), mode.holds, full, exits, batch)
            rows.append(row)
        size = launch_bytes(random_model, batch)
        bounds.append({"batch": batch, **_bound(options, size, speed, fill, rounds)})
    segments = [
        _segment(options, mode, time)
        for mode, times in ((FULL, full), (NO_EXIT, exits))
        for by_batch in times.values()
        for time in by_batch
    ]
    document = _document(options, command) | {
        "check": checked,
        "rows": rows,
        "segments": segments,
        "bounds": {
            "bandwidth_bytes_per_s": round(speed),
            "weight_bytes": random_model.model.weight_bytes,
            "gpu_bytes_reserved": torch.cuda.max_memory_reserved(options.device)
            if options.device.type == "cuda"
            else None,
            "rows": bounds,
        },
    }
    tables = _tables(options, document)
    return Report(f"{tables}\n", document, tables)


def _model(options: Options) -> RandomModel:
    try:
        return RandomModel(options)
    except torch.OutOfMemoryError as error:
        raise BenchError(
            f"{options.shape} with {options.seqs} sequences does not fit the GPU's memory "
            "beside what else is there; lower --batch or --context"
        ) from error


def _modes(random_model: RandomModel, draws: Tensor, holds: Holds) -> list[Mode]:
    options, exits = random_model.options, len(random_model.options.exits)
    top = torch.full_like(draws, exits)
    stays, leaves = (thresholds(drawn, exits).to(options.device) for drawn in (top, draws))
    no_holds = [(0.0, 0.0)] * (exits + 1)
    modes = [
        Mode(FULL, random_model.full, top, stays, no_holds[:1]),
        Mode(NO_EXIT, random_model.exits, top, stays, no_holds),
        Mode(EXITS, random_model.exits, draws, leaves, holds),
    ]
    if options.hold != "off":
        modes.append(Mode(NO_HOLD, random_model.exits, draws, leaves, no_holds))
    return modes


def _rounds(
    options: Options, modes: Sequence[Mode], batch: int, say: Say
) -> dict[str, list[Decoded]]:
    """The measured rounds of each mode; the order of modes alternates."""
    found: dict[str, list[Decoded]] = {mode.name: [] for mode in modes}
    for number in range(options.rounds):
        for mode in reversed(modes) if number % 2 else modes:
            say(f"batch {batch}, round {number + 1}, {mode.name}")
            found[mode.name].append(decode(mode, options, batch))
    return found


def _row(
    options: Options, mode: Mode, batch: int, rounds: Sequence[Decoded], full: Sequence[Decoded]
) -> dict[str, Any]:
    """Medians over the rounds of a mode; ``full`` are those of the loop without exits."""
    speeds = [each.tokens / each.wall for each in rounds]
    tokens, layers = (sum(getattr(each, name) for each in rounds) for name in ("tokens", "layers"))
    launches = sum(each.launches for each in rounds)
    idle = [each.idle for each in rounds if each.idle is not None]
    row: dict[str, Any] = {
        "mode": mode.name,
        "batch": batch,
        "tokens_per_s": round(statistics.median(speeds), 3),
        "tokens_per_s_min": round(min(speeds), 3),
        "tokens_per_s_max": round(max(speeds), 3),
        "pass_ms": _ms(_launch_seconds(rounds)),
        "tokens_per_pass": round(tokens / launches, 4),
        "mean_depth": round(layers / tokens, 4) if tokens else None,
        "layers_executed": layers,
        "launch_ms": _ms(statistics.median(each.launching / each.launches for each in rounds)),
        "host_wait_share": round(statistics.median(s.waiting / s.wall for s in rounds), 4),
        "gpu_idle_share": round(statistics.median(idle), 4) if idle else None,
        "holds": [(round(share, 4), round(longest, 3)) for share, longest in mode.holds],
    }
    if mode.name == FULL:
        return row
    pairs = zip(speeds, (each.tokens / each.wall for each in full), strict=True)
    speed_up = statistics.median(own / base for own, base in pairs)
    row["speed_up"] = round(speed_up, 4)
    if tokens:
        efficiency = exit_efficiency(speed_up, options.config.num_layers, layers / tokens)
        row["exit_efficiency"] = None if efficiency is None else round(efficiency, 4)
    return row


def _segment(options: Options, mode: str, time: SegmentTime) -> dict[str, Any]:
    """One segment's times; the loop without exits has a single segment."""
    bounds = (0, *options.exits, options.config.num_layers)
    layers = bounds[time.segment + 1] - bounds[time.segment]
    return {
        "mode": mode,
        "batch": time.batch,
        "segment": time.segment,
        "layers": options.config.num_layers if mode == FULL else layers,
        "ms": _ms(time.running),
        "leaving_ms": None if time.leaving is None else _ms(time.leaving),
        "empty_ms": _ms(time.empty),
    }


def _bound(
    options: Options, size: int, speed: float, fill: float, rounds: Mapping[str, Sequence[Decoded]]
) -> dict[str, Any]:
    """Memory's bound on a launch that reads ``size`` bytes, and what exits add to a launch."""
    full, no_exit = _launch_seconds(rounds[FULL]), _launch_seconds(rounds[NO_EXIT])
    leaving = _launch_seconds(rounds[EXITS if options.hold == "off" else NO_HOLD])
    return {
        "pass_mb": round(size / 1e6, 3),
        "bound_ms": _ms(size / speed),
        "full_pass_ms": _ms(full),
        "roofline_share": round(size / speed / full, 4),
        "machinery": round(no_exit / full, 4),
        "fill_ms": _ms(fill),
        "fill_share": round(fill / leaving, 4),
    }


def _launch_seconds(rounds: Sequence[Decoded]) -> float:
    """Median over the rounds of the mean time of a launch."""
    return statistics.median(each.wall / each.launches for each in rounds)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def _tables(options: Options, document: Mapping[str, Any]) -> str:
    """Markdown, with what its columns mean."""
    trace, bounds = options.trace, document["bounds"]
    pairs = zip(trace.depths, trace.shares, strict=True)
    shares = ", ".join(f"{depth}: {share:.3f}" for depth, share in pairs)
    return (
        f"{options.shape}, random weights, {_dtype(options)}, {_device(options)}; "
        f"{options.context} tokens of context, {options.rounds} x {options.tokens} passes\n"
        f"tokens by layers ({trace.rule}): {shares}; mean {trace.mean_depth:.2f} of "
        f"{options.config.num_layers}\n\n"
        f"{table(document['rows'], _ROWS)}\n\n"
        "best: the same policy and trace simulated with segment times as measured, no "
        "overhead, leaving free; paid: with gates and leaving as measured; limit: as best, "
        "with the best of many ways of holding\n\n"
        f"{table(document['segments'], _SEGMENTS)}\n\n"
        f"{table(bounds['rows'], _BOUNDS)}\n\n"
        f"bound: weights ({bounds['weight_bytes'] / 1e6:.1f} MB) and K,V of a pass at "
        f"{bounds['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s as measured\n"
    )


def _document(options: Options, command: str) -> dict[str, Any]:
    """The part of the document that is known before anything is measured."""
    config, trace = options.config, options.trace
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    return {
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
        "shape": {
            "name": options.shape,
            "weights": "random",
            "dtype": _dtype(options),
            **{name: getattr(config, name) for name in (*names, "head_dim", "vocab_size")},
            "tied": config.tie_word_embeddings,
            "exit_layers": options.exits,
            "exit_width": options.width,
            "exit_gate": options.gate,
            "exit_vocab": options.vocab,
        },
        "trace": {
            "depths": trace.depths,
            "shares": [round(share, 6) for share in trace.shares],
            "mean_depth": round(trace.mean_depth, 4),
            "rule": trace.rule,
            "seed": options.seed,
        },
        **{name: getattr(options, name) for name in ("context", "tokens", "rounds", "hold")},
    }


def _dtype(options: Options) -> str:
    return str(options.dtype).removeprefix("torch.")


def _device(options: Options) -> str:
    if options.device.type == "cuda":
        return torch.cuda.get_device_name(options.device)
    return f"CPU {processor()}, {torch.get_num_threads()} threads (references, no kernels)"
