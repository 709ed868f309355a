"""Tokens drawn by the C kernels against the reference, one row after another."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from offramp.kernels.native import library
from offramp.kernels.sampling import TokenDraw, draw_token, draw_tokens, kept_weights, uniform

pytestmark = pytest.mark.skipif(library() is None, reason="no C kernels")

NEAR = 1e-5
"""Draws and masses so close to a boundary may be rounded to its other side."""


def may_be(logits: Tensor, draw: TokenDraw, token: int) -> bool:
    """Whether it is the reference's for this draw, or for a draw or filters next to it."""
    if [token] == draw_tokens(logits[None], [draw._replace(row=0)], native=False):
        return True
    found = set()
    for up, top_p, min_p in itertools.product((-NEAR, 0, NEAR), repeat=3):
        near = min(max(draw.draw + up, 0.0), 1 - 1e-9)
        nucleus = draw.top_p if draw.top_p >= 1 else draw.top_p + top_p
        least = draw.min_p * (1 + min_p)
        found.add(draw_token(logits, draw.temperature, draw.top_k, nucleus, least, near))
    return token in found


@pytest.mark.parametrize("vocab", [1, 16, 100, 513, 5003])
@pytest.mark.parametrize("temperature", [1e-40, 0.8, 5.0])
@pytest.mark.parametrize("top_k", [0, 1, 600])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(1.0, 0.0), (0.9, 0.0), (0.0, 0.0), (1.0, 0.1), (0.7, 0.3), (1.0, 1.0)]
)
def test_they_are_the_references(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    torch.manual_seed(vocab)
    logits = 3 * torch.randn(6, vocab)
    logits[3] = logits[3].round()  # many are equal
    logits[4, ::2] = -torch.inf if vocab > 1 else 0.0
    logits[5] = 0
    draws = [
        TokenDraw(row, temperature, top_k, top_p, min_p, uniform(row, index))
        for row in range(6)
        for index in range(4)
    ]
    for draw, token in zip(draws, draw_tokens(logits, draws, native=True), strict=True):
        assert may_be(logits[draw.row], draw, token)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (9, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2)])
def test_the_ends_of_the_draw_are_the_first_and_the_last_that_may_come(
    draw: float, filters: tuple[int, float, float]
) -> None:
    torch.manual_seed(3)
    for vocab in (40, 700, 3000):
        logits = 2 * torch.randn(1, vocab)
        logits[0, :3] = logits[0, -5:] = -torch.inf
        ids, weights = kept_weights(logits[0], 1.0, *filters)
        kept = (torch.arange(vocab) if ids is None else ids)[weights > 0]
        token = draw_tokens(logits, [TokenDraw(0, 1.0, *filters, draw)], native=True)
        assert token == [int(kept[-1 if draw else 0])]


def test_rows_and_threads_do_not_matter() -> None:
    logits = 3 * torch.randn(9, 2000)
    draws = [TokenDraw(row, 0.8, 50, 0.95, 0.0, uniform(1, row)) for row in (4, 0, 8, 8, 2)]
    together = draw_tokens(logits, draws, native=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert draw_tokens(logits, draws, native=True) == together
    finally:
        torch.set_num_threads(threads)
    for draw, token in zip(draws, together, strict=True):
        assert draw_tokens(logits, [draw], native=True) == [token]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_ends_in_a_token_of_the_vocabulary(value: float) -> None:
    logits = torch.randn(2, 300)
    logits[0, 7] = value
    logits[1] = value
    draws = [TokenDraw(row, 1.0, top_k, 0.9, 0.0, 0.999) for row in (0, 1) for top_k in (0, 3)]
    tokens = draw_tokens(logits, draws, native=True)
    assert all(0 <= token < 300 for token in tokens)
    assert (tokens[0] == 7) == (value == torch.inf)


def test_what_does_not_fit_is_refused() -> None:
    draw = TokenDraw(2, 1.0, 0, 1.0, 0.0, 0.5)
    with pytest.raises(IndexError, match="rows"):
        draw_tokens(torch.randn(2, 10), [draw], native=True)
    with pytest.raises(ValueError, match="logits"):
        draw_tokens(torch.randn(3, 10).double(), [draw], native=True)
