"""Memory for what a CPU reads all the time, in large pages where the system has them.

Processors remember the places of a thousand pages or two; in pages of 4 KiB that is less than the
weights of a small model. So Linux is asked for transparent huge pages of 2 MiB (docs/kernels.md).
Where there are none, nothing changes.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_CHUNK = 16 << 20
# Of a cache line, and of the widest vector.
_ALIGNMENT = 64


class Arena:
    """Tensors one behind the other in large pages; memory is given back when all in it are gone."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, on the CPU, that is never written to."""
        if not tensor.nbytes:
            return tensor.clone()
        size = tensor.nbytes
        if self._chunk is None or self._used + size > len(self._chunk):
            self._chunk, self._used = _large_pages(max(size, _CHUNK)), 0
        # Tensors made of a part each: one of the whole could be written to only in the mode of
        # inference that it was made in.
        place = torch.frombuffer(
            self._chunk, dtype=tensor.dtype, count=tensor.numel(), offset=self._used
        )
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return place.view(tensor.shape).copy_(tensor)


def large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take memory as they are written to. Raises MemoryError."""
    memory = _large_pages(math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _large_pages(size: int) -> mmap.mmap:
    """Zeros; private, because shared memory is not in large pages by default."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system gives no {size} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            return memory
    return memory
