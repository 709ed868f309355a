"""Causal attention of runs of rows over paged K,V: many queries of one text at once.

One Triton program a tile of a run's rows and K,V head. The rows by the query heads that share the
K,V head are the rows of its products; keys come tile by tile through the block table, and the
softmax is kept up to date on the way (FlashAttention-2, Dao, arXiv 2307.08691).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from offramp.kernels.backend import compute_type, jit, next_power_of_2, tl, uses_triton
from offramp.kernels.decode_attention import _places, decode_attention_reference
from offramp.kernels.rows import RowTable

_PRODUCT_ROWS = 64
"""Rows of a product where runs are long."""
_LEAST_PRODUCT_ROWS = 16
"""Rows that a product on tensor cores has at least."""
_KEYS = 64
"""Keys a program looks at in one go."""


def tiles_of(
    runs: Sequence[Sequence[int]], group: int, window: int | None, device: torch.device
) -> tuple[Tensor, int]:
    """Tiles int32 [n, 2] of the batch's rows, and the most rows of any.

    A tile is its first row and its number of rows; those with the longest contexts come first.

    ``runs`` are the ascending positions of each sequence's rows, one sequence after another in the
    batch; a tile has rows of one run. ``group`` is query heads per K,V head; ``window`` the
    attention span in tokens (None: all).
    """
    limit = max(1, _PRODUCT_ROWS // group)
    tiles: list[tuple[int, int, int]] = []
    first = 0
    for positions in runs:
        for begin, end in pairwise((0, *_holes(positions, window), len(positions))):
            for at in range(begin, end, limit):
                count = min(limit, end - at)
                tiles.append((positions[at + count - 1], first + at, count))
        first += len(positions)
    # A GPU begins with what comes first, and what takes longest must not begin last.
    tiles.sort(reverse=True)
    found = torch.tensor([tile[1:] for tile in tiles], dtype=torch.int32, device=device)
    return found.view(-1, 2), max((count for _, _, count in tiles), default=0)


def _holes(positions: Sequence[int], window: int | None) -> list[int]:
    """Indices of rows that do not see all positions behind the row before.

    No row looks into such a hole, so it may hold undefined K,V; no tile spans one.
    """
    if window is None:
        return []
    steps = enumerate(pairwise(positions), 1)
    return [index for index, (before, after) in steps if after - before > window]


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: RowTable, window: int | None
) -> Tensor:
    """Attend ``q`` [T, heads, head_dim] over one layer's ``k`` and ``v``; returns the same shape.

    The caches [places, kv_heads, head_dim], alike in strides, hold the rows' own K,V already. A
    row sees positions up to its own, the last ``window`` of them (None: all).
    """
    if not uses_triton(q.device):
        return decode_attention_reference(q, k, v, rows, window)
    count, heads, dim = q.shape
    out = torch.empty(count, heads, dim, dtype=q.dtype, device=q.device)
    if not count:
        return out
    kv_heads = k.shape[1]
    group = heads // kv_heads
    assert k.stride() == v.stride()
    if "tiles" not in rows.memo:
        runs = [span.positions for span in rows.spans]
        rows.memo["tiles"] = tiles_of(runs, group, window, q.device)
    tiles, widest = rows.memo["tiles"]
    _attend_run[(kv_heads, len(tiles))](
        q,
        k,
        v,
        rows.positions,
        rows.first_blocks,
        rows.blocks,
        tiles,
        out,
        # Powers of two are what a GPU computes.
        dim**-0.5 * math.log2(math.e),
        window or 0,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        block_size=rows.block_size,
        group=group,
        dim=dim,
        wide=next_power_of_2(dim),
        compute=compute_type(q.dtype),
        **_sizes(widest * group, q.dtype),
    )
    return out


def _sizes(queries: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a program whose tile has up to ``queries`` rows times heads.

    Two are enough: each is a compilation of its own.
    """
    few, exact = queries <= _LEAST_PRODUCT_ROWS, dtype is torch.float32
    many = max(_PRODUCT_ROWS, next_power_of_2(queries))
    return {
        "product_rows": _LEAST_PRODUCT_ROWS if few else many,
        # Products in fp32 have no tensor cores and keep all they read in registers.
        "keys": _KEYS // 2 if exact else _KEYS,
        # A warp multiplies at least 16 rows; where there are no more, warps share out the columns.
        "num_warps": 8 if few or exact else 4,
        "num_stages": 3,
    }


@jit
def _attend_run(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    positions: tl.tensor,
    first_blocks: tl.tensor,
    blocks: tl.tensor,
    tiles: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    kv_place: tl.tensor,
    kv_head: tl.tensor,
    block_size: tl.constexpr,
    group: tl.constexpr,
    product_rows: tl.constexpr,
    dim: tl.constexpr,
    wide: tl.constexpr,
    keys: tl.constexpr,
    compute: tl.constexpr,
) -> None:
    """One tile's queries of one K,V head against all that they see."""
    kv = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 2
    first, count = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    index = tl.arange(0, product_rows)
    # Rows that fill the product up are the last one again: they see something, so none is NaN.
    row = first + tl.minimum(index // group, count - 1)
    head = kv * group + index % group
    columns = tl.arange(0, wide)
    inside = (columns < dim)[None, :]
    query_at = q + (row * q_row + head * q_head)[:, None] + columns[None, :]
    query = tl.load(query_at, mask=inside, other=0.0).to(compute)
    own = tl.load(positions + row).to(tl.int32)
    earliest = tl.where(window > 0, tl.maximum(own - window + 1, 0), 0)
    table = blocks + tl.load(first_blocks + first)
    # Finite, so that a row that sees nothing of a tile of keys stays a number.
    top = tl.full([product_rows], -1e30, tl.float32)
    weight = tl.zeros([product_rows], tl.float32)
    answer = tl.zeros([product_rows, wide], tl.float32)
    end = tl.max(own, axis=0) + 1
    for begin in range(tl.min(earliest, axis=0), end, keys):
        position = begin + tl.arange(0, keys)
        exists = position < end
        place = _places(table, position, exists, block_size) * kv_place + kv * kv_head
        offsets = place[:, None] + columns[None, :]
        loaded = exists[:, None] & inside
        key = tl.load(k + offsets, mask=loaded, other=0.0).to(compute)
        value = tl.load(v + offsets, mask=loaded, other=0.0).to(compute)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (position[None, :] <= own[:, None]) & (position[None, :] >= earliest[:, None])
        share, fade, top = _shares(tl.where(seen, score, float("-inf")), top)
        answer = tl.dot(share.to(compute), value, answer * fade[:, None], input_precision="ieee")
        weight = weight * fade + tl.sum(share, axis=1)
    answer = (answer / weight[:, None]).to(out.dtype.element_ty)
    out_at = (row * tl.num_programs(0) * group + head)[:, None] * dim + columns[None, :]
    tl.store(out + out_at, answer, mask=(index < count * group)[:, None] & inside)


@jit
def _shares(score: tl.tensor, top: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weights of a tile of keys, the factor on what was summed before, and the new ``top``."""
    higher = tl.maximum(top, tl.max(score, axis=1))
    return tl.exp2(score - higher[:, None]), tl.exp2(top - higher), higher
