"""Stop strings in streams."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from offramp.server.text.stop import StopFilter

# Few letters, so that stop strings occur, overlap and nest.
TEXTS = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


def cut(text: str, stops: list[str], *, include: bool) -> str:
    """The whole text up to the stop string that ends first, the longest of those that tie."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[:end] if include else text[: end - max(map(len, ending))]
    return text


def streamed(pieces: list[str], stops: list[str], *, include: bool) -> tuple[str, bool]:
    stop = StopFilter(stops, include=include)
    out = ""
    for piece in pieces:
        released = stop.push(piece)
        out += released.text
        if released.stopped:
            return out, True
    return out + stop.flush(), False


@given(pieces=st.lists(st.text(alphabet="abc", max_size=6), max_size=10), stops=STOPS)
@example(pieces=["a", "ab", "c"], stops=["abc", "b"])
@example(pieces=["aab"], stops=["ab", "aab"])
def test_pieces_add_up_to_the_text_cut_at_the_earliest_stop(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    for include in (False, True):
        out, stopped = streamed(pieces, stops, include=include)
        assert out == cut(text, stops, include=include)
        assert stopped == any(stop in text for stop in stops)


@given(text=TEXTS, stops=STOPS)
def test_the_stop_string_that_matched_is_what_was_cut_off(text: str, stops: list[str]) -> None:
    stop = StopFilter(stops)
    for char in text:
        if stop.push(char).stopped:
            break
    kept, whole = (cut(text, stops, include=include) for include in (False, True))
    assert stop.matched == (whole.removeprefix(kept) or None)


@given(text=TEXTS, stops=STOPS)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(
    text: str, stops: list[str]
) -> None:
    stop = StopFilter(stops)
    released = stop.push(text)
    if not released.stopped:
        held = text[len(released.text) :]
        assert not held or any(other.startswith(held) and other != held for other in stops)


def test_nothing_is_held_back_without_stop_strings() -> None:
    assert StopFilter([]).push("abc").text == "abc"
