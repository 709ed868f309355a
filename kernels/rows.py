"""Where the rows of a forward pass stand in their texts and in the pages of K,V."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowTable:
    """Where T rows stand: int64 ``places`` [T] in the pages, ``positions`` [T] in their text.

    Row i reads the block table that begins at ``blocks[first_blocks[i]]``; ``longest`` is the
    longest context. ``cos`` and ``sin`` [T, 1, head_dim] as RotaryTable gives them. ``count`` int32
    [1] is the number of rows where only the device knows it (None: all T).
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
