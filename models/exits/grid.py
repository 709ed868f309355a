"""Changed weights on the 4-bit grid of the published ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.weight_formats import PackError, int4_grid

_HIGHEST = 15


@dataclass(frozen=True, slots=True)
class Grid:
    """Groups of 32 columns of a weight [out, in] whose values are lowest + level * scale.

    ``lowest`` and ``highest`` [out, groups, 32] are how many levels each value may be moved,
    ``scale`` [out, groups, 1] is the size of a level. The ends of a group stay where they are, so
    that scale and lowest value can be read off it as before.
    """

    lowest: Tensor
    highest: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Grid | None:
        """The grid that ``weight`` in fp32 lies on; None if it lies on none."""
        try:
            levels, scale, _ = int4_grid(weight)
        except PackError:
            return None
        ends = (levels == 0) | (levels == _HIGHEST)
        lowest = (-levels).masked_fill_(ends, 0.0)
        highest = (_HIGHEST - levels).masked_fill_(ends, 0.0)
        return cls(lowest, highest, scale.float().clamp_min(torch.finfo(torch.float16).tiny))

    def nearest(self, weight: Tensor, change: Tensor) -> Tensor:
        """The point of the grid nearest to ``weight`` + ``change`` [out, in], within the group.

        ``weight`` is the one of `of`; ``change`` is overwritten.
        """
        groups = change.view(self.lowest.shape)
        groups.div_(self.scale).round_()
        torch.clamp(groups, self.lowest, self.highest, out=groups)
        return groups.mul_(self.scale).view(weight.shape).add_(weight)
