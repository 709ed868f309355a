"""Cases of boarding and arriving, and the states of slots that these and exits begin with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from offramp.kernels.active_rows import (
    EMPTY,
    DecodeState,
    SegmentBatch,
    finish_rows,
    finish_rows_reference,
    gather_rows,
    gather_rows_reference,
)
from offramp.server.bench.kernels.case import Case, Work
from offramp.server.bench.kernels.setup import BLOCK, Setup

_LONG, _SHORT = 8, 4
LANDED = 3 * _SHORT + 4 * _LONG
"""Bytes written for a token: stage, waited, depth; token, position, index, emitted."""
_UPPER = 1
"""An upper segment, which may be held; the ground never is."""


def states_of(setup: Setup, rows: int, count: int, stage: int) -> DecodeState:
    """``rows`` slots, ``count`` of them at ``stage`` with a block for their next token."""
    blocks = -(-setup.context // BLOCK)
    states = DecodeState.empty(rows, blocks, setup.device)
    chosen = setup.order(rows)[:count]
    states.stage[chosen] = stage
    states.position.copy_(torch.tensor(setup.positions(rows)))
    states.end.copy_(states.position + 1)
    states.table.copy_(setup.order(rows * blocks).view(rows, blocks))
    return states


def riders_of(setup: Setup, states: DecodeState, count: int) -> SegmentBatch:
    """``count`` riders in any of the slots."""
    rows = len(states.stage)
    riders = SegmentBatch.empty(rows, setup.device)
    riders.slots.copy_(setup.order(rows))
    riders.positions.copy_(states.position[riders.slots.long()])
    riders.places.copy_(setup.order(rows))
    riders.count.fill_(count)
    return riders


def changed(states: DecodeState) -> Mapping[str, Tensor]:
    """What rides change of slots."""
    names = ("stage", "waited", "token", "position", "index", "emitted", "depth")
    return {name: getattr(states, name) for name in names}


def board_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """All slots wait at an upper segment, and all may ride."""
    states = states_of(setup, rows, count, _UPPER)
    riders = SegmentBatch.empty(rows, setup.device)
    holds = torch.tensor([[0.0, 0.0], [0.5, 4.0]], device=setup.device)

    def launch() -> None:
        gather_rows(states, riders, _UPPER, holds, block_size=BLOCK)

    def reference() -> None:
        gather_rows_reference(states, riders, _UPPER, holds, block_size=BLOCK)

    def empty() -> None:
        states.stage.fill_(EMPTY)

    yield Case(
        op="board",
        what="segment 1",
        rows=rows,
        # Stage, waited, position, end and a block of each, and the two numbers of the hold.
        work=Work(
            read=count * (2 * _SHORT + 3 * _LONG) + 2 * _SHORT,
            written=count * (_SHORT + 3 * _LONG) + _SHORT,
            flops=0,
        ),
        launches=[launch],
        reference=reference,
        results=lambda: {
            "count": riders.count,
            "slots": riders.slots[:count],
            "positions": riders.positions[:count],
            "places": riders.places[:count],
            "first_blocks": riders.first_blocks[:count],
            "waited": states.waited,
        },
        empty=empty,
    )


def arrive_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """All riders get the head's token."""
    states = states_of(setup, rows, count, _UPPER)
    riders, tokens = riders_of(setup, states, count), setup.tokens(rows)
    depth = setup.config.num_layers

    def launch() -> None:
        finish_rows(states, riders, tokens, depth)

    def reference() -> None:
        finish_rows_reference(states, riders, tokens, depth)

    yield Case(
        op="arrive",
        what=f"from layer {depth}",
        rows=rows,
        # The slot; its token, position and index.
        work=Work(count * (_SHORT + 3 * _LONG) + _SHORT, count * LANDED, 0),
        launches=[launch],
        reference=reference,
        results=lambda: changed(states),
        empty=riders.count.zero_,
    )
