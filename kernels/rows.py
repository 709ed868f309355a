"""Where the rows of a forward pass stand in their texts and in the pages of K,V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.kernels.rotary import RotaryTable


@dataclass(frozen=True, slots=True)
class Span:
    """Ascending positions of one sequence under its block table, on the host."""

    positions: Sequence[int]
    table: Sequence[int]


@dataclass(slots=True, eq=False)
class RowTable:
    """Where T rows stand: int64 ``places`` [T] in the pages, ``positions`` [T] in their text.

    A place is ``block * block_size + offset``. Row i reads the block table that begins at
    ``blocks[first_blocks[i]]``; ``longest`` is the longest context in tokens. ``cos`` and ``sin``
    [T, 1, head_dim] as RotaryTable gives them. ``count`` int32 [1] is the number of rows where only
    the device knows it (None: all T). ``spans`` are the same rows on the host, one sequence after
    another, where the host knows them, and ``last_block`` is the largest block of their tables.
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
    last_block: int = -1
    memo: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, spans: Sequence[Span], block_size: int, rotary: RotaryTable, device: torch.device
    ) -> RowTable:
        """The rows of ``spans``, one after another, as tensors on ``device``.

        Raises IndexError for negative blocks, and for positions that a table or ``rotary`` lacks.
        """
        places: list[int] = []
        starts: list[int] = []
        blocks: list[int] = []
        for span in spans:
            places += flat_places(span.table, span.positions, block_size)
            starts += [len(blocks)] * len(span.positions)
            blocks += span.table
        positions = [position for span in spans for position in span.positions]
        every = torch.tensor(blocks)
        first, last = every.aminmax()
        if int(first) < 0 or any(span.positions[0] < 0 for span in spans):
            raise IndexError("negative blocks or positions")
        at = torch.tensor(positions, device=device)
        cos, sin = rotary.at(at)
        return cls(
            places=torch.tensor(places, device=device),
            positions=at,
            first_blocks=torch.tensor(starts, device=device),
            blocks=every.to(device),
            block_size=block_size,
            longest=1 + max(span.positions[-1] for span in spans),
            cos=cos,
            sin=sin,
            spans=spans,
            last_block=int(last),
        )


def flat_places(table: Sequence[int], positions: Sequence[int], block_size: int) -> list[int]:
    """Places in the pages of ``positions`` under a block table."""
    return [table[p // block_size] * block_size + p % block_size for p in positions]
