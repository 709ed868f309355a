"""Memory for what a CPU reads all the time, in large pages where the system has them.

Processors remember the places of a thousand pages or two. In pages of 4 KiB that is less than the
weights of a small model, and each new page costs a fault on first use: a decode step of 16
sequences, which writes a key and a value to each layer, spent a sixth of its time there. So Linux
is asked for transparent huge pages (2 MiB). Where there are none, nothing changes.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_CHUNK = 16 << 20
# Of a cache line, and of the widest vector.
_ALIGNMENT = 64


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are written to; then whole pages at a time."""
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    # Private, because shared memory is not in large pages by default.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _ask_for_large_pages(memory)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _ask_for_large_pages(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return


class Arena:
    """Tensors one behind the other in large pages; a page is given back when all in it are gone."""

    def __init__(self) -> None:
        self._chunk = torch.zeros(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, on the CPU, that is never written to."""
        size = tensor.nbytes
        if self._used + size > len(self._chunk):
            self._chunk, self._used = untouched((max(size, _CHUNK),), torch.uint8), 0
        place = self._chunk[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return place.copy_(tensor.flatten().view(torch.uint8)).view(tensor.dtype).view_as(tensor)
