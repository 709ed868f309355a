"""Incremental text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.server.errors import ContextLengthExceeded, InvalidRequest
from offramp.server.text.detokenizer import Detokenizer
from offramp.server.text.tokenizer import Tokenizer
from tests.server.fakes import END, byte_backend, render

BACKEND = byte_backend()
# Families, flags, combining marks, Chinese: several tokens a character, several characters a glyph.
HARD = "naïve 👨‍👩‍👧‍👦 🇩🇪 é 漢字 \u202e end"


@given(text=st.text())
def test_pieces_add_up_to_the_text_and_never_break_a_character(text: str) -> None:
    detokenizer = Detokenizer(BACKEND)
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    whole = BACKEND.decode(ids)
    pieces = [detokenizer.push(token) for token in ids]
    if "\ufffd" not in whole:
        assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == whole


def test_a_character_comes_with_its_last_byte() -> None:
    detokenizer = Detokenizer(BACKEND)
    ids = BACKEND.encode("é", add_special_tokens=False).ids
    assert [detokenizer.push(token) for token in ids] == ["", "é"]


@pytest.mark.parametrize("text", [HARD, HARD[::-1]])
def test_hard_texts(text: str) -> None:
    detokenizer = Detokenizer(BACKEND)
    pieces = [detokenizer.push(token) for token in BACKEND.encode(text).ids]
    assert "".join(pieces) == text


def test_an_incomplete_character_is_flushed_at_the_end() -> None:
    detokenizer = Detokenizer(BACKEND)
    first = BACKEND.encode("é", add_special_tokens=False).ids[0]
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<end>b")])
def test_special_tokens(skip: bool, text: str) -> None:  # noqa: FBT001 (parametrised)
    detokenizer = Detokenizer(BACKEND, skip_special_tokens=skip)
    (a,), (b,) = BACKEND.encode("a").ids, BACKEND.encode("b").ids
    assert "".join(map(detokenizer.push, (a, END, b))) + detokenizer.flush() == text


def test_a_hopelessly_long_text_is_refused_before_it_is_encoded() -> None:
    tokenizer = Tokenizer(BACKEND, render)
    with pytest.raises(ContextLengthExceeded) as caught:
        tokenizer.encode(["x" * 10_000_000], max_tokens=100)
    assert caught.value.param == "prompt"
    with pytest.raises(ContextLengthExceeded):
        tokenizer.encode_chat([{"role": "user", "content": "x" * 10_000_000}], max_tokens=100)


def test_a_model_without_chat_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(BACKEND, None).encode_chat([{"role": "user", "content": "a"}], max_tokens=100)
