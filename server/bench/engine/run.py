"""One run of the engine bench, from the check to the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.server.bench.bandwidth import bandwidth
from offramp.server.bench.engine.bounds import Best, best, ride_bytes
from offramp.server.bench.engine.check import check_loop
from offramp.server.bench.engine.errors import EngineBenchError
from offramp.server.bench.engine.options import Options, check_memory
from offramp.server.bench.engine.rides import Mode, Stretch, ride
from offramp.server.bench.engine.rig import Rig
from offramp.server.bench.engine.segments import SegmentTime, fill_seconds, segment_times
from offramp.server.bench.engine.trace import thresholds
from offramp.server.engine.rebatching import Holds, Rebatching
from offramp.server.engine.rides import hold_shares

Say = Callable[[str], None]
# The server's default of --exit-max-hold-ms.
_MAX_HOLD = 0.05
# Tokens of the trace that the server is taken to have seen.
_SEEN = 1000
FULL, NOBODY, EXITS, NO_HOLD = "full", "nobody", "exits", "exits-no-hold"


@dataclass(slots=True)
class Findings:
    """What a run found, times in seconds.

    ``full`` and ``exits`` are the segments' times of both loops by batch; ``stretches`` the
    measured rounds, ``best`` what the trace allows and ``holds`` what was held for, by mode and
    batch; ``fills`` the time of a ride's K,V fills by batch. ``bandwidth`` is in bytes a second,
    ``ride_bytes`` what a ride of a batch reads.
    """

    options: Options
    check: Mapping[str, object]
    weight_bytes: int
    bandwidth: float
    ride_bytes: dict[int, int]
    full: dict[int, list[SegmentTime]] = field(default_factory=dict)
    exits: dict[int, list[SegmentTime]] = field(default_factory=dict)
    fills: dict[int, float] = field(default_factory=dict)
    stretches: dict[tuple[str, int], list[Stretch]] = field(default_factory=dict)
    best: dict[tuple[str, int], Best] = field(default_factory=dict)
    holds: dict[tuple[str, int], Sequence[tuple[float, float]]] = field(default_factory=dict)
    gpu_bytes: int | None = None


def run(options: Options, say: Say) -> Findings:
    """Check, then measure; raises EngineBenchError, and Refused where the loop is wrong."""
    check_memory(options)
    say("checking the decode loop against single steps")
    checked = check_loop(options.device, options.seed)
    say(f"bandwidth of the {options.device.type}'s memory")
    speed = bandwidth(options.device).best
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    say(f"making {options.shape} with random weights and recording its rides")
    rig = _rig(options)
    read = {batch: ride_bytes(rig, batch) for batch in options.batches}
    findings = Findings(options, checked, rig.model.weight_bytes, speed, read)
    draws = options.trace.draw(options.tokens, options.slots, options.seed)
    # One row's times are what holding is weighed with, whether or not it is asked for.
    for batch in sorted({1, *options.batches}):
        say(f"segments alone, {batch} riders")
        findings.full[batch] = segment_times(rig, rig.full, batch)
        findings.exits[batch] = segment_times(rig, rig.exits, batch)
    for batch in options.batches:
        findings.fills[batch] = fill_seconds(rig, draws, batch)
        _measure(rig, findings, draws, batch, say)
    if options.device.type == "cuda":
        findings.gpu_bytes = torch.cuda.max_memory_reserved(options.device)
    return findings


def _rig(options: Options) -> Rig:
    try:
        return Rig(options)
    except torch.OutOfMemoryError as error:
        raise EngineBenchError(
            f"{options.shape} with {options.slots} slots does not fit the GPU's memory beside what "
            "else is there; lower --batch or --context"
        ) from error


def _measure(rig: Rig, findings: Findings, draws: Tensor, batch: int, say: Say) -> None:
    options = rig.options
    modes = _modes(rig, findings, draws, batch)
    for number in range(options.rounds):
        for mode in reversed(modes) if number % 2 else modes:
            say(f"batch {batch}, round {number + 1}, {mode.name}")
            found = findings.stretches.setdefault((mode.name, batch), [])
            found.append(ride(mode, options, batch))
    for mode in modes:
        key = mode.name, batch
        findings.holds[key] = mode.holds
        if mode.name in {EXITS, NO_HOLD}:
            times = findings.full, findings.exits
            findings.best[key] = best(options, draws.tolist(), mode.holds, *times, batch)


def _modes(rig: Rig, findings: Findings, draws: Tensor, batch: int) -> list[Mode]:
    options, exits = rig.options, len(rig.options.exits)
    nobody = torch.full_like(draws, exits)
    stays, leaves = (thresholds(drawn, exits).to(options.device) for drawn in (nobody, draws))
    free = [(0.0, 0.0)] * (exits + 1)
    modes = [
        Mode(FULL, rig.full, nobody, stays, [(0.0, 0.0)]),
        Mode(NOBODY, rig.exits, nobody, stays, free),
        Mode(EXITS, rig.exits, draws, leaves, _holds(findings, batch)),
    ]
    if options.hold != "off":
        modes.append(Mode(NO_HOLD, rig.exits, draws, leaves, free))
    return modes


def _holds(findings: Findings, batch: int) -> Holds:
    """As the engine would hold with these times; a longest wait in seconds becomes rides."""
    options, trace = findings.options, findings.options.trace
    one, many = findings.exits[1], findings.exits[batch]
    pairs = [(a.riding, b.riding) for a, b in zip(one, many, strict=True)]
    rides = _MAX_HOLD / sum(each.riding for each in many)
    if options.hold == "latency":
        return hold_shares(pairs, rides)
    if options.hold == "off":
        return [(0.0, 0.0)] * len(pairs)
    rebatching = Rebatching(pairs, batch, rides, trace.depths)
    for depth, share in zip(trace.depths, trace.shares, strict=True):
        for _ in range(round(_SEEN * share)):
            rebatching.observe(depth)
    return rebatching.choose(batch)


def speed_ups(findings: Findings, key: tuple[str, int]) -> list[float]:
    """Throughput over full's of the same round, for each round."""
    base = findings.stretches[FULL, key[1]]
    pairs = zip(findings.stretches[key], base, strict=True)
    return [(a.tokens / a.wall) / (b.tokens / b.wall) for a, b in pairs]
