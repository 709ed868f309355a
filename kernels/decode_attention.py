"""Causal attention of rows over paged K,V, each row through its own block table.

One Triton program a row, K,V head and part of the context; query heads that share a K,V head are
the rows of one product. Long contexts are cut into parts whose results are put together in a second
kernel (flash decoding, Dao et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.kernels.active_rows import behind
from offramp.kernels.backend import compute_type, jit, next_power_of_2, tl, uses_triton
from offramp.kernels.rows import RowTable

_KEYS = 32
"""Keys a program looks at in one go; of fp32, which fills registers, half as many."""
_PART_KEYS = 64
"""Keys for which a part of its own pays."""
_ENOUGH_PROGRAMS = 512
"""Programs that fill a large GPU."""
_MOST_PARTS = 32
_LEAST_QUERIES = 16
"""Rows that a product on tensor cores has at least."""


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, rows: RowTable, window: int | None
) -> Tensor:
    """See `decode_attention`; one row after another, in plain operators."""
    heads, kv_heads = q.shape[1], k.shape[1]
    out = torch.empty_like(q)
    count = len(q) if rows.count is None else int(rows.count)
    for row, position in enumerate(rows.positions[:count].tolist()):
        first = max(0, position + 1 - window) if window else 0
        keys = torch.arange(first, position + 1, device=q.device)
        blocks = rows.blocks[rows.first_blocks[row] + keys // rows.block_size]
        places = blocks * rows.block_size + keys % rows.block_size
        grouped = q[row].view(kv_heads, heads // kv_heads, -1).float()
        scores = grouped @ k[places].float().permute(1, 2, 0) * q.shape[-1] ** -0.5
        answer = scores.softmax(dim=-1) @ v[places].float().transpose(0, 1)
        out[row] = answer.reshape(heads, -1).to(q.dtype)
    return out


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: RowTable,
    window: int | None,
    parts: int | None = None,
) -> Tensor:
    """Attend ``q`` [T, heads, head_dim] over one layer's ``k`` and ``v``; returns the same shape.

    The caches [places, kv_heads, head_dim] hold the rows' own K,V already. Row i sees positions up
    to its own, the last ``window`` of them (None: all). Rows behind a count on the device are not
    looked at. The context is cut into ``parts`` (None: as many as keep a GPU busy).
    """
    if not uses_triton(q.device):
        return decode_attention_reference(q, k, v, rows, window)
    count, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    parts = parts or _parts(count * kv_heads, rows.longest)
    out = torch.empty(count, heads, dim, dtype=q.dtype, device=q.device)
    sums, most, total = out, None, None
    if parts > 1:
        shape = (count, heads, parts)
        sums = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
        most = torch.empty(shape, dtype=torch.float32, device=q.device)
        total = torch.empty(shape, dtype=torch.float32, device=q.device)
    wide = next_power_of_2(dim)
    _attend[(count, kv_heads, parts)](
        q,
        k,
        v,
        rows.positions,
        rows.first_blocks,
        rows.blocks,
        rows.count,
        sums,
        most,
        total,
        dim**-0.5,
        window or 0,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        parts=parts,
        block_size=rows.block_size,
        group=group,
        rows_of_product=max(_LEAST_QUERIES, next_power_of_2(group)),
        dim=dim,
        wide=wide,
        tile=_KEYS // (2 if q.dtype is torch.float32 else 1),
        compute=compute_type(q.dtype),
    )
    if parts > 1:
        _join[(count, heads)](sums, most, total, rows.count, out, parts=parts, dim=dim, wide=wide)
    return out


def _parts(programs: int, longest: int) -> int:
    """Parts of a context, a power of two: few programs with much to read share it with others."""
    wanted = min(_ENOUGH_PROGRAMS // max(programs, 1), longest // _PART_KEYS, _MOST_PARTS)
    return 1 << max(0, wanted.bit_length() - 1)


@jit
def _attend(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    positions: tl.tensor,
    first_blocks: tl.tensor,
    blocks: tl.tensor,
    count: tl.tensor,
    sums: tl.tensor,
    most: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    kv_place: tl.tensor,
    kv_head: tl.tensor,
    parts: tl.constexpr,
    block_size: tl.constexpr,
    group: tl.constexpr,
    rows_of_product: tl.constexpr,
    dim: tl.constexpr,
    wide: tl.constexpr,
    tile: tl.constexpr,
    compute: tl.constexpr,
) -> None:
    """One row's queries of one K,V head against one part of its context.

    ``sums`` are the answers themselves where there is only one part.
    """
    row = tl.program_id(0).to(tl.int64)
    if behind(row, count):
        return
    head = tl.program_id(1)
    part = tl.program_id(2)
    queries = tl.arange(0, rows_of_product)
    columns = tl.arange(0, wide)
    here = (queries < group)[:, None] & (columns < dim)[None, :]
    heads = head * group + queries
    at = q + row * q_row + heads[:, None] * q_head + columns[None, :]
    query = tl.load(at, mask=here, other=0.0).to(compute)
    table = blocks + tl.load(first_blocks + row)
    first, last = _span(tl.load(positions + row) + 1, window, part, parts, tile)
    top = tl.full([rows_of_product], float("-inf"), tl.float32)
    weight = tl.zeros([rows_of_product], tl.float32)
    answer = tl.zeros([rows_of_product, wide], tl.float32)
    for start in range(first, last, tile):
        position = start + tl.arange(0, tile)
        seen = position < last
        place = _places(table, position, seen, block_size) * kv_place + head * kv_head
        loaded = seen[:, None] & (columns < dim)[None, :]
        offsets = place[:, None] + columns[None, :]
        key = tl.load(k + offsets, mask=loaded, other=0.0).to(compute)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        share = tl.exp(score - higher[:, None])
        fade = tl.exp(top - higher)
        value = tl.load(v + offsets, mask=loaded, other=0.0).to(compute)
        answer = tl.dot(share.to(compute), value, answer * fade[:, None], input_precision="ieee")
        weight = weight * fade + tl.sum(share, axis=1)
        top = higher
    out_at = (row * tl.num_programs(1) * group + heads) * parts + part
    if parts == 1:
        answer /= weight[:, None]
    else:
        tl.store(most + out_at, top, mask=queries < group)
        tl.store(total + out_at, weight, mask=queries < group)
    to = sums + out_at[:, None] * dim + columns[None, :]
    tl.store(to, answer.to(sums.dtype.element_ty), mask=here)


@jit
def _span(
    end: tl.tensor, window: tl.tensor, part: tl.tensor, parts: tl.constexpr, tile: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The keys of one part, in whole tiles but for the last: first and behind the last."""
    begin = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    size = tl.cdiv(tl.cdiv(end - begin, parts), tile) * tile
    first = begin + part * size
    return first, tl.minimum(first + size, end)


@jit
def _places(
    table: tl.tensor, position: tl.tensor, seen: tl.tensor, block_size: tl.constexpr
) -> tl.tensor:
    """Places of positions under a block table; of those not ``seen``, some place."""
    block = tl.load(table + position // block_size, mask=seen, other=0)
    return block * block_size + position % block_size


@jit
def _join(
    sums: tl.tensor,
    most: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    parts: tl.constexpr,
    dim: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """Put the parts of one row and head together."""
    if behind(tl.program_id(0), count):
        return
    out_at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    columns = tl.arange(0, wide)
    inside = columns < dim
    top = tl.load(most + out_at * parts)
    for part in tl.static_range(1, parts):
        top = tl.maximum(top, tl.load(most + out_at * parts + part))
    weight = 0.0
    answer = tl.zeros([wide], tl.float32)
    for part in tl.static_range(parts):
        at = out_at * parts + part
        fade = tl.exp(tl.load(most + at) - top)
        weight += tl.load(total + at) * fade
        answer += tl.load(sums + at * dim + columns, mask=inside, other=0.0) * fade
    tl.store(out + out_at * dim + columns, (answer / weight).to(out.dtype.element_ty), mask=inside)
