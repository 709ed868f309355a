"""Where the rows of a forward pass stand in their texts and in the pages of K,V."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.kernels.rotary import RotaryTable


@dataclass(frozen=True, slots=True)
class Span:
    """Ascending positions of one sequence under its block table, on the host.

    Products of the C kernels take inputs of 8 bits where it is ``coarse`` (matmul_integer.h).
    """

    positions: Sequence[int]
    table: Sequence[int]
    coarse: bool = False


@dataclass(slots=True, eq=False)
class RowTable:
    """Where T rows stand: int64 ``places`` [T] in the pages, ``positions`` [T] in their text.

    A place is ``block * block_size + offset``. Row i reads the block table that begins at
    ``blocks[first_blocks[i]]``; ``longest`` is the longest context in tokens. ``cos`` and ``sin``
    [T, 1, head_dim] as RotaryTable gives them. ``count`` int32 [1] is the number of rows where only
    the device knows it (None: all T). ``spans`` are the same rows on the host, one sequence after
    another, where the host knows them.
    ``memo`` holds what attention kernels derive from the spans, the same for all layers.
    """

    places: Tensor
    positions: Tensor
    first_blocks: Tensor
    blocks: Tensor
    block_size: int
    longest: int
    cos: Tensor
    sin: Tensor
    count: Tensor | None = None
    spans: Sequence[Span] = ()
    memo: dict[str, Any] = field(default_factory=dict)


class HostRows:
    """The rows of ``spans``, one after another: as numbers on the host, and as tensors.

    ``angles`` are the rows' positions for the rotary embedding where these are not those of the
    spans; ``coarse`` says of each row whether its span is (None: none is). Raises IndexError for
    negative blocks, and for positions that a table or ``rotary`` lacks.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        block_size: int,
        rotary: RotaryTable,
        device: torch.device,
        angles: Sequence[int] | None = None,
    ) -> None:
        # As the C kernels read them.
        self.places, self.positions, self.first_blocks = array("q"), array("q"), array("q")
        self.blocks = array("q")
        self.coarse: array[int] | None = None
        for span in spans:
            self.places.extend(flat_places(span.table, span.positions, block_size))
            self.positions.extend(span.positions)
            self.first_blocks.extend([len(self.blocks)] * len(span.positions))
            self.blocks.extend(span.table)
        if any(span.coarse for span in spans):
            self.coarse = array("B")
            for span in spans:
                self.coarse.extend([span.coarse] * len(span.positions))
        self.angles = self.positions if angles is None else array("q", angles)
        self.spans = spans
        self.block_size = block_size
        self.longest = 1 + max(self.positions)
        self.last_block = max(self.blocks)
        self.rotary = rotary
        self._device = device
        if min(self.blocks) < 0 or min(self.positions) < 0:
            raise IndexError("negative blocks or positions")
        if max(self.angles) >= rotary.length:
            raise IndexError(f"position {max(self.angles)}, angles for {rotary.length}")

    def __len__(self) -> int:
        return len(self.places)

    @functools.cached_property
    def table(self) -> RowTable:
        """The rows as tensors, made when they are first asked for."""
        places, positions, first_blocks, blocks, angles = (
            torch.tensor(numbers, device=self._device)
            for numbers in (
                self.places,
                self.positions,
                self.first_blocks,
                self.blocks,
                self.angles,
            )
        )
        cos, sin = self.rotary.at(angles)
        return RowTable(
            places,
            positions,
            first_blocks,
            blocks,
            self.block_size,
            self.longest,
            cos,
            sin,
            spans=self.spans,
        )


def flat_places(table: Sequence[int], positions: Sequence[int], block_size: int) -> list[int]:
    """Places in the pages of ``positions`` under a block table."""
    return [table[p // block_size] * block_size + p % block_size for p in positions]
