"""When deep tokens wait for company, weighed on paper."""

from __future__ import annotations

import pytest

from offramp.server.engine.rebatching import Costs, Curve, Rebatching, simulate

HALVES = [(1.0, 1.0), (1.0, 1.0)]
DEPTHS = (4, 8)


def rebatching(
    seconds: list[tuple[float, float]], deep: int, rides: float = 4.0, slots: int = 16
) -> Rebatching:
    """A hundred tokens seen, ``deep`` of which took all layers."""
    made = Rebatching(seconds, slots, rides, DEPTHS)
    for number in range(100):
        made.observe(DEPTHS[number < deep])
    return made


def speed(seconds: list[tuple[float, float]], share: float, deep: int, slots: int) -> float:
    """Tokens a second where every so many-th token is deep."""
    rows = (1, slots)
    costs = Costs(tuple(Curve(rows, each) for each in seconds), (Curve((1,), (0.0,)),))
    draws = [[int((row + 7 * slot) % 100 < deep) for slot in range(slots)] for row in range(100)]
    return simulate(draws, costs, [(0.0, 0.0), (share, 4.0)], 20, 200).tokens_per_s


def test_few_deep_tokens_wait_where_reading_weights_binds() -> None:
    """And that is worth a tenth of the throughput at least."""
    ground, upper = rebatching(HALVES, 20).choose(16)
    assert ground == (0.0, 0.0)
    assert upper[0] > 0
    assert upper[1] == 4.0
    assert speed(HALVES, upper[0], 20, 16) > 1.1 * speed(HALVES, 0.0, 20, 16)


@pytest.mark.parametrize("deep", [0, 100], ids=["all leave", "nobody leaves"])
def test_without_a_mix_of_depths_nobody_waits(deep: int) -> None:
    assert rebatching(HALVES, deep).choose(16)[1][0] == 0.0


def test_where_rows_cost_what_they_are_nobody_waits() -> None:
    """Seconds in proportion to the riders: company saves nothing."""
    assert rebatching([(1.0, 16.0), (1.0, 16.0)], 20).choose(16)[1][0] == 0.0


def test_a_single_slot_has_nobody_to_wait_for() -> None:
    assert rebatching(HALVES, 20, slots=1).choose(1)[1][0] == 0.0


def test_old_depths_are_forgotten() -> None:
    made = rebatching(HALVES, 20)
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
