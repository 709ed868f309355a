"""Number formats of the keys and values in the pages: floats, or integers of 16 bits on a CPU.

Integers have a scale, a float for each head of each key and value. Rounding leaves an error of
1.5e-5 of a head's largest number, where float16 rounds each number by 4.9e-4 of itself at most. A
block's scales [kv_heads, block_size] lie behind its integers [block_size, kv_heads, head_dim], so
that the C kernels read either in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = {torch.float32: "KV_FP32", torch.float16: "KV_FP16", torch.int16: "KV_INT16"}
"""What the C kernels read, and their names for it."""

_SCALE_SIZE = 2
_LARGEST = 32767
# Of a smaller number the reciprocal overflows.
_SMALLEST = 1e-30


def row_size(head_dim: int, dtype: torch.dtype) -> int:
    """Numbers of ``dtype`` whose room a key or value of one head takes, its scale included."""
    return head_dim + _SCALE_SIZE if dtype is torch.int16 else head_dim


def page_parts(pages: Tensor) -> tuple[Tensor, ...]:
    """Views of ``pages`` [.., blocks, block_size, kv_heads, row size], by block and position.

    The numbers [.., blocks, block_size, kv_heads, head_dim]; of integers also the fp32 scales
    [.., blocks, block_size, kv_heads, 1].
    """
    if pages.dtype is not torch.int16:
        return (pages,)
    size, kv_heads, row = pages.shape[-3:]
    dim = row - _SCALE_SIZE
    blocks = pages.flatten(-3)
    numbers, scales = blocks.split((size * kv_heads * dim, size * kv_heads * _SCALE_SIZE), dim=-1)
    return (
        numbers.unflatten(-1, (size, kv_heads, dim)),
        scales.view(torch.float32).unflatten(-1, (kv_heads, size)).mT.unsqueeze(-1),
    )


def page_steps(pages: Tensor) -> tuple[int, int, int]:
    """Bytes from one layer of ``pages`` to the next, from keys to values, between blocks."""
    layer, kind, block = (step * pages.itemsize for step in pages.stride()[:3])
    return layer, kind, block


def write_kv(kv: Tensor, pages: Tensor, places: Tensor) -> None:
    """Write keys and values ``kv`` [n, layers, 2, kv_heads, head_dim] at ``places`` of all layers.

    ``pages`` [layers, 2, blocks, block_size, kv_heads, row size]; a place is block * block_size +
    offset.
    """
    blocks, offsets = places // pages.shape[3], places % pages.shape[3]
    kv = kv.permute(1, 2, 0, 3, 4)
    numbers, *scales = page_parts(pages)
    if scales:
        largest = kv.abs().amax(dim=-1, keepdim=True)
        tiny = largest < _SMALLEST
        scales[0][:, :, blocks, offsets] = torch.where(tiny, 0.0, largest / _LARGEST)
        kv = (kv * torch.where(tiny, 0.0, _LARGEST / largest)).round()
    numbers[:, :, blocks, offsets] = kv.to(pages.dtype)
