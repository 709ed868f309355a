"""What the C kernels trust, checked in Python before they are called.

They take sizes as int32 and addresses as they are: a wrong one reads or writes memory of others.
Sizes are checked once, where weights are put together; a call checks shapes, which its tensors
know, and the largest index of what comes from outside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offramp.kernels.kv_formats import FORMATS, row_size

LARGEST = 2**31 - 1


def check_size(name: str, value: int) -> None:
    """Raise ValueError for no positive int32."""
    if not 0 < value <= LARGEST:
        raise ValueError(f"{name} is {value}; kernels take 1 to {LARGEST}")


def check_eps(eps: float) -> None:
    """Raise ValueError for no positive number of fp32."""
    if not 0 < eps < math.inf or not float(torch.tensor(eps, dtype=torch.float32)):
        raise ValueError(f"eps is {eps}; kernels take positive numbers")


def check_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Raise ValueError for a tensor that is not contiguous, ``shape`` and ``dtype``, on a CPU."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} is {found}; kernels take {shape} {dtype}, contiguous")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}; kernels take memory of the CPU")


def check_indices(name: str, lowest: int, highest: int, count: int, least: int = 0) -> None:
    """Raise IndexError unless indices from ``lowest`` to ``highest`` are among ``count``."""
    if lowest < least or highest >= count:
        raise IndexError(f"{name} {lowest} to {highest} are not all inside {least} to {count - 1}")


def check_pages(pages: Tensor, last_layer: int, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless ``pages`` hold K,V of layers up to ``last_layer``.

    Layers and blocks may follow one another in any order (models/kv_cache.py), what a block has of
    a layer's keys or values is contiguous. A draft head's layer lies behind the view of the
    stack's, in the same memory.
    """
    whole = pages.dim() == 6 and pages.shape[1] == 2 and pages[0, 0, 0].is_contiguous()
    if not whole or pages.shape[4:] != (kv_heads, row_size(head_dim, pages.dtype)):
        raise ValueError(f"pages of the shape {tuple(pages.shape)} do not fit the layers")
    if pages.dtype not in FORMATS or pages.device.type != "cpu":
        raise ValueError(f"pages are {pages.dtype} on {pages.device}")
    layer, kind, block = pages.stride()[:3]
    last = pages.storage_offset() + last_layer * layer + kind + (pages.shape[2] - 1) * block
    if (last + pages[0, 0, 0].numel()) * pages.itemsize > pages.untyped_storage().nbytes():
        raise ValueError(f"pages have no layer {last_layer}")
