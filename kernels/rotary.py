"""Rotary position embedding, half-split form (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [T, heads, head_dim] by the angles of its rows' positions.

    ``cos`` and ``sin`` are [T, 1, head_dim] as `RotaryTable.at` gives them: three operations
    instead of the eight that halves of a vector take.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RotaryTable:
    """Angles of every position up to ``length``.

    Each half of a head has the same angles; the sine is negative for the first half, which takes
    its partner's value away.
    """

    def __init__(
        self, inv_freq: Tensor, length: int, scale: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq.float())
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype).unsqueeze(1)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype).unsqueeze(1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of ``positions`` [T] as cos and signed sin, each [T, 1, head_dim]."""
        return self._cos[positions], self._sin[positions]

    @property
    def length(self) -> int:
        """Positions that it has angles for."""
        return len(self._cos)

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Angles of all positions, [length, 1, head_dim] each."""
        return self._cos, self._sin
