"""When leavers go and when a thin group waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.server.engine.policy import ExitPolicy, LinearCost

MS = 1e-3


def measured(fixed: float, per_row: float) -> LinearCost:
    """A cost learnt from exact measurements."""
    cost = LinearCost()
    for rows in (1, 2, 4, 8, 16) * 4:
        cost.add(rows, fixed + per_row * rows)
    return cost


def policy(
    *,
    segments: tuple[tuple[float, float], ...] = ((4 * MS, 0.1 * MS), (4 * MS, 0.1 * MS)),
    head: tuple[float, float] = (1 * MS, 0.05 * MS),
    fill: tuple[float, float] = (0.1 * MS, 0.01 * MS),
    max_hold: float = 1.0,
) -> ExitPolicy:
    made = ExitPolicy(len(segments), max_hold)
    made.costs.segments = [measured(*cost) for cost in segments]
    made.costs.head, made.costs.fill = measured(*head), measured(*fill)
    return made


@given(fixed=st.floats(1e-5, 1e-1), per_row=st.floats(0, 1e-2))
def test_the_fit_finds_both_parts(fixed: float, per_row: float) -> None:
    cost = measured(fixed, per_row)
    assert cost.fixed == pytest.approx(fixed, rel=1e-4, abs=1e-7)
    assert cost.per_row == pytest.approx(per_row, rel=1e-4, abs=1e-7)
    assert cost.at(11) == pytest.approx(fixed + 11 * per_row, rel=1e-4, abs=1e-7)


def test_no_rows_cost_nothing_and_nothing_measured_costs_nothing() -> None:
    assert measured(1.0, 1.0).at(0) == 0.0
    assert LinearCost().at(5) == 0.0
    assert not LinearCost().known


def test_one_row_count_gives_its_mean() -> None:
    """Without a spread all of the cost counts as fixed."""
    cost = LinearCost()
    for seconds in (2.0, 4.0):
        cost.add(3, seconds)
    assert cost.per_row == 0.0
    assert cost.at(3) == pytest.approx(3.0, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), min_size=1, max_size=50))
def test_no_measurement_gives_a_negative_cost(samples: list[tuple[int, float]]) -> None:
    cost = LinearCost()
    for rows, seconds in samples:
        cost.add(rows, seconds)
    assert cost.fixed >= 0.0
    assert cost.per_row >= 0.0


def test_old_measurements_fade() -> None:
    cost = measured(1.0, 0.0)
    for _ in range(2000):
        cost.add(1, 3.0)
        cost.add(2, 3.0)
    assert cost.at(1) == pytest.approx(3.0, rel=0.01)


def test_leaving_pays_when_the_last_stayer_is_gone() -> None:
    """All leave: the steps above are saved whole."""
    made = policy(fill=(0.0, 1 * MS))
    assert made.lets_go(0, leaving=2, staying=0)
    assert not made.lets_go(0, leaving=2, staying=1)


def test_leaving_pays_when_a_fill_is_cheaper_than_a_row() -> None:
    assert policy(fill=(0.0, 0.05 * MS)).lets_go(0, leaving=1, staying=7)
    assert not policy(fill=(0.0, 0.2 * MS)).lets_go(0, leaving=1, staying=7)


def test_a_refused_exit_is_tried_once_in_a_while() -> None:
    """Costs are learnt from steps that run, so a wrong belief must not last for ever."""
    made = policy(fill=(0.0, 5 * MS))
    answers = [made.lets_go(0, leaving=1, staying=3) for _ in range(320)]
    assert sum(answers) == 10
    assert not any(answers[:10])


def test_a_thin_group_waits_for_a_crowd_below() -> None:
    """One slot at a deep segment, many ready for the ground: the many go first."""
    made = policy(segments=((1 * MS, 0.0), (40 * MS, 0.0)), head=(0.1 * MS, 0.0))
    assert made.holds(1, staying=1, ready=30, age=0.0)
    assert not made.holds(1, staying=30, ready=1, age=0.0)


def test_nobody_waits_for_nobody() -> None:
    assert not policy(segments=((1 * MS, 0.0), (40 * MS, 0.0))).holds(1, 1, ready=0, age=0.0)


@given(
    staying=st.integers(1, 64),
    ready=st.integers(0, 64),
    over=st.floats(0, 100),
    costs=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_no_wait_outlives_the_bound(
    staying: int, ready: int, over: float, costs: tuple[float, float, float, float]
) -> None:
    """Whatever steps cost: at the configured age a group goes."""
    ground, ground_row, deep, deep_row = costs
    made = policy(segments=((ground, ground_row), (deep, deep_row)), max_hold=0.05)
    assert not made.holds(1, staying, ready, age=0.05 + over)
