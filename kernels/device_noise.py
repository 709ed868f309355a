"""Random words and Gumbel noise inside Triton kernels; kernels/noise.py is their reference."""

from __future__ import annotations

from offramp.kernels.backend import jit, tl


@jit
def random_words(
    seed: tl.tensor, index: tl.tensor, counters: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """See `random_words` in kernels/noise.py; uint32."""
    low = seed.to(tl.uint32)
    high = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    third = low ^ high ^ 0x1BD11BDA
    x = counters.to(tl.uint32) + low
    y = counters.to(tl.uint32) * 0 + (index.to(tl.uint32) + high)
    x, y = _four_rounds(x, y, 13, 15, 26, 6)
    x, y = _four_rounds(x + high, y + (third + 1), 17, 29, 16, 24)
    x, y = _four_rounds(x + third, y + (low + 2), 13, 15, 26, 6)
    x, y = _four_rounds(x + low, y + (high + 3), 17, 29, 16, 24)
    x, y = _four_rounds(x + high, y + (third + 4), 13, 15, 26, 6)
    return x + third, y + (low + 5)


@jit
def _four_rounds(
    x: tl.tensor,
    y: tl.tensor,
    a: tl.constexpr,
    b: tl.constexpr,
    c: tl.constexpr,
    d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    x += y
    y = ((y << a) | (y >> (32 - a))) ^ x
    x += y
    y = ((y << b) | (y >> (32 - b))) ^ x
    x += y
    y = ((y << c) | (y >> (32 - c))) ^ x
    x += y
    y = ((y << d) | (y >> (32 - d))) ^ x
    return x, y


@jit
def words_of(seed: tl.tensor, index: tl.tensor, token: tl.tensor) -> tl.tensor:
    """The random words of any tokens."""
    first, second = random_words(seed, index, token // 32 * 16 + token % 16)
    return tl.where(token // 16 % 2 == 0, first, second)


@jit
def gumbel(words: tl.tensor) -> tl.tensor:
    """Noise of random words; of small numbers log(1 - x) has to be a series."""
    x = tl.minimum(((words >> 1).to(tl.float32) + 0.5) * (1.0 / 2147483648.0), 1.0 - 2.0**-24)
    series = x * (1.0 + x * (1.0 / 2.0 + x * (1.0 / 3.0 + x * (1.0 / 4.0))))
    return -tl.log(tl.where(x < 0.02, series, -tl.log(1.0 - x)))
