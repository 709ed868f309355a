"""Each exit criterion against its definition, on logits and states made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.models.exits.criteria import (
    CRITERIA,
    ExitView,
    Trail,
    predictor_features,
    second_key,
)
from offramp.models.exits.head import ExitHead
from offramp.models.sampling_params import ExitCriterion

WIDTH, VOCAB, ROWS = 8, 6, 16


def head(gate: float = 0.5, **changes: Any) -> ExitHead:
    """An exit whose gate gives every state the same score."""
    made = ExitHead(
        layer=1,
        threshold=0.5,
        scale=torch.ones(WIDTH),
        gate_up=torch.zeros(2, WIDTH),
        down=torch.zeros(WIDTH, 1),
        norm=torch.ones(WIDTH),
        router_up=torch.zeros(2, WIDTH),
        router_up_bias=torch.zeros(2),
        router_down=torch.zeros(1, 2),
        router_down_bias=torch.tensor([math.log(gate / (1 - gate))]),
    )
    return replace(made, **changes)


class Stack:
    """Exits one above the other, seen by the same rows."""

    def __init__(self, exits: int = 3) -> None:
        self.exits = exits
        self.trail = Trail(ROWS, torch.device("cpu"))
        self.asked: list[int] = []

    def view(
        self,
        index: int,
        logits: Sequence[Sequence[float]],
        *,
        exit_head: ExitHead | None = None,
        hidden: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> ExitView:
        table = torch.tensor(logits)
        states = torch.zeros(len(table), WIDTH) if hidden is None else hidden
        # The first column tells which row of the table a state stands for.
        tagged = states.clone()
        if hidden is None:
            tagged[:, 0] = torch.arange(len(table))

        def logits_of(asked: Tensor) -> Tensor:
            self.asked.append(len(asked))
            return table[asked[:, 0].long()] if hidden is None else table[: len(asked)]

        return ExitView(
            exit_head or head(),
            tagged,
            logits_of,
            eps=1e-5,
            index=index,
            num_exits=self.exits,
            rows=torch.tensor(rows if rows is not None else range(len(table))),
            trail=self.trail,
        )


def score(criterion: ExitCriterion, view: ExitView) -> list[float]:
    values: list[float] = CRITERIA[criterion].score(view).tolist()
    return values


SURE = [9.0, 0.0, 0.0, 0.0, 0.0, 0.0]
TORN = [3.0, 3.0, 0.0, 0.0, 0.0, 0.0]
FLAT = [0.0] * VOCAB


def probs(row: Sequence[float]) -> list[float]:
    total = sum(map(math.exp, row))
    return [math.exp(value) / total for value in row]


def entropy(row: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probs(row))


def test_every_criterion_is_there_and_scores_between_0_and_1() -> None:
    assert set(CRITERIA) == set(ExitCriterion)
    for criterion in ExitCriterion:
        stack = Stack()
        for index in range(3):
            found = score(criterion, stack.view(index, [SURE, TORN, FLAT]))
            assert len(found) == 3
            assert all(0 <= value <= 1 for value in found), criterion


def test_gate() -> None:
    stack = Stack()
    view = stack.view(0, [SURE, FLAT], exit_head=head(0.7))
    assert score(ExitCriterion.GATE, view) == pytest.approx([0.7, 0.7])
    assert stack.asked == []


def test_the_second_key_is_only_made_where_the_gate_fires() -> None:
    stack = Stack()
    closed = stack.view(0, [SURE, SURE], exit_head=head(0.4, floor=0.5))
    assert score(ExitCriterion.TWO_KEY, closed) == [0.0, 0.0]
    assert stack.asked == []
    assert closed.num_logits == 0
    opened = stack.view(0, [SURE, TORN], exit_head=head(0.6, floor=0.5))
    gaps = [probs(SURE)[0] - probs(SURE)[1], 0.0]
    assert score(ExitCriterion.TWO_KEY, opened) == pytest.approx(gaps, abs=1e-6)
    assert stack.asked == [2]


def test_the_keys_are_weighed_by_their_logits() -> None:
    weights = torch.tensor([0.5, 1.5, -0.25, 0.1])
    gate, table = torch.tensor([0.3]), torch.tensor([probs([2.0, 1.0, 0, 0, 0, 0])])
    top, second = sorted(probs([2.0, 1.0, 0, 0, 0, 0]))[-1:-3:-1]
    keys = [math.log(p / (1 - p)) for p in (0.3, top, top - second)]
    total = 0.5 * keys[0] + 1.5 * keys[1] - 0.25 * keys[2] + 0.1
    expected = 1 / (1 + math.exp(-total))
    assert float(second_key(weights, gate, table)) == pytest.approx(expected, abs=1e-5)


def test_logits_are_made_once_a_row() -> None:
    stack = Stack()
    view = stack.view(0, [SURE, TORN, FLAT])
    assert view.logits(torch.tensor([2])).tolist() == [FLAT]
    assert view.logits(torch.tensor([0, 2])).tolist() == [SURE, FLAT]
    assert stack.asked == [1, 1]
    assert view.num_logits == 2


def test_probability_gap_and_entropy() -> None:
    rows = [SURE, TORN, FLAT]
    stack = Stack()
    best = [max(probs(row)) for row in rows]
    assert score(ExitCriterion.MAX_PROB, stack.view(0, rows)) == pytest.approx(best)
    gaps = [probs(SURE)[0] - probs(SURE)[1], 0.0, 0.0]
    assert score(ExitCriterion.TOP2_GAP, stack.view(0, rows)) == pytest.approx(gaps, abs=1e-6)
    rest = [1 - entropy(row) / math.log(VOCAB) for row in rows]
    assert score(ExitCriterion.ENTROPY, stack.view(0, rows)) == pytest.approx(rest, abs=1e-5)


def test_entropy_drop_compares_with_the_exit_below() -> None:
    stack = Stack()
    rows = (7, 3)
    assert score(ExitCriterion.ENTROPY_DROP, stack.view(0, [FLAT, SURE], rows=rows)) == [0, 0]
    found = score(ExitCriterion.ENTROPY_DROP, stack.view(1, [TORN, FLAT], rows=rows))
    drop = (entropy(FLAT) - entropy(TORN)) / entropy(FLAT)
    # The second row's entropy rose, which is no reduction at all.
    assert found == pytest.approx([1 - drop, 1.0], abs=1e-5)


def test_saturation_is_the_cosine_with_the_exit_below() -> None:
    stack = Stack()
    below = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    above = below + torch.tensor([[0.0] * WIDTH, [1.0] * WIDTH])
    logits = [FLAT, FLAT]
    assert score(ExitCriterion.SATURATION, stack.view(0, logits, hidden=below)) == [0.0, 0.0]
    found = score(ExitCriterion.SATURATION, stack.view(1, logits, hidden=above))
    cosine = float(below[1] @ above[1] / below[1].norm() / above[1].norm())
    assert found == pytest.approx([1.0, max(0.0, cosine)], abs=1e-5)


def test_patience_counts_exits_that_agree() -> None:
    stack = Stack(exits=4)
    other = [0.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    below = [[SURE, SURE], [SURE, other], [SURE, other], [other, other]]
    found = [score(ExitCriterion.PATIENCE, stack.view(i, rows)) for i, rows in enumerate(below)]
    assert found == [pytest.approx(row) for row in ([0, 0], [1 / 3, 0], [2 / 3, 1 / 3], [0, 2 / 3])]


def test_memory_of_an_earlier_token_in_the_same_row_is_forgotten() -> None:
    """Rows change hands; the first exit starts over."""
    for criterion in [name for name, each in CRITERIA.items() if each.compares_exits]:
        stack, fresh = Stack(), Stack()
        for index in range(3):
            stack.view(index, [SURE])
            score(criterion, stack.view(index, [SURE]))
        again = [score(criterion, stack.view(i, [row])) for i, row in enumerate((TORN, SURE))]
        first = [score(criterion, fresh.view(i, [row])) for i, row in enumerate((TORN, SURE))]
        assert again == first, criterion


def test_q_exit_accumulates_the_posterior() -> None:
    stack = Stack()
    gates = (0.2, 0.5, 0.9)
    survival = 1.0
    for index, gate in enumerate(gates):
        survival *= 1 - gate
        found = score(ExitCriterion.Q_EXIT, stack.view(index, [FLAT], exit_head=head(gate)))
        assert found == pytest.approx([1 - survival], abs=1e-6)


def test_the_predictor_reads_its_features() -> None:
    """Logits of the best four, their shares among themselves, and how those moved."""
    now, earlier = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1, 1, 1, 9]])
    features = predictor_features(now, earlier)
    local = torch.tensor([4.0, 3.0, 2.0, 1.0]).softmax(dim=-1)
    expected = torch.cat((torch.tensor([4.0, 3.0, 2.0, 1.0]), local, local - 0.25))
    torch.testing.assert_close(features[0], expected)
    weights = torch.zeros(1, 12)
    weights[0, 0] = 1.0
    trained = head(
        predictor_up=weights,
        predictor_up_bias=torch.zeros(1),
        predictor_down=torch.tensor([[2.0]]),
        predictor_down_bias=torch.tensor([-1.0]),
    )
    found = score(ExitCriterion.PREDICTOR, Stack().view(0, [SURE], exit_head=trained))
    inner = 9.0 / (1 + math.exp(-9.0))
    assert found == pytest.approx([1 / (1 + math.exp(-(2 * inner - 1)))], abs=1e-6)
    assert score(ExitCriterion.PREDICTOR, Stack().view(0, [SURE])) == [0.0]


def test_fixed_lets_everyone_go() -> None:
    assert score(ExitCriterion.FIXED, Stack().view(0, [FLAT, SURE])) == [1.0, 1.0]
