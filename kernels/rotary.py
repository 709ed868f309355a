"""Rotary position embedding, half-split form (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [T, heads, head_dim] by the angles of its rows' positions.

    ``cos`` and ``sin`` are [T, 1, head_dim // 2].
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RotaryTable:
    """cos and sin of every position up to ``length``, each [length, 1, head_dim // 2]."""

    def __init__(
        self, inv_freq: Tensor, length: int, scale: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq.float())
        self._cos = (angles.cos() * scale).to(device, dtype).unsqueeze(1)
        self._sin = (angles.sin() * scale).to(device, dtype).unsqueeze(1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of ``positions`` [T] as cos and sin, each [T, 1, head_dim // 2]."""
        return self._cos[positions], self._sin[positions]
