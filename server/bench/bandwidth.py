"""What memory gives at best, for figures to be put beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offramp.server.bench.kernels.clock import Clock

# Beyond any cache.
_BYTES = {"cuda": 1 << 30, "cpu": 512 << 20}
_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second that a copy moves (read and written) and a sum reads."""

    copy: float
    read: float

    @property
    def best(self) -> float:
        """The better of the two ways to use the memory."""
        return max(self.copy, self.read)


def bandwidth(device: torch.device, seconds: float = _SECONDS) -> Bandwidth:
    """Least times of copying and of summing a large tensor of fp32, each tried for ``seconds``."""
    size = _BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = Clock([lambda: target.copy_(source)], device).time(seconds)
    summed = Clock([source.sum], device).time(seconds)
    return Bandwidth(2 * size / copied.least, size / summed.least)
