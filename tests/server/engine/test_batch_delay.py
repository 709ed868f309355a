"""When deep tokens wait for others, by simulation."""

from __future__ import annotations

import pytest

from offramp.models.costs import CostModel, StepCost
from offramp.server.engine.batch_delay import BatchDelay, simulate

HALVES = [(1.0, 1.0), (1.0, 1.0)]
DEPTHS = (4, 8)


def costs_of(seconds: list[tuple[float, float]], rows: int) -> CostModel:
    """Segments with their seconds for one row and for ``rows``; leaving costs nothing."""
    costs = CostModel.of(len(seconds))
    costs.segments = [StepCost.of(dict(zip((1, rows), each, strict=True))) for each in seconds]
    return costs


def delay(
    seconds: list[tuple[float, float]], deep: int, patience: float = 4.0, rows: int = 16
) -> BatchDelay:
    """A hundred tokens seen, ``deep`` of which took all layers."""
    made = BatchDelay(costs_of(seconds, rows), patience, DEPTHS)
    for number in range(100):
        made.observe(DEPTHS[number < deep])
    return made


def speed(seconds: list[tuple[float, float]], share: float, deep: int, rows: int) -> float:
    """Tokens a second where every so many-th token is deep."""
    draws = [[int((token + 7 * row) % 100 < deep) for row in range(rows)] for token in range(100)]
    tokens, wall = simulate(draws, costs_of(seconds, rows), [(0.0, 0.0), (share, 4.0)], 20, 200)
    return tokens / wall


def test_few_deep_tokens_wait_where_reading_weights_binds() -> None:
    """And that is worth a tenth of the throughput at least."""
    ground, upper = delay(HALVES, 20).choose(16)
    assert ground == (0.0, 0.0)
    assert upper[0] > 0
    assert upper[1] == 4.0
    assert speed(HALVES, upper[0], 20, 16) > 1.1 * speed(HALVES, 0.0, 20, 16)


@pytest.mark.parametrize("deep", [0, 100], ids=["all leave", "none leaves"])
def test_without_a_mix_of_depths_no_row_waits(deep: int) -> None:
    assert delay(HALVES, deep).choose(16)[1][0] == 0.0


def test_where_rows_cost_what_they_are_none_waits() -> None:
    """Seconds in proportion to the rows: a larger batch saves nothing."""
    assert delay([(1.0, 16.0), (1.0, 16.0)], 20).choose(16)[1][0] == 0.0


def test_a_single_row_has_none_to_wait_for() -> None:
    assert delay(HALVES, 20, rows=1).choose(1)[1][0] == 0.0


def test_old_depths_are_forgotten() -> None:
    made = delay(HALVES, 20)
    assert not made.due()
    assert made.choose(16)[1][0] > 0
    shares = []
    for _ in range(6):
        for _ in range(512):
            made.observe(8)
        assert made.due()
        shares.append(made.choose(16)[1][0])
    assert shares[-1] == 0.0
    assert not made.due()


def test_exits_that_cost_more_than_they_save_do_not_pay() -> None:
    """Leaving takes longer than the segment above: full depth makes more tokens a second."""
    cheap, dear = delay(HALVES, 20), delay(HALVES, 20)
    dear._costs.checks[0] = StepCost.of({1: 9.0, 16: 9.0})
    for made in (cheap, dear):
        made.choose(16)
    assert (cheap.exits_pay, dear.exits_pay) == (True, False)
    # Once all tokens run every layer there is nothing to judge exits by: the verdict stays.
    for _ in range(2000):
        dear.observe(8)
    dear._counts[0] = 0.0
    dear.choose(16)
    assert not dear.exits_pay
