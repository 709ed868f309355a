"""What the device can do at best, measured before anything is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offramp.server.bench.bandwidth import bandwidth
from offramp.server.bench.kernels.case import Work
from offramp.server.bench.kernels.clock import Clock

# On a CPU, where it is a rehearsal, what does not take long.
_EDGE = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second that a copy moves (read and written) and a sum reads; products' flops."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The better of the two ways to use the memory."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def bound(self, work: Work) -> tuple[float, str]:
        """Seconds that ``work`` takes at least, and which ceiling says so: memory or compute."""
        memory, compute = work.bytes / self.bytes_per_s, work.flops / self.flops_per_s
        return (memory, "memory") if memory >= compute else (compute, "compute")


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Best of a copy and a sum of fp32 numbers, and of a square product of ``dtype``."""
    edge, memory = _EDGE[device.type], bandwidth(device, seconds)
    left, right = (torch.randn(edge, edge, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    multiplied = Clock([lambda: torch.mm(left, right, out=product)], device).time(seconds)
    return Ceilings(
        copy_bytes_per_s=memory.copy,
        read_bytes_per_s=memory.read,
        flops_per_s=2 * edge**3 / multiplied.least,
    )
