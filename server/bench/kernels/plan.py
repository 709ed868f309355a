"""What is measured, on what."""

from __future__ import annotations

from dataclasses import dataclass

from offramp.kernels.backend import INTERPRETED, uses_triton
from offramp.server.bench.kernels.setup import Copies, Setup, Shape

# Five times the L2 cache of an H100 or H200; on a CPU enough to rehearse that there are several.
_COPIES = {"cuda": Copies(256 << 20, 512), "cpu": Copies(1 << 20, 2)}


@dataclass(frozen=True, slots=True)
class Plan:
    """A model's ``shape`` by its ``name``; ``ops`` with each number of ``rows``.

    Each timing takes ``seconds``; with ``tiles`` products are also timed in other cuts.
    """

    name: str
    shape: Shape
    ops: tuple[str, ...]
    rows: tuple[int, ...]
    seconds: float
    tiles: bool

    def setup(self) -> Setup:
        """Inputs for timing."""
        return Setup(self.shape, _COPIES[self.shape.device.type])

    @property
    def runs(self) -> str:
        """What an op's call runs on the device."""
        if not uses_triton(self.shape.device):
            return "references"
        return "interpreted kernels" if INTERPRETED else "kernels"
