"""Tokens drawn by the C kernels against the reference, one row after another."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offramp.kernels.native import library
from offramp.kernels.noise import TokenNoise, gumbel
from offramp.kernels.sampling import TokenDraw, draw_token, draw_tokens, least_logit

pytestmark = pytest.mark.skipif(library() is None, reason="no C kernels")

NEAR, NEAR_KEYS = 1e-5, 1e-4
"""Masses and keys that are so close may be rounded to the other side."""
FILTERS = [(0, 1.0, 0.0), (9, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2)]


def may_be(logits: Tensor, draw: TokenDraw, token: int) -> bool:
    """Whether it is the reference's, or has a key next to it, for these filters or those next."""
    noise, found = draw.noise, set()
    temperature = max(noise.temperature, 1e-30)
    for up, more in itertools.product((-NEAR, 0, NEAR), repeat=2):
        nucleus = draw.top_p if draw.top_p >= 1 else draw.top_p + up
        found.add(draw_token(logits, noise, draw.top_k, nucleus, draw.min_p * (1 + more)))
    ids = torch.tensor([token, *found])
    keys = logits[ids].double() / temperature + gumbel(noise.seed, noise.index, ids)
    least = least_logit(logits, temperature, draw.top_k, draw.top_p, draw.min_p)
    kept = float(logits[token]) >= least - NEAR * temperature * 100
    return token in found or (kept and float((keys[0] - keys[1:]).abs().min()) < NEAR_KEYS)


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
        TokenDraw(row, TokenNoise(temperature, seed, index), top_k, top_p, min_p)
        for row in range(6)
        for seed in (row, -row, 2**63 + row)
        for index in range(3)
    ]
    tokens = draw_tokens(logits, draws, native=True)
    for draw, token in zip(draws, tokens, strict=True):
        assert may_be(logits[draw.row], draw, token)
    same = zip(tokens, draw_tokens(logits, draws, native=False), strict=True)
    assert sum(own == other for own, other in same) >= 0.95 * len(draws)


@pytest.mark.parametrize("filters", FILTERS)
def test_tokens_come_as_often_as_they_should(filters: tuple[int, float, float]) -> None:
    """Chi-square over many draws; the bound is passed by chance once in about 10,000 runs."""
    torch.manual_seed(4)
    logits, draws = 2 * torch.randn(1, 70), 20_000
    temperature, row = 1.3, logits[0].double()
    least = least_logit(logits[0], temperature, *filters)
    shares = torch.where(row >= least, row / temperature, -torch.inf).softmax(0)
    noises = [TokenNoise(temperature, 5, index) for index in range(draws)]
    tokens = draw_tokens(logits, [TokenDraw(0, each, *filters) for each in noises], native=True)
    counts = torch.bincount(torch.tensor(tokens), minlength=70)
    assert not counts[shares == 0].any()
    expected, counts = draws * shares[shares > 0], counts[shares > 0]
    freedom = len(counts) - 1
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi <= freedom + 4 * (2 * freedom) ** 0.5 + 8


def test_rows_and_threads_do_not_matter() -> None:
    logits = 3 * torch.randn(9, 2000)
    rows = (4, 0, 8, 8, 2)
    draws = [TokenDraw(row, TokenNoise(0.8, 1, row), 50, 0.95, 0.0) for row in rows]
    together = draw_tokens(logits, draws, native=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert draw_tokens(logits, draws, native=True) == together
    finally:
        torch.set_num_threads(threads)
    for draw, token in zip(draws, together, strict=True):
        assert draw_tokens(logits, [draw], native=True) == [token]


def test_the_whole_noise_counts() -> None:
    """A token far below the best comes as often as its share says, by noise near its most."""
    logits = torch.zeros(1, 64)
    logits[0, 40] = 9.0
    noises = [TokenNoise(1.0, 3, index) for index in range(60_000)]
    tokens = draw_tokens(logits, [TokenDraw(0, each, 0, 1.0, 0.0) for each in noises], native=True)
    rare = sum(token != 40 for token in tokens)
    expected = 60_000 * 63 / (63 + torch.tensor(9.0).exp().item())
    assert abs(rare - expected) < 4 * expected**0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_ends_in_a_token_of_the_vocabulary(value: float) -> None:
    logits = torch.randn(2, 300)
    logits[0, 7] = value
    logits[1] = value
    noise = TokenNoise(1.0, 0, 0)
    draws = [TokenDraw(row, noise, top_k, 0.9, 0.0) for row in (0, 1) for top_k in (0, 3)]
    draws += [unfiltered(draw) for draw in draws]
    tokens = draw_tokens(logits, draws, native=True)
    assert all(0 <= token < 300 for token in tokens)
    assert (tokens[0] == 7) == (value == torch.inf)


def unfiltered(draw: TokenDraw) -> TokenDraw:
    return draw._replace(noise=replace(draw.noise, index=1), top_k=0, top_p=1.0)


def test_what_does_not_fit_is_refused() -> None:
    draw = TokenDraw(2, TokenNoise(1.0, 0, 0), 0, 1.0, 0.0)
    with pytest.raises(IndexError, match="rows"):
        draw_tokens(torch.randn(2, 10), [draw], native=True)
    with pytest.raises(ValueError, match="logits"):
        draw_tokens(torch.randn(3, 10).double(), [draw], native=True)
