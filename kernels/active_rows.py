"""Which rows run which segment, decided on the device: dynamic rebatching without the host.

Every sequence has a *stage*: the segment it waits at, or none. Before a segment runs, the sequences
that wait there are gathered into a compact list, or held while too few have come (DREX, arXiv
2512.15705). A token that leaves or reaches the top is written into the sequence's state, which
sends it back to the first segment. Each step is one program over all sequences, so counts never
travel to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.backend import jit, next_power_of_2, tl, uses_triton

EMPTY = -1
"""Stage of a row that is free, and token of one that made none."""


@dataclass(frozen=True, slots=True)
class ActiveRows:
    """The first ``count`` of ``rows``; what lies behind them means nothing.

    ``rows`` [n] and ``count`` [1] are int32. Kernels are launched for all n and those behind the
    count return at once, so no launch waits for the host to learn it.
    """

    rows: Tensor
    count: Tensor

    @property
    def chosen(self) -> Tensor:
        """The rows as indices [count]; waits for the device, so for references only."""
        return self.rows[: int(self.count)].long()


@jit
def behind(row: tl.tensor, count: tl.tensor | None) -> tl.tensor:
    """Whether a row lies behind a count on the device (None: there is no count)."""
    late = row < 0
    if count is not None:
        late = row >= tl.load(count)
    return late


@dataclass(frozen=True, slots=True)
class DecodeState:
    """State of the sequences that decode on the device, a row each; tensors [sequences].

    ``stage`` int32; ``waited`` int32, passes since the sequence came to its stage; ``token`` int64,
    the newest, at ``position`` int64; from position ``end`` int64 on it does not run, since there
    are no blocks for it yet or the answer has ended; ``index`` int64 counts the answer's tokens;
    ``table`` int64 [sequences, blocks] lists the sequence's K,V blocks. ``emitted`` int64 and
    ``depth`` int32 are the token that the last pass made, and the layers it took (EMPTY: none).
    """

    stage: Tensor
    waited: Tensor
    token: Tensor
    position: Tensor
    end: Tensor
    index: Tensor
    table: Tensor
    emitted: Tensor
    depth: Tensor

    @classmethod
    def empty(cls, seqs: int, blocks: int, device: torch.device) -> DecodeState:
        """All rows are free."""

        def numbers(dtype: torch.dtype, value: int, *sizes: int) -> Tensor:
            return torch.full((seqs, *sizes), value, dtype=dtype, device=device)

        return cls(
            stage=numbers(torch.int32, EMPTY),
            waited=numbers(torch.int32, 0),
            token=numbers(torch.int64, 0),
            position=numbers(torch.int64, 0),
            end=numbers(torch.int64, 0),
            index=numbers(torch.int64, 0),
            table=numbers(torch.int64, 0, blocks),
            emitted=numbers(torch.int64, EMPTY),
            depth=numbers(torch.int32, EMPTY),
        )


@dataclass(frozen=True, slots=True)
class SegmentBatch:
    """The sequences that run a segment, ``limit`` at most; entries behind ``count`` are undefined.

    ``seqs`` int32; ``positions``, ``places`` (in the pages) and ``first_blocks`` (in the flattened
    block table) int64, each [limit]; ``count`` int32 [1].
    """

    seqs: Tensor
    positions: Tensor
    places: Tensor
    first_blocks: Tensor
    count: Tensor

    @classmethod
    def empty(cls, limit: int, device: torch.device) -> SegmentBatch:
        """Room for ``limit`` sequences; all zeros, so that undefined entries may be read."""

        def zeros(dtype: torch.dtype, size: int = limit) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            seqs=zeros(torch.int32),
            positions=zeros(torch.int64),
            places=zeros(torch.int64),
            first_blocks=zeros(torch.int64),
            count=zeros(torch.int32, 1),
        )

    @property
    def limit(self) -> int:
        """SegmentBatch that there is room for."""
        return len(self.seqs)

    @property
    def list(self) -> ActiveRows:
        """The sequences as rows."""
        return ActiveRows(self.seqs, self.count)

    def first(self, limit: int) -> SegmentBatch:
        """The same memory with room for ``limit``."""
        return SegmentBatch(
            self.seqs[:limit],
            self.positions[:limit],
            self.places[:limit],
            self.first_blocks[:limit],
            self.count,
        )


def gather_rows(
    states: DecodeState, active: SegmentBatch, segment: int, holds: Tensor, *, block_size: int
) -> None:
    """Gather the sequences that wait at ``segment``; none while holding them pays.

    ``holds`` fp32 [segments, 2]: the share of the sequences ready at the first segment that must
    have come before an upper segment is run, and the passes after which the longest wait ends
    anyway. The batch must have room for all. The first segment is never held.
    """
    if not uses_triton(states.stage.device):
        gather_rows_reference(states, active, segment, holds, block_size=block_size)
        return
    seqs, blocks = states.table.shape
    _gather_rows[(1,)](
        states.stage,
        states.waited,
        states.position,
        states.end,
        states.table,
        active.seqs,
        active.positions,
        active.places,
        active.first_blocks,
        active.count,
        holds,
        seqs,
        blocks,
        segment=segment,
        block_size=block_size,
        wide=next_power_of_2(seqs),
    )


def gather_rows_reference(
    states: DecodeState, active: SegmentBatch, segment: int, holds: Tensor, *, block_size: int
) -> None:
    """See `gather_rows`."""
    able = states.position < states.end
    here = ((states.stage == segment) & able).nonzero().squeeze(-1)
    ready = int(((states.stage == 0) & able).sum())
    share, patience = holds[segment].tolist()
    waited = int(states.waited[here].max()) if len(here) else 0
    if segment and len(here) < share * ready and waited < patience:
        states.waited[here] += 1
        active.count.zero_()
        return
    count = len(here)
    positions = states.position[here]
    blocks = states.table[here, positions // block_size]
    active.seqs[:count] = here.to(torch.int32)
    active.positions[:count] = positions
    active.places[:count] = blocks * block_size + positions % block_size
    active.first_blocks[:count] = here * states.table.shape[1]
    active.count.fill_(count)


def finish_rows(states: DecodeState, active: SegmentBatch, tokens: Tensor, depth: int) -> None:
    """All ``active`` got their token, ``tokens`` [limit] int64, from ``depth`` layers."""
    if not uses_triton(states.stage.device):
        finish_rows_reference(states, active, tokens, depth)
        return
    _finish_rows[(1,)](
        states.stage,
        states.waited,
        states.token,
        states.position,
        states.index,
        states.emitted,
        states.depth,
        active.seqs,
        active.count,
        tokens,
        depth=depth,
        wide=next_power_of_2(active.limit),
    )


def finish_rows_reference(
    states: DecodeState, active: SegmentBatch, tokens: Tensor, depth: int
) -> None:
    """See `finish_rows`."""
    seqs = active.list.chosen
    emit_reference(states, seqs, tokens[: len(seqs)], depth)


def emit_reference(states: DecodeState, seqs: Tensor, tokens: Tensor, depth: int) -> None:
    """Sequences [n] got ``tokens`` [n] from ``depth`` layers and are back at the first segment."""
    states.stage[seqs] = 0
    states.waited[seqs] = 0
    states.token[seqs] = tokens
    states.position[seqs] += 1
    states.index[seqs] += 1
    states.emitted[seqs] = tokens
    states.depth[seqs] = depth


@jit
def _gather_rows(
    stage: tl.tensor,
    waited: tl.tensor,
    position: tl.tensor,
    end: tl.tensor,
    table: tl.tensor,
    to_seqs: tl.tensor,
    to_positions: tl.tensor,
    to_places: tl.tensor,
    to_first_blocks: tl.tensor,
    to_count: tl.tensor,
    holds: tl.tensor,
    seqs: tl.tensor,
    blocks: tl.tensor,
    segment: tl.constexpr,
    block_size: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """One program looks at all sequences."""
    seq = tl.arange(0, wide)
    real = seq < seqs
    at = tl.load(stage + seq, mask=real, other=-1)
    now = tl.load(position + seq, mask=real, other=0)
    able = now < tl.load(end + seq, mask=real, other=0)
    here = able & (at == segment)
    count = tl.sum(here.to(tl.int32), axis=0)
    if segment > 0:
        ready = tl.sum((able & (at == 0)).to(tl.int32), axis=0).to(tl.float32)
        since = tl.load(waited + seq, mask=here, other=0)
        few = count.to(tl.float32) < tl.load(holds + segment * 2) * ready
        fresh = tl.max(since, axis=0).to(tl.float32) < tl.load(holds + segment * 2 + 1)
        if few & fresh:
            tl.store(waited + seq, since + 1, mask=here)
            tl.store(to_count, 0)
            return
    place = tl.cumsum(here.to(tl.int32), axis=0) - 1
    first = seq.to(tl.int64) * blocks
    block = tl.load(table + first + now // block_size, mask=here, other=0)
    tl.store(to_seqs + place, seq, mask=here)
    tl.store(to_positions + place, now, mask=here)
    tl.store(to_places + place, block * block_size + now % block_size, mask=here)
    tl.store(to_first_blocks + place, first, mask=here)
    tl.store(to_count, count)


@jit
def _finish_rows(
    stage: tl.tensor,
    waited: tl.tensor,
    token: tl.tensor,
    position: tl.tensor,
    index: tl.tensor,
    emitted: tl.tensor,
    depth_of: tl.tensor,
    seqs: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    depth: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    row = tl.arange(0, wide)
    real = row < tl.load(count)
    seq = tl.load(seqs + row, mask=real, other=0)
    made = tl.load(tokens + row, mask=real, other=0)
    emit(stage, waited, token, position, index, emitted, depth_of, seq, made, real, depth)


@jit
def emit(
    stage: tl.tensor,
    waited: tl.tensor,
    token: tl.tensor,
    position: tl.tensor,
    index: tl.tensor,
    emitted: tl.tensor,
    depth_of: tl.tensor,
    seq: tl.tensor,
    made: tl.tensor,
    real: tl.tensor,
    depth: tl.constexpr,
) -> None:
    """Sequences got a token and wait at the first segment again (`emit_reference`)."""
    tl.store(stage + seq, 0, mask=real)
    tl.store(waited + seq, 0, mask=real)
    tl.store(token + seq, made, mask=real)
    tl.store(position + seq, tl.load(position + seq, mask=real, other=0) + 1, mask=real)
    tl.store(index + seq, tl.load(index + seq, mask=real, other=0) + 1, mask=real)
    tl.store(emitted + seq, made, mask=real)
    tl.store(depth_of + seq, depth, mask=real)
