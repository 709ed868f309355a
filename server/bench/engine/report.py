"""Figures of an engine bench: tables for people, then one line of JSON."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from offramp import __version__
from offramp.kernels.backend import triton
from offramp.server.bench.engine.options import Options
from offramp.server.bench.engine.run import EXITS, FULL, NO_HOLD, NOBODY, Findings, speed_ups
from offramp.server.bench.report import Column, exit_efficiency, table

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


class EngineReport:
    """What a run found, as text."""

    def __init__(self, findings: Findings, command: str) -> None:
        self._found = findings
        self._command = command
        self._rows = [_row(findings, key) for key in findings.stretches]
        self._segments = _segments(findings)
        self._bounds = [_bound(findings, batch) for batch in findings.options.batches]

    def tables(self) -> str:
        """Markdown, with what its columns mean."""
        found, options = self._found, self._found.options
        trace = options.trace
        pairs = zip(trace.depths, trace.shares, strict=True)
        shares = ", ".join(f"{depth}: {share:.3f}" for depth, share in pairs)
        return (
            f"{options.shape}, random weights, {_dtype(options)}, {_device(options)}; "
            f"{options.context} tokens of context, {options.rounds} x {options.tokens} rides\n"
            f"tokens by layers ({trace.rule}): {shares}; mean {trace.mean_depth:.2f} of "
            f"{options.config.num_layers}\n\n"
            f"{table(self._rows, _ROWS)}\n\n"
            "best: the same policy and trace simulated with segment times as measured, no "
            "overhead, leaving free; paid: with gates and leaving as measured; limit: as best, "
            "with the best of many ways of holding\n\n"
            f"{table(self._segments, _SEGMENTS)}\n\n"
            f"{table(self._bounds, _BOUNDS)}\n\n"
            f"bound: weights ({found.weight_bytes / 1e6:.1f} MB) and K,V of a ride at "
            f"{found.bandwidth / 1e9:.1f} GB/s as measured\n"
        )

    def json(self) -> str:
        """One line."""
        found, options = self._found, self._found.options
        document = {
            "command": self._command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": _device(options),
            "versions": _versions(),
            "shape": _shape(options),
            "trace": {
                "depths": options.trace.depths,
                "shares": [round(share, 6) for share in options.trace.shares],
                "mean_depth": round(options.trace.mean_depth, 4),
                "rule": options.trace.rule,
                "seed": options.seed,
            },
            "check": found.check,
            "context": options.context,
            "tokens": options.tokens,
            "rounds": options.rounds,
            "hold": options.hold,
            "rows": self._rows,
            "segments": self._segments,
            "bounds": {
                "bandwidth_bytes_per_s": round(found.bandwidth),
                "weight_bytes": found.weight_bytes,
                "gpu_bytes_reserved": found.gpu_bytes,
                "rows": self._bounds,
            },
        }
        return json.dumps(document)


def _row(found: Findings, key: tuple[str, int]) -> dict[str, Any]:
    """Medians over the rounds of a mode at a batch."""
    stretches = found.stretches[key]
    speeds = [each.tokens / each.wall for each in stretches]
    tokens, layers = (sum(getattr(s, name) for s in stretches) for name in ("tokens", "layers"))
    rides = sum(each.rides for each in stretches)
    idle = [each.idle for each in stretches if each.idle is not None]
    row: dict[str, Any] = {
        "mode": key[0],
        "batch": key[1],
        "tokens_per_s": round(statistics.median(speeds), 3),
        "tokens_per_s_min": round(min(speeds), 3),
        "tokens_per_s_max": round(max(speeds), 3),
        "ride_ms": _ms([each.wall / each.rides for each in stretches]),
        "tokens_per_ride": round(tokens / rides, 4),
        "mean_depth": round(layers / tokens, 4) if tokens else None,
        "layers_executed": layers,
        "launch_ms": _ms([each.launching / each.rides for each in stretches]),
        "host_wait_share": round(statistics.median(s.waiting / s.wall for s in stretches), 4),
        "gpu_idle_share": round(statistics.median(idle), 4) if idle else None,
        "holds": [(round(share, 4), round(rides, 3)) for share, rides in found.holds[key]],
    }
    if key[0] == FULL:
        return row
    speed_up = statistics.median(speed_ups(found, key))
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
    """Both loops' segments at every batch; those without exits have one."""
    options = found.options
    bounds = (0, *options.exits, options.config.num_layers)
    rows = []
    for mode, by_batch in ((FULL, found.full), (NOBODY, found.exits)):
        for batch, times in by_batch.items():
            for time in times:
                first, last = bounds[time.segment], bounds[time.segment + 1]
                layers = options.config.num_layers if mode == FULL else last - first
                rows.append(
                    {
                        "mode": mode,
                        "batch": batch,
                        "segment": time.segment,
                        "layers": layers,
                        "ms": round(1e3 * time.riding, 4),
                        "leaving_ms": None
                        if time.leaving is None
                        else round(1e3 * time.leaving, 4),
                        "empty_ms": round(1e3 * time.empty, 4),
                    }
                )
    return rows


def _bound(found: Findings, batch: int) -> dict[str, Any]:
    """Memory's bound on a full ride, and what exits add to a ride."""
    ride = {mode: _ride(found, mode, batch) for mode in (FULL, NOBODY)}
    leaving = _ride(found, EXITS if found.options.hold == "off" else NO_HOLD, batch)
    least = found.ride_bytes[batch] / found.bandwidth
    return {
        "batch": batch,
        "ride_mb": round(found.ride_bytes[batch] / 1e6, 3),
        "bound_ms": round(1e3 * least, 4),
        "full_ride_ms": round(1e3 * ride[FULL], 4),
        "roofline_share": round(least / ride[FULL], 4),
        "machinery": round(ride[NOBODY] / ride[FULL], 4),
        "fill_ms": round(1e3 * found.fills[batch], 4),
        "fill_share": round(found.fills[batch] / leaving, 4),
    }


def _ride(found: Findings, mode: str, batch: int) -> float:
    """Median seconds of a ride."""
    return statistics.median(each.wall / each.rides for each in found.stretches[mode, batch])


def _ms(seconds: Sequence[float]) -> float:
    return round(1e3 * statistics.median(seconds), 4)


def _dtype(options: Options) -> str:
    return str(options.dtype).removeprefix("torch.")


def _device(options: Options) -> str:
    if options.device.type == "cuda":
        return torch.cuda.get_device_name(options.device)
    processor = platform.processor() or platform.machine()
    return f"CPU {processor}, {torch.get_num_threads()} threads (references, no kernels)"


def _versions() -> dict[str, str | None]:
    return {
        "offramp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": getattr(triton, "__version__", None),
    }


def _shape(options: Options) -> dict[str, Any]:
    config = options.config
    return {
        "name": options.shape,
        "weights": "random",
        "dtype": _dtype(options),
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "exit_layers": options.exits,
        "exit_width": options.width,
        "exit_gate": options.gate,
        "exit_vocab": options.vocab,
    }
