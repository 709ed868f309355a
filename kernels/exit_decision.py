"""The decision of an exit, made on the device: which tokens leave, without the host.

The gate fires for some rows (`apply_gate`), the exit's logits are computed for those alone, and the
second key lets some of them leave (`apply_exit`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.active_rows import ActiveRows, DecodeState, SegmentBatch, emit, emit_reference
from offramp.kernels.backend import jit, next_power_of_2, tl, uses_triton
from offramp.kernels.exit_gate import EDGE, fused_key
from offramp.kernels.logit_scores import LogitScores


@dataclass(frozen=True, slots=True)
class Fired:
    """Entries of a batch whose gate fired: ``rows`` of the batch and their ``seqs``, int32 [limit].

    ``gate`` fp32 [limit] are their scores; ``count`` int32 [1]; ``total`` int64 [1] adds up the
    counts of all exits until it is cleared.
    """

    rows: Tensor
    seqs: Tensor
    gate: Tensor
    count: Tensor
    total: Tensor

    @classmethod
    def empty(cls, limit: int, device: torch.device) -> Fired:
        """Room for ``limit``."""
        rows, seqs, count = (
            torch.zeros(size, dtype=torch.int32, device=device) for size in (limit, limit, 1)
        )
        total = torch.zeros(1, dtype=torch.int64, device=device)
        return cls(rows, seqs, torch.zeros(limit, device=device), count, total)

    @property
    def list(self) -> ActiveRows:
        """The sequences as rows."""
        return ActiveRows(self.seqs, self.count)

    def first(self, limit: int) -> Fired:
        """The same memory with room for ``limit``."""
        kept = self.rows[:limit], self.seqs[:limit], self.gate[:limit]
        return Fired(*kept, self.count, self.total)


def apply_gate(
    inner: Tensor,
    down: Tensor,
    down_bias: Tensor,
    floor: float,
    thresholds: Tensor,
    states: DecodeState,
    active: SegmentBatch,
    fired: Fired,
) -> None:
    """Send all ``active`` one stage up, and list those that may leave: gate at least ``floor``.

    ``inner`` [limit, g] is the gate's hidden layer; ``down`` [1, g], ``down_bias`` [1].
    ``thresholds`` fp32 [sequences] are those of this exit; above 1 a sequence is not
    checked, at 0 it leaves whatever the gate says.
    """
    if not uses_triton(inner.device):
        apply_gate_reference(inner, down, down_bias, floor, thresholds, states, active, fired)
        return
    wide = next_power_of_2(active.limit)
    _apply_gate[(1,)](
        inner,
        down,
        down_bias,
        thresholds,
        states.stage,
        states.waited,
        active.seqs,
        active.count,
        fired.rows,
        fired.seqs,
        fired.gate,
        fired.count,
        fired.total,
        floor,
        inner.shape[1],
        inner.stride(0),
        thresholds.stride(0),
        wide=wide,
        tile=columns(wide),
    )


def columns(wide: int) -> int:
    """Columns of the gate's hidden layer in one step of ``wide`` rows: what registers hold."""
    return max(4, min(64, 2048 // wide))


def apply_gate_reference(
    inner: Tensor,
    down: Tensor,
    down_bias: Tensor,
    floor: float,
    thresholds: Tensor,
    states: DecodeState,
    active: SegmentBatch,
    fired: Fired,
) -> None:
    """See `apply_gate`."""
    seqs = active.list.chosen
    states.stage[seqs] += 1
    states.waited[seqs] = 0
    gate = torch.sigmoid((inner[: len(seqs)].float() * down.float()).sum(-1) + down_bias.float())
    wanted = thresholds[seqs]
    rows = (((gate >= floor) | (wanted <= 0)) & (wanted <= 1)).nonzero().squeeze(-1)
    count = len(rows)
    fired.rows[:count] = rows.to(torch.int32)
    fired.seqs[:count] = seqs[rows].to(torch.int32)
    fired.gate[:count] = gate[rows]
    fired.count.fill_(count)
    fired.total.add_(count)


def apply_exit(
    fired: Fired,
    scores: LogitScores,
    tokens: Tensor,
    fuse: Tensor | None,
    thresholds: Tensor,
    depth: int,
    states: DecodeState,
    active: SegmentBatch,
    exited: SegmentBatch,
) -> None:
    """Let those of ``fired`` leave whose second key reaches their sequence's threshold.

    ``scores`` and ``tokens`` [limit] int64 are in the order of ``fired``, ``fuse`` [4] or None as
    in `fused_key`. Sequences that leave get their token from ``depth`` layers, go back to the first
    segment, and are listed with the position and place their K,V are owed for.
    """
    if not uses_triton(tokens.device):
        apply_exit_reference(fired, scores, tokens, fuse, thresholds, depth, states, active, exited)
        return
    _apply_exit[(1,)](
        fired.rows,
        fired.seqs,
        fired.gate,
        fired.count,
        scores.top,
        scores.gap,
        tokens,
        fuse,
        thresholds,
        states.stage,
        states.waited,
        states.token,
        states.position,
        states.index,
        states.emitted,
        states.depth,
        active.positions,
        active.places,
        exited.seqs,
        exited.positions,
        exited.places,
        exited.count,
        thresholds.stride(0),
        edge=EDGE,
        depth=depth,
        wide=next_power_of_2(exited.limit),
    )


def apply_exit_reference(
    fired: Fired,
    scores: LogitScores,
    tokens: Tensor,
    fuse: Tensor | None,
    thresholds: Tensor,
    depth: int,
    states: DecodeState,
    active: SegmentBatch,
    exited: SegmentBatch,
) -> None:
    """See `apply_exit`."""
    seqs = fired.list.chosen
    number = len(seqs)
    score = fused_key(fuse, fired.gate[:number], scores.top[:number], scores.gap[:number])
    going = (score >= thresholds[seqs]).nonzero().squeeze(-1)
    rows, count = fired.rows[going].long(), len(going)
    exited.seqs[:count] = seqs[going].to(torch.int32)
    exited.positions[:count] = active.positions[rows]
    exited.places[:count] = active.places[rows]
    exited.count.fill_(count)
    emit_reference(states, seqs[going], tokens[going], depth)


@jit
def _apply_gate(
    inner: tl.tensor,
    down: tl.tensor,
    down_bias: tl.tensor,
    thresholds: tl.tensor,
    stage: tl.tensor,
    waited: tl.tensor,
    seqs: tl.tensor,
    count: tl.tensor,
    to_rows: tl.tensor,
    to_seqs: tl.tensor,
    to_gate: tl.tensor,
    to_count: tl.tensor,
    to_total: tl.tensor,
    floor: tl.tensor,
    width: tl.tensor,
    inner_row: tl.tensor,
    threshold_row: tl.tensor,
    wide: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One program looks at all active rows."""
    row = tl.arange(0, wide)
    real = row < tl.load(count)
    seq = tl.load(seqs + row, mask=real, other=0)
    here = tl.load(stage + seq, mask=real, other=0)
    tl.store(stage + seq, here + 1, mask=real)
    tl.store(waited + seq, 0, mask=real)
    total = tl.zeros([wide], tl.float32)
    for start in range(0, width, tile):
        k = start + tl.arange(0, tile)
        there = k < width
        at = inner + row[:, None] * inner_row + k[None, :]
        values = tl.load(at, mask=real[:, None] & there[None, :], other=0.0).to(tl.float32)
        weight = tl.load(down + k, mask=there, other=0.0).to(tl.float32)
        total += tl.sum(values * weight[None, :], axis=1)
    gate = tl.sigmoid(total + tl.load(down_bias).to(tl.float32))
    threshold = tl.load(thresholds + seq * threshold_row, mask=real, other=2.0)
    fires = real & ((gate >= floor) | (threshold <= 0.0)) & (threshold <= 1.0)
    place = tl.cumsum(fires.to(tl.int32), axis=0) - 1
    tl.store(to_rows + place, row, mask=fires)
    tl.store(to_seqs + place, seq, mask=fires)
    tl.store(to_gate + place, gate, mask=fires)
    number = tl.sum(fires.to(tl.int32), axis=0)
    tl.store(to_count, number)
    tl.store(to_total, tl.load(to_total) + number)


@jit
def _apply_exit(
    rows: tl.tensor,
    seqs: tl.tensor,
    gates: tl.tensor,
    count: tl.tensor,
    tops: tl.tensor,
    gaps: tl.tensor,
    tokens: tl.tensor,
    fuse: tl.tensor,
    thresholds: tl.tensor,
    stage: tl.tensor,
    waited: tl.tensor,
    token: tl.tensor,
    position: tl.tensor,
    index: tl.tensor,
    emitted: tl.tensor,
    depth_of: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    to_seqs: tl.tensor,
    to_positions: tl.tensor,
    to_places: tl.tensor,
    to_count: tl.tensor,
    threshold_row: tl.tensor,
    edge: tl.constexpr,
    depth: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """One program looks at all whose gate fired."""
    item = tl.arange(0, wide)
    real = item < tl.load(count)
    row = tl.load(rows + item, mask=real, other=0)
    seq = tl.load(seqs + item, mask=real, other=0)
    score = tl.load(gaps + item, mask=real, other=0.0)
    if fuse is not None:
        gate = tl.load(gates + item, mask=real, other=0.5)
        top = tl.load(tops + item, mask=real, other=0.5)
        total = _logit(gate, edge) * tl.load(fuse) + _logit(top, edge) * tl.load(fuse + 1)
        score = tl.sigmoid(total + _logit(score, edge) * tl.load(fuse + 2) + tl.load(fuse + 3))
    threshold = tl.load(thresholds + seq * threshold_row, mask=real, other=2.0)
    going = real & (score >= threshold)
    place = tl.cumsum(going.to(tl.int32), axis=0) - 1
    tl.store(to_seqs + place, seq, mask=going)
    tl.store(to_positions + place, tl.load(positions + row, mask=going, other=0), mask=going)
    tl.store(to_places + place, tl.load(places + row, mask=going, other=0), mask=going)
    tl.store(to_count, tl.sum(going.to(tl.int32), axis=0))
    made = tl.load(tokens + item, mask=going, other=0)
    emit(stage, waited, token, position, index, emitted, depth_of, seq, made, going, depth)


@jit
def _logit(share: tl.tensor, edge: tl.constexpr) -> tl.tensor:
    """Log odds of a probability."""
    share = tl.minimum(tl.maximum(share, edge), 1 - edge)
    return tl.log(share / (1 - share))
