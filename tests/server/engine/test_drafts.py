"""Guesses looked up in the text so far."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offramp.server.engine.drafts import LONGEST, AcceptanceRates, Match, NgramProposer


def naive(tokens: list[int]) -> Match | None:
    """Search for the end of the text, the longest and then the latest match winning."""
    for size in range(LONGEST, 1, -1):
        end = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == end:
                return Match(size, start + size)
    return None


@given(st.lists(st.integers(0, 3), max_size=16), st.data())
def test_it_finds_what_a_search_finds(tokens: list[int], data: st.DataObject) -> None:
    """However often it searches while the text grows."""
    lookup = NgramProposer()
    for end in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))):
        lookup.find(tokens[:end])
    assert lookup.find(tokens) == naive(tokens)


def test_a_repeated_phrase_is_continued() -> None:
    assert NgramProposer().find([5, 6, 7, 8, 9, 1, 5, 6, 7]) == Match(3, 3)
    assert NgramProposer().find([1, 2, 3, 4]) is None


def test_only_the_latest_places_of_a_pair_are_kept() -> None:
    lookup = NgramProposer()
    assert lookup.find([7, 1, 2, *[3, 1, 2] * 50]) == Match(LONGEST, 150)
    assert max(map(len, lookup._ends.values())) <= 16


def test_shares_follow_what_is_seen_and_copies_go_their_own_way() -> None:
    common = AcceptanceRates()
    own = common.scaled(1.0)
    for _ in range(50):
        own.add(3, 0.1, accepted=False)
        own.add(LONGEST + 4, 0.1, accepted=True)
    assert own.of(3) < 0.01
    assert common.of(3) > 0.5
    assert own.of(LONGEST) == own.of(LONGEST + 9) > 0.99
    assert own.of(2) == common.of(2)
    assert common.scaled(0.5).of(3) == common.of(3) / 2
