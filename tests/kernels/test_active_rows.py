"""Rows gathered for a segment and finished after it: by hand, and kernels against references."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from offramp.kernels.active_rows import (
    EMPTY,
    ActiveRows,
    DecodeState,
    SegmentBatch,
    finish_rows,
    gather_rows,
)
from offramp.kernels.backend import rehearsal, triton
from offramp.kernels.embed_rows import embed_rows
from tests.kernels.compiler import TARGETS, Compiler
from tests.kernels.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")
BLOCK = 4
NEVER = torch.tensor([[0.0, 0.0], [2.0, 1e9], [2.0, 1e9]], device=DEVICE)
EAGER = torch.zeros(3, 2, device=DEVICE)
interpreted = pytest.mark.skipif(triton is None, reason="no triton")
both = pytest.mark.parametrize(
    "kernels", [False, pytest.param(True, marks=interpreted)], ids=["reference", "kernel"]
)


def states(stages: list[int]) -> DecodeState:
    """Sequences at ``stages``, each at a position of its own under a table of its own."""
    made = DecodeState.empty(len(stages), 5, DEVICE)
    made.stage.copy_(torch.tensor(stages))
    made.position.copy_(torch.randint(0, 5 * BLOCK, (len(stages),)))
    made.end.fill_(5 * BLOCK)
    made.table.copy_(torch.randperm(len(stages) * 5).view(len(stages), 5))
    return made


def gathered(made: DecodeState, segment: int, holds: Tensor, *, kernels: bool) -> list[int]:
    """Sequences that gather_rows chooses, their places checked."""
    active = SegmentBatch.empty(len(made.stage), DEVICE)
    if kernels:
        with rehearsal():
            gather_rows(made, active, segment, holds, block_size=BLOCK)
    else:
        gather_rows(made, active, segment, holds, block_size=BLOCK)
    seqs: list[int] = active.list.chosen.tolist()
    for row, seq in enumerate(seqs):
        position = int(made.position[seq])
        block = int(made.table[seq, position // BLOCK])
        assert int(active.positions[row]) == position
        assert int(active.places[row]) == block * BLOCK + position % BLOCK
        assert int(active.first_blocks[row]) == seq * made.table.shape[1]
    assert not active.seqs[len(seqs) :].any()
    return seqs


@both
def test_who_waits_at_a_segment_is_gathered(*, kernels: bool) -> None:
    made = states([0, 2, EMPTY, 0, 1, 0, EMPTY])
    assert gathered(made, 0, NEVER, kernels=kernels) == [0, 3, 5]
    assert gathered(made, 1, EAGER, kernels=kernels) == [4]
    assert gathered(made, 2, EAGER, kernels=kernels) == [1]


@both
def test_no_row_is_gathered_where_none_waits(*, kernels: bool) -> None:
    made = states([0, EMPTY, 0])
    assert gathered(made, 1, EAGER, kernels=kernels) == []
    assert gathered(states([EMPTY]), 0, EAGER, kernels=kernels) == []


@both
def test_no_row_is_gathered_past_its_end(*, kernels: bool) -> None:
    """Nor counts as ready; with a later end it goes on."""
    made = states([0, 1, 0])
    made.end[0] = made.position[0]
    assert gathered(made, 0, NEVER, kernels=kernels) == [2]
    made.end[2] = 0
    assert gathered(made, 1, NEVER, kernels=kernels) == [1]
    made.end[0] += 1
    assert gathered(made, 0, NEVER, kernels=kernels) == [0]


@both
def test_few_are_held_until_enough_have_come(*, kernels: bool) -> None:
    """A share of a half: two of four ready ones are enough, one is not."""
    holds = torch.tensor([[0.0, 0.0], [0.5, 100.0]])
    made = states([0, 0, 0, 0, 1])
    assert gathered(made, 1, holds, kernels=kernels) == []
    assert made.waited.tolist() == [0, 0, 0, 0, 1]
    made.stage[3] = 1
    made.stage[0] = EMPTY
    assert gathered(made, 1, holds, kernels=kernels) == [3, 4]
    assert made.waited.tolist() == [0, 0, 0, 0, 1]


@both
def test_no_row_is_held_longer_than_its_patience(*, kernels: bool) -> None:
    holds = torch.tensor([[0.0, 0.0], [9.0, 3.0]])
    made = states([0, 1])
    passes = [gathered(made, 1, holds, kernels=kernels) for _ in range(4)]
    assert passes == [[], [], [], [1]]


@both
def test_no_row_is_held_when_none_is_ready(*, kernels: bool) -> None:
    assert gathered(states([1, EMPTY, 2]), 1, NEVER, kernels=kernels) == [0]


@both
def test_who_finishes_has_a_token_and_waits_at_the_first_segment(*, kernels: bool) -> None:
    made = states([EMPTY, 1, 1, 0])
    before = made.position.clone()
    active = SegmentBatch.empty(4, DEVICE)
    active.seqs[:2] = torch.tensor([2, 1])
    active.count.fill_(2)
    made.waited.fill_(5)
    tokens = torch.tensor([70, 80, -5, -5])
    if kernels:
        with rehearsal():
            finish_rows(made, active, tokens, 12)
    else:
        finish_rows(made, active, tokens, 12)
    assert made.stage.tolist() == [EMPTY, 0, 0, 0]
    assert made.waited.tolist() == [5, 0, 0, 5]
    assert made.token.tolist() == [0, 80, 70, 0]
    assert made.emitted.tolist() == [EMPTY, 80, 70, EMPTY]
    assert made.depth.tolist() == [EMPTY, 12, 12, EMPTY]
    assert made.index.tolist() == [0, 1, 1, 0]
    assert (made.position - before).tolist() == [0, 1, 1, 0]


@interpreted
@pytest.mark.parametrize("seqs", [1, 7, 64, 131])
def test_the_kernel_is_the_reference(seqs: int) -> None:
    """Random stages and waits; every tensor afterwards is the same."""
    made = states(torch.randint(-1, 3, (seqs,)).tolist())
    made.waited.copy_(torch.randint(0, 4, (seqs,)))
    holds = torch.tensor([[0.0, 0.0], [0.7, 3.0], [1.5, 2.0]])
    other = DecodeState(*(getattr(made, field.name).clone() for field in fields(made)))
    for segment in range(3):
        found = gathered(made, segment, holds, kernels=True)
        assert found == gathered(other, segment, holds, kernels=False)
    for field in fields(made):
        assert torch.equal(getattr(made, field.name), getattr(other, field.name))


@both
@pytest.mark.parametrize(("count", "width"), [(0, 3), (2, 576), (3, 1025)])
def test_embeddings_lie_where_their_slots_are(count: int, width: int, *, kernels: bool) -> None:
    table, hidden = torch.randn(11, width), torch.full((5, width), 7.0)
    seqs = ActiveRows(torch.tensor([4, 0, 3], dtype=torch.int32), torch.tensor([count]).int())
    tokens = torch.tensor([10, -1, -1, 2, 5])
    expected = hidden.clone()
    for seq in [4, 0, 3][:count]:
        expected[seq] = table[tokens[seq]]
    if kernels:
        with rehearsal():
            embed_rows(table, tokens, seqs, hidden)
    else:
        embed_rows(table, tokens, seqs, hidden)
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wide", [1, 64, 512])
def test_they_compile(compile_ahead: Compiler, target: int, wide: int) -> None:
    small = ["stage", "waited", "to_seqs", "to_count"]
    large = ["position", "end", "table", "to_positions", "to_places", "to_first_blocks"]
    types = dict.fromkeys(small, "*i32") | dict.fromkeys(large, "*i64") | {"holds": "*fp32"}
    types |= {"seqs": "i32", "blocks": "i32"}
    made = compile_ahead(
        "active_rows", "_gather_rows", target, types, segment=1, block_size=16, wide=wide
    )
    assert not made.spills
    small = ["stage", "waited", "depth_of", "seqs", "count"]
    large = ["token", "position", "index", "emitted", "tokens"]
    types = dict.fromkeys(small, "*i32") | dict.fromkeys(large, "*i64")
    assert not compile_ahead(
        "active_rows", "_finish_rows", target, types, depth=30, wide=wide
    ).spills


@pytest.mark.parametrize("target", TARGETS)
def test_embedding_compiles(compile_ahead: Compiler, target: int) -> None:
    types = {"table": "*bf16", "hidden": "*bf16", "tokens": "*i64", "seqs": "*i32"}
    types |= {"count": "*i32", "width": "i32", "table_row": "i32", "hidden_row": "i32"}
    assert not compile_ahead("embed_rows", "_embed", target, types, tile=1024).spills
