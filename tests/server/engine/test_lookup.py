"""Guesses looked up in the text so far."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offramp.server.engine.lookup import PromptLookup


def naive(tokens: list[int], count: int) -> list[int]:
    """Search backwards for the last three, then the last two tokens."""
    for size in (3, 2):
        if len(tokens) > size:
            end = tokens[-size:]
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == end:
                    return tokens[start + size : start + size + count]
    return []


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 6), st.data())
def test_it_finds_what_a_search_finds(tokens: list[int], count: int, data: st.DataObject) -> None:
    """However often it is asked while the text grows."""
    lookup = PromptLookup()
    for end in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))):
        lookup.guess(tokens[:end], 1)
    expected = naive(tokens, count) if count else []
    assert lookup.guess(tokens, count) == expected


def test_a_repeated_phrase_is_continued() -> None:
    assert PromptLookup().guess([5, 6, 7, 8, 9, 1, 5, 6, 7], 3) == [8, 9, 1]
    assert PromptLookup().guess([1, 2, 3, 4], 3) == []
