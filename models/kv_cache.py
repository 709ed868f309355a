"""The paged K,V tensors of all layers, and the buffers of hidden rows."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from offramp.kernels.kv_formats import row_size
from offramp.kernels.memory import large_pages
from offramp.models.config import ModelConfig


class KVCache:
    """K and V pages: one tensor [layers, 2, blocks, block_size, kv_heads, row size].

    A row has head_dim numbers of ``dtype``, and in int16 a scale (kernels/kv_formats.py).

    A block id names the same page in every layer. The engine decides which
    sequence owns which block; this class only holds memory. ``extra_layers`` lie above the stack's
    and are not in ``pages``.

    In memory layer follows layer, or, ``by_block``, block follows block, each with all layers: only
    the C kernels read such pages. What is in use then lies close together, in few large pages of
    the system.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        extra_layers: int = 0,
        *,
        by_block: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        layers = config.num_layers + extra_layers
        row = row_size(config.head_dim, dtype)
        block = (block_size, config.num_kv_heads, row)
        # Not cleared: a page is read only where it was written, and on a CPU one that was never
        # used then takes no memory.
        if by_block:
            memory = large_pages((num_blocks, layers, 2, *block), dtype).permute(1, 2, 0, 3, 4, 5)
        else:
            memory = torch.empty((layers, 2, num_blocks, *block), dtype=dtype, device=device)
        self.pages = memory[: config.num_layers]
        self.layers: list[tuple[Tensor, Tensor]] = []
        """K and V [places, kv_heads, row size] of each layer and extra layer, not ``by_block``."""
        if not by_block:
            parts = memory.flatten(2, 3).flatten(0, 1).unbind()
            self.layers = list(zip(parts[::2], parts[1::2], strict=True))


def row_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, rows that are never used take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Of the system itself, whose pages are zero: torch would write zeros, and so take them all.
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def bytes_per_block(
    config: ModelConfig, block_size: int, dtype: torch.dtype, extra_layers: int = 0
) -> int:
    """Bytes one block takes over all layers, K and V together."""
    row = row_size(config.head_dim, dtype) * dtype.itemsize
    return 2 * (config.num_layers + extra_layers) * block_size * config.num_kv_heads * row
