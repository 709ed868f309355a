"""Noise that makes the token of the largest logit a random one; needs no torch to be imported."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp.kernels.native_structures import Noise

if TYPE_CHECKING:
    from torch import Tensor

COLDEST = 1e-30
"""Far below it fp32 has no number for a temperature, and all below it are greedy anyway."""
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1
_ROTATIONS = 13, 15, 26, 6, 17, 29, 16, 24


@dataclass(frozen=True, slots=True)
class TokenNoise:
    """What makes a row's token a random one: see `gumbel`. ``temperature`` is above 0."""

    temperature: float
    seed: int
    index: int

    def keys(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Over the temperature, with noise (fp64), those of tokens ``ids`` [n]."""
        scaled = logits.double() / max(self.temperature, COLDEST)
        return scaled + gumbel(self.seed, self.index, ids)

    def native(self) -> Noise:
        """As the C kernels take it."""
        seed = self.seed & _MASK64
        words = seed & _MASK32, seed >> 32
        return Noise(self.temperature, words, self.index & _MASK32)


def native_noises(noises: Sequence[TokenNoise | None]) -> ctypes.Array[Noise] | None:
    """The noise of rows as the C kernels take it; None if none of them is random."""
    if all(noise is None for noise in noises):
        return None
    made = [Noise() if noise is None else noise.native() for noise in noises]
    return (Noise * len(made))(*made)


def gumbel(seed: int, index: int, ids: Tensor) -> Tensor:
    """Noise [n] (fp64) for the ``index``-th token of stream ``seed`` to be one of ``ids`` [n].

    The token of the largest logit / temperature + noise comes with the probability that the softmax
    gives it (Gumbel, "Statistical theory of extreme values", 1954). Noise depends on nothing else,
    so who guesses a token with the same noise is often right (Daliri, Musco and Suresh, "Coupling
    without communication and drafter-invariant speculative decoding", arXiv 2408.07978).
    """
    counters = (ids >> 5 << 4) + (ids & 15)
    first, second = random_words(seed, index, counters)
    words = first.where((ids & 16) == 0, second)
    uniform = ((words >> 1) + 0.5) / 2**31
    return -(-(-uniform.clamp_max(1 - 2**-24)).log1p()).log()


def random_words(seed: int, index: int, counters: Tensor) -> tuple[Tensor, Tensor]:
    """Two random words, 32 bits in int64, for each of ``counters`` (int64): Threefry-2x32-20.

    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.)
    """
    low, high = seed & _MASK32, seed >> 32 & _MASK32
    keys = low, high, 0x1BD11BDA ^ low ^ high
    # Sums of int32 wrap around, which spares half of the time of int64.
    x = counters.int() + signed(low, 32)
    y = x * 0 + signed(index + high, 32)
    for step in range(20):
        turn, key = _ROTATIONS[step % 8], step // 4 + 1
        x = x + y
        y = (y << turn | y >> (32 - turn) & (1 << turn) - 1) ^ x
        if step % 4 == 3:
            x = x + signed(keys[key % 3], 32)
            y = y + signed(keys[(key + 1) % 3] + key, 32)
    return x.long() & _MASK32, y.long() & _MASK32


def signed(value: int, bits: int) -> int:
    """The last bits of ``value`` as a signed number."""
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
