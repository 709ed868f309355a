"""The decision of an exit: by hand, then the kernels against the references."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels.active_rows import DecodeState, SegmentBatch
from offramp.kernels.backend import rehearsal, triton
from offramp.kernels.exit_decision import Fired, apply_exit, apply_gate, columns
from offramp.kernels.exit_gate import fused_key
from offramp.kernels.logit_scores import LogitScores
from tests.kernels.compiler import TARGETS, Compiler
from tests.kernels.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")
STAYS = 2.0
interpreted = pytest.mark.skipif(triton is None, reason="no triton")
both = pytest.mark.parametrize(
    "kernels", [False, pytest.param(True, marks=interpreted)], ids=["reference", "kernel"]
)


class Exit:
    """SegmentBatch of segment 0 before the exit behind it; every second sequence is empty."""

    def __init__(self, count: int, limit: int, width: int = 24) -> None:
        self.states = DecodeState.empty(2 * limit, 2, DEVICE)
        self.active = SegmentBatch.empty(limit, DEVICE)
        seqs = 2 * torch.randperm(limit)[:count]
        self.active.seqs[:count] = seqs.to(torch.int32)
        self.active.count.fill_(count)
        self.active.positions.copy_(torch.randint(0, 90, (limit,)))
        self.active.places.copy_(torch.randperm(1000)[:limit])
        self.states.stage[seqs] = 0
        self.states.position[seqs] = self.active.positions[:count]
        self.states.waited[seqs] = 3
        self.inner = torch.full((limit, width), float("nan"))
        self.inner[:count] = torch.randn(count, width)
        self.down, self.down_bias = torch.randn(1, width), torch.randn(1)
        # One column of many exits' thresholds: their stride is not 1.
        self.thresholds = torch.full((2 * limit, 3), STAYS)[:, 1]
        self.thresholds[seqs] = torch.rand(count)
        self.fired, self.exited = Fired.empty(limit, DEVICE), SegmentBatch.empty(limit, DEVICE)
        self.scores = LogitScores.empty(limit, DEVICE)
        self.tokens = torch.randint(0, 1000, (limit,))
        self.fuse: Tensor | None = torch.randn(4)

    def apply_gate(self, floor: float, *, kernels: bool) -> list[int]:
        """Rows that fire."""
        given = (self.inner, self.down, self.down_bias, floor, self.thresholds)
        if kernels:
            with rehearsal():
                apply_gate(*given, self.states, self.active, self.fired)
        else:
            apply_gate(*given, self.states, self.active, self.fired)
        rows: list[int] = self.fired.rows[: int(self.fired.count)].tolist()
        assert self.fired.list.chosen.tolist() == [int(self.active.seqs[row]) for row in rows]
        return rows

    def show(self, top: list[float], gap: list[float]) -> None:
        """Scores of the logits, in the order of those that fired."""
        self.scores.top[: len(top)] = torch.tensor(top)
        self.scores.gap[: len(gap)] = torch.tensor(gap)

    def apply_exit(self, *, kernels: bool) -> list[int]:
        """Sequences that leave."""
        given = (self.fired, self.scores, self.tokens, self.fuse, self.thresholds, 8)
        if kernels:
            with rehearsal():
                apply_exit(*given, self.states, self.active, self.exited)
        else:
            apply_exit(*given, self.states, self.active, self.exited)
        return self.exited.list.chosen.tolist()

    @property
    def gates(self) -> Tensor:
        """Gate scores of the active rows, in float64."""
        inner = self.inner[: int(self.active.count)].double()
        return torch.sigmoid(inner @ self.down[0].double() + self.down_bias.double())


@both
def test_all_go_up_and_those_whose_gate_fires_are_listed(*, kernels: bool) -> None:
    found = Exit(5, 7)
    order = found.gates.argsort().tolist()
    floor = float(found.gates[order[2]])
    asleep = int(found.active.seqs[order[4]])
    found.thresholds[asleep] = STAYS
    assert found.apply_gate(floor - 1e-4, kernels=kernels) == sorted(order[2:4])
    seqs = found.active.list.chosen
    assert found.states.stage[seqs].tolist() == [1] * 5
    assert found.states.waited[seqs].tolist() == [0] * 5
    assert int((found.states.stage == 1).sum()) == 5
    gate = found.fired.gate[:2].double()
    torch.testing.assert_close(gate, found.gates[sorted(order[2:4])], rtol=0, atol=1e-5)


@both
def test_a_threshold_of_nothing_asks_no_gate(*, kernels: bool) -> None:
    found = Exit(3, 3)
    found.thresholds[found.active.seqs[1].long()] = 0.0
    assert found.apply_gate(1.01, kernels=kernels) == [1]
    assert int(found.fired.total) == 1


@both
def test_without_active_rows_no_gate_fires(*, kernels: bool) -> None:
    found = Exit(0, 3)
    assert found.apply_gate(0.0, kernels=kernels) == []
    assert found.apply_exit(kernels=kernels) == []


@both
def test_who_reaches_its_own_threshold_leaves(*, kernels: bool) -> None:
    """Without weights the gap is the score; a score at the threshold is enough."""
    found = Exit(4, 4)
    found.fuse = None
    rows = found.apply_gate(0.0, kernels=kernels)
    seqs = [int(found.active.seqs[row]) for row in rows]
    for seq, threshold in zip(seqs, (0.5, 0.5, 0.9, 0.1), strict=True):
        found.thresholds[seq] = threshold
    found.show([0.9] * 4, [0.5, 0.49, 0.95, 0.05])
    before = found.states.position.clone()
    assert found.apply_exit(kernels=kernels) == [seqs[0], seqs[2]]
    assert found.exited.positions[:2].tolist() == found.active.positions[rows][[0, 2]].tolist()
    assert found.exited.places[:2].tolist() == found.active.places[rows][[0, 2]].tolist()
    gone, kept = [seqs[0], seqs[2]], [seqs[1], seqs[3]]
    assert found.states.stage[gone].tolist() == [0, 0]
    assert found.states.stage[kept].tolist() == [1, 1]
    assert found.states.token[gone].tolist() == found.tokens[[0, 2]].tolist()
    assert found.states.emitted[gone].tolist() == found.tokens[[0, 2]].tolist()
    assert found.states.emitted[kept].tolist() == [-1, -1]
    assert found.states.depth[gone].tolist() == [8, 8]
    assert (found.states.position - before)[gone].tolist() == [1, 1]
    assert (found.states.position - before)[kept].tolist() == [0, 0]


@both
def test_the_second_key_weighs_gate_top_and_gap(*, kernels: bool) -> None:
    found = Exit(3, 3)
    rows = found.apply_gate(0.0, kernels=kernels)
    top, gap = [0.3, 0.999999999, 0.7], [0.1, 0.999999999, 0.0]
    found.show(top, gap)
    assert found.fuse is not None
    scores = fused_key(found.fuse, found.gates[rows].float(), torch.tensor(top), torch.tensor(gap))
    seqs = found.active.seqs[rows].long()
    found.thresholds[seqs] = scores + torch.tensor([1e-3, -1e-3, -1e-3])
    assert found.apply_exit(kernels=kernels) == seqs[1:].tolist()


@interpreted
@pytest.mark.parametrize(("count", "limit", "width"), [(1, 1, 256), (31, 53, 33), (130, 130, 8)])
def test_the_kernels_are_the_references(count: int, limit: int, width: int) -> None:
    found = Exit(count, limit, width)
    twin = Exit(count, limit, width)
    for name in ("inner", "down", "down_bias", "thresholds", "tokens", "fuse"):
        setattr(twin, name, getattr(found, name))
    for name in ("states", "active"):
        old = getattr(found, name)
        setattr(twin, name, type(old)(*(getattr(old, f.name).clone() for f in fields(old))))
    assert found.apply_gate(0.4, kernels=True) == twin.apply_gate(0.4, kernels=False)
    number = int(found.fired.count)
    top, gap = torch.rand(2, number).tolist()
    for each in (found, twin):
        each.show(top, gap)
    assert found.apply_exit(kernels=True) == twin.apply_exit(kernels=False)
    for field in fields(found.states):
        name = field.name
        assert torch.equal(getattr(found.states, name), getattr(twin.states, name)), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wide", [1, 64, 256, 512])
def test_they_compile(compile_ahead: Compiler, target: int, wide: int) -> None:
    types = dict.fromkeys(["inner", "down", "down_bias"], "*bf16") | {"thresholds": "*fp32"}
    types |= dict.fromkeys(["stage", "waited", "seqs", "count"], "*i32")
    types |= {"to_rows": "*i32", "to_seqs": "*i32", "to_gate": "*fp32", "to_count": "*i32"}
    types |= {"to_total": "*i64"}
    types |= {"floor": "fp32", "width": "i32", "inner_row": "i32", "threshold_row": "i32"}
    made = compile_ahead(
        "exit_decision", "_apply_gate", target, types, wide=wide, tile=columns(wide)
    )
    # One register, with triton 3.6 at 512 rows.
    assert made.spills <= 4
    small = ["rows", "seqs", "count", "stage", "waited", "depth_of", "to_seqs", "to_count"]
    large = ["tokens", "token", "position", "index", "emitted", "positions", "places"]
    large += ["to_positions", "to_places"]
    types = dict.fromkeys(["gates", "tops", "gaps", "fuse", "thresholds"], "*fp32")
    types |= dict.fromkeys(small, "*i32") | dict.fromkeys(large, "*i64") | {"threshold_row": "i32"}
    sizes: dict[str, Any] = {"edge": 1e-5, "depth": 8, "wide": wide}
    assert not compile_ahead("exit_decision", "_apply_exit", target, types, **sizes).spills
    del types["fuse"]
    made = compile_ahead("exit_decision", "_apply_exit", target, types, **sizes, fuse=None)
    assert not made.spills
