"""Write keys and values of a batch into their pages."""

from __future__ import annotations

from torch import Tensor


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, places: Tensor) -> None:
    """Scatter ``k`` and ``v`` [T, kv_heads, head_dim] into one layer's cache.

    The caches are [places, kv_heads, head_dim]; ``places`` [T] is ``block * block_size + offset``
    of each row, without duplicates.
    """
    k_cache.index_copy_(0, places, k)
    v_cache.index_copy_(0, places, v)
