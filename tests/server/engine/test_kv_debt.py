"""The ledger and its rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.server.engine.kv_debt import DebtLedger, Owed, RowPool
from offramp.server.errors import BugError

SEGMENTS = 4


@given(exits=st.lists(st.integers(1, SEGMENTS - 1), max_size=12))
def test_recompute_pays_segment_by_segment(exits: list[int]) -> None:
    """What a segment lacks is what left below it; the top pays everything and frees the rows."""
    rows = RowPool(20)
    ledger = DebtLedger(rows, SEGMENTS)
    for position, segment in enumerate(exits):
        ledger.owe(1, Owed(position, segment, rows.take(1)[0]))
    ledger.owe(2, Owed(0, 1, rows.take(1)[0]))
    for segment in range(1, SEGMENTS):
        left = [position for position, first in enumerate(exits) if first <= segment]
        assert [debt.position for debt in ledger.lacking(1, segment)] == left
        ledger.advance(1, segment)
        if segment + 1 < SEGMENTS:
            assert ledger.total == len(exits) + 1
    assert ledger.owed(1) == []
    assert ledger.sequences == {2}
    assert rows.num_free == 19


def test_debts_wait_in_the_segment_they_reached() -> None:
    """A pass that is left half-way pays only up to there."""
    rows = RowPool(4)
    ledger = DebtLedger(rows, SEGMENTS)
    for position, segment in enumerate((1, 3, 2)):
        ledger.owe(0, Owed(position, segment, rows.take(1)[0]))
    ledger.advance(0, 1)
    assert [debt.segment for debt in ledger.owed(0)] == [2, 3, 2]
    ledger.advance(0, 2)
    assert [debt.segment for debt in ledger.owed(0)] == [3, 3, 3]
    assert rows.num_free == 1


def test_settling_frees_every_row_once() -> None:
    rows = RowPool(5)
    ledger = DebtLedger(rows, SEGMENTS)
    for position in range(5):
        ledger.owe(0, Owed(position, 1, rows.take(1)[0]))
    ledger.settle(0)
    ledger.settle(0)
    ledger.settle(9)
    assert sorted(rows.take(5)) == list(range(5))


def test_more_rows_than_there_are_is_a_bug() -> None:
    rows = RowPool(2)
    rows.take(1)
    with pytest.raises(BugError):
        rows.take(2)
    assert rows.num_free == 1
