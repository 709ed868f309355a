"""Inputs of a model's shape, the same numbers every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from offramp.kernels.rotary import RotaryTable
from offramp.models.config import ModelConfig

BLOCK = 32
"""Tokens of a K,V block, the server's own default."""
_SEED = 7


@dataclass(frozen=True, slots=True)
class Shape:
    """What inputs are made for: the model's sizes, ``context`` tokens a text, dtype and device."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    context: int


@dataclass(frozen=True, slots=True)
class Copies:
    """How often inputs are there: until they come to ``bytes``, at most ``most`` times."""

    bytes: int = 0
    most: int = 1

    def of(self, size: int) -> int:
        """Copies of ``size`` bytes."""
        return max(1, min(self.most, -(-self.bytes // max(size, 1))))


class Setup:
    """Makes a case's inputs; two of them make the same.

    With ``mixed``, positions and thresholds differ from row to row as they do between texts, which
    is for checks; else all rows have the whole context and all may leave.
    """

    def __init__(self, shape: Shape, copies: Copies | None = None, *, mixed: bool = False) -> None:
        self.config = shape.config
        self.dtype = shape.dtype
        self.device = shape.device
        self.context = shape.context
        self.mixed = mixed
        self.copies = copies or Copies()
        self._generator = torch.Generator(shape.device).manual_seed(_SEED)
        self._random = Random(_SEED)  # noqa: S311 (inputs of a benchmark)

    def normal(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed numbers of the model's dtype."""
        dtype = dtype or self.dtype
        return torch.randn(sizes, generator=self._generator, dtype=dtype, device=self.device)

    def weight(self, outs: int, ins: int) -> Tensor:
        """A matrix [outs, ins] that keeps the size of what it is multiplied with."""
        return self.normal(outs, ins).mul_(ins**-0.5)

    def uniform(self, *sizes: int) -> Tensor:
        """Numbers in [0, 1), fp32."""
        return torch.rand(sizes, generator=self._generator, device=self.device)

    def zeros(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros of the model's dtype."""
        return torch.zeros(sizes, dtype=dtype or self.dtype, device=self.device)

    def tokens(self, number: int) -> Tensor:
        """Ids of tokens [number]."""
        return torch.randint(
            self.config.vocab_size, (number,), generator=self._generator, device=self.device
        )

    def order(self, number: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers below ``number`` in no order."""
        return torch.randperm(number, generator=self._generator, device=self.device).to(dtype)

    def count(self, number: int) -> Tensor:
        """A count as kernels read it, int32 [1]."""
        return torch.tensor([number], dtype=torch.int32, device=self.device)

    def thresholds(self, number: int) -> Tensor:
        """Thresholds [number]: all 0, who asks leaves; ``mixed``, some above what scores reach."""
        return 1.5 * self.uniform(number) if self.mixed else torch.zeros_like(self.uniform(number))

    def positions(self, number: int) -> list[int]:
        """Positions of the newest tokens."""
        if self.mixed:
            return [self._random.randrange(self.context) for _ in range(number)]
        return [self.context - 1] * number

    def rotary(self) -> RotaryTable:
        """Angles of all positions."""
        inv_freq = torch.tensor(self.config.inv_freq)
        scale = self.config.rope_scale
        return RotaryTable(inv_freq, self.context, scale, self.dtype, self.device)

    def copied(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors and copies of them, as many as ``copies`` says."""
        number = self.copies.of(size_of(*tensors))
        return [tensors, *(tuple(each.clone() for each in tensors) for _ in range(number - 1))]


def size_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(each.numel() * each.element_size() for each in tensors)


def cold_bytes(copies: Sequence[tuple[Tensor, ...]]) -> int:
    """Bytes that are read before any is read again."""
    return sum(size_of(*each) for each in copies)
