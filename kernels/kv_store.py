"""Write keys and values of a batch into their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.kernels.active_rows import behind
from offramp.kernels.backend import jit, next_power_of_2, tl, uses_triton
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import rotate

_HEADS_AT_ONCE = 8


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, places: Tensor) -> None:
    """Scatter ``k`` and ``v`` [T, kv_heads, head_dim] into one layer's cache.

    The caches are [places, kv_heads, head_dim]; ``places`` [T] is ``block * block_size + offset``
    of each row, without duplicates.
    """
    k_cache.index_copy_(0, places, k)
    v_cache.index_copy_(0, places, v)


def rope_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    places: Tensor,
    eps: float,
    *,
    heads: int,
    count: Tensor | None = None,
) -> Tensor:
    """Split what the fused projection gives: K and V to their places, the queries returned.

    ``qkv`` is [T, (heads + 2 * kv_heads) * head_dim], the result [T, heads, head_dim]. Queries and
    keys are normalised head by head (Qwen3) with ``q_norm`` and ``k_norm`` [head_dim], unless both
    are None, then rotated by ``cos`` and ``sin`` [T, 1, head_dim] as in `rotate`. The caches, alike
    in strides, and ``places`` are as in `store_kv`. Rows behind ``count`` on the device (int32 [1],
    None: there are none) write nothing, and what is returned for them means nothing.
    """
    if not uses_triton(qkv.device):
        return rope_and_store_reference(
            qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, places, eps, heads=heads, count=count
        )
    kv_heads, dim = k_cache.shape[1:]
    rows = qkv.shape[0]
    q = torch.empty(rows, heads, dim, dtype=qkv.dtype, device=qkv.device)
    if not rows:
        return q
    assert k_cache.stride() == v_cache.stride()
    _rotate_and_store[(rows, -(-(heads + 2 * kv_heads) // _HEADS_AT_ONCE))](
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        k_cache,
        v_cache,
        places,
        count,
        q,
        eps,
        qkv.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        wide=next_power_of_2(dim),
        at_once=_HEADS_AT_ONCE,
    )
    return q


def rope_and_store_reference(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    places: Tensor,
    eps: float,
    *,
    heads: int,
    count: Tensor | None = None,
) -> Tensor:
    """See `rope_and_store`."""
    kv_heads, dim = k_cache.shape[1:]
    qkv = qkv.view(qkv.shape[0], heads + 2 * kv_heads, dim)
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if q_norm is not None and k_norm is not None:
        q = rms_norm(qk[:, :heads], q_norm, eps)
        k = rms_norm(qk[:, heads:], k_norm, eps)
        qk = torch.cat((q, k), dim=1)
    qk = rotate(qk, cos, sin)
    k = qk[:, heads:]
    if count is not None:
        kept = int(count)
        k, v, places = k[:kept], v[:kept], places[:kept]
    store_kv(k, v, k_cache, v_cache, places)
    return qk[:, :heads]


@jit
def _rotate_and_store(
    qkv: tl.tensor,
    q_norm: tl.tensor | None,
    k_norm: tl.tensor | None,
    cos: tl.tensor,
    sin: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    places: tl.tensor,
    count: tl.tensor | None,
    q: tl.tensor,
    eps: tl.tensor,
    qkv_row: tl.tensor,
    kv_place: tl.tensor,
    kv_head: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    wide: tl.constexpr,
    at_once: tl.constexpr,
) -> None:
    """Some heads of one row, whichever of queries, keys and values they are."""
    row = tl.program_id(0).to(tl.int64)
    if behind(row, count):
        return
    head = tl.program_id(1) * at_once + tl.arange(0, at_once)
    column = tl.arange(0, wide)
    inside = column < dim
    is_query = (head < heads)[:, None]
    is_key = ((head >= heads) & (head < heads + kv_heads))[:, None]
    is_value = ((head >= heads + kv_heads) & (head < heads + 2 * kv_heads))[:, None]
    # A column and the one it is rotated with, half a head away.
    partner = tl.where(column < dim // 2, column + dim // 2, column - dim // 2)
    here = (is_query | is_key | is_value) & inside[None, :]
    begin = qkv + row * qkv_row + head[:, None] * dim
    given = tl.load(begin + column[None, :], mask=here, other=0.0)
    own = given.to(tl.float32)
    other = tl.load(begin + partner[None, :], mask=here, other=0.0).to(tl.float32)
    if q_norm is not None and k_norm is not None:
        scale = tl.rsqrt(tl.sum(own * own, axis=1) / dim + eps)[:, None]
        own *= scale * _factor(q_norm, k_norm, is_query, column, inside)
        other *= scale * _factor(q_norm, k_norm, is_query, partner, inside)
    cosine = tl.load(cos + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    turned = (own * cosine[None, :] + other * sine[None, :]).to(q.dtype.element_ty)
    to_q = q + (row * heads + head[:, None]) * dim + column[None, :]
    tl.store(to_q, turned, mask=is_query & inside[None, :])
    place = tl.load(places + row) * kv_place + column[None, :]
    to_k = k_cache + place + (head - heads)[:, None] * kv_head
    tl.store(to_k, turned, mask=is_key & inside[None, :])
    to_v = v_cache + place + (head - heads - kv_heads)[:, None] * kv_head
    tl.store(to_v, given, mask=is_value & inside[None, :])


@jit
def _factor(
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    is_query: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """The norms' weights of columns, those of queries or of keys."""
    of_queries = tl.load(q_norm + column, mask=inside, other=0.0).to(tl.float32)
    of_keys = tl.load(k_norm + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_query, of_queries[None, :], of_keys[None, :])
