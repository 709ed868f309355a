"""Cases of an exit's decision: the gate for all riders, then the second key for those it fires."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from offramp.kernels.active_rows import SegmentBatch
from offramp.kernels.exit_decision import (
    Fired,
    apply_exit,
    apply_exit_reference,
    apply_gate,
    apply_gate_reference,
)
from offramp.kernels.logit_scores import LogitScores
from offramp.models.exits.training.train import TrainOptions
from offramp.server.bench.kernels.case import Case, Work
from offramp.server.bench.kernels.setup import Setup
from offramp.server.bench.kernels.slots import LANDED, changed, riders_of, states_of

_LONG, _SHORT = 8, 4
_FLOOR = 0.5


def fire_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The gate's last layer and the list of those that may apply_exit, which are all."""
    width, size = TrainOptions().router, setup.dtype.itemsize
    states = states_of(setup, rows, count, 0)
    riders, fired = riders_of(setup, states, count), Fired.empty(rows, setup.device)
    inner, thresholds = setup.normal(rows, width), setup.thresholds(rows)
    given = (inner, setup.weight(1, width), setup.normal(1), _FLOOR, thresholds)

    def launch() -> None:
        apply_gate(*given, states, riders, fired)

    def reference() -> None:
        apply_gate_reference(*given, states, riders, fired)

    yield Case(
        op="fire",
        what=f"gate of {width}",
        rows=rows,
        work=Work(
            # Of a row its inner values, slot, stage and threshold.
            read=((count + 1) * width + 1) * size + count * 3 * _SHORT + _SHORT,
            # Stage and waited; row, slot and score in the list.
            written=count * 5 * _SHORT + _SHORT,
            flops=2 * count * width,
        ),
        launches=[launch],
        reference=reference,
        results=lambda: {
            "count": fired.count,
            "rows": fired.rows[: int(fired.count)],
            "slots": fired.slots[: int(fired.count)],
            "gate": fired.gate[: int(fired.count)],
            "stage": states.stage,
            "waited": states.waited,
        },
        empty=riders.count.zero_,
        # Both sum in fp32 what they are given.
        rounding=torch.float32,
    )


def leave_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The second key, which lets all leave that fired: all riders."""
    states = states_of(setup, rows, count, 1)
    riders = riders_of(setup, states, count)
    leavers, tokens = SegmentBatch.empty(rows, setup.device), setup.tokens(rows)
    order = setup.order(rows, torch.int32)
    slots = riders.slots[order.long()]
    total = torch.zeros(1, dtype=torch.int64, device=setup.device)
    fired = Fired(order, slots, setup.uniform(rows), setup.count(count), total)
    scores = LogitScores(tokens, *(setup.uniform(rows) for _ in range(3)))
    fuse, thresholds = setup.normal(4, dtype=torch.float32), setup.thresholds(rows)
    depth = setup.config.num_layers // 2
    given = (fired, scores, tokens, fuse, thresholds, depth, states, riders, leavers)

    def launch() -> None:
        apply_exit(*given)

    def reference() -> None:
        apply_exit_reference(*given)

    yield Case(
        op="leave",
        what=f"from layer {depth}",
        rows=rows,
        work=Work(
            # Row, slot, three scores and the threshold; token, position and place of the rider,
            # position and index of the slot.
            read=count * (6 * _SHORT + 5 * _LONG) + 5 * _SHORT,
            written=count * (_SHORT + 2 * _LONG + LANDED) + _SHORT,
            flops=0,
        ),
        launches=[launch],
        reference=reference,
        results=lambda: {
            "count": leavers.count,
            "slots": leavers.slots[: int(leavers.count)],
            "positions": leavers.positions[: int(leavers.count)],
            "places": leavers.places[: int(leavers.count)],
            **changed(states),
        },
        empty=fired.count.zero_,
    )
