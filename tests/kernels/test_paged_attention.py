"""paged_attention against naive attention in float64, one query at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from offramp.kernels.paged_attention import contiguous_ranges, paged_attention
from offramp.kernels.rotary import RotaryTable
from offramp.kernels.rows import HostRows, Span

Work = tuple[int, int, list[int]]
"""First position, number of queries and block table of one sequence."""


def pages(blocks: int, size: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = torch.randn(2, blocks, size, kv_heads, dim)
    return k_cache, v_cache


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, work: Sequence[Work], window: int | None = None
) -> Tensor:
    size, dim = k_cache.shape[1], q.shape[2]
    spans = [Span(range(start, start + count), table) for start, count, table in work]
    device = torch.device("cpu")
    rotary = RotaryTable(torch.ones(dim // 2), 1024, 1.0, torch.float32, device)
    rows = HostRows(spans, size, rotary, device).table
    return paged_attention(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), rows, window)


def naive(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, work: Sequence[Work], window: int | None = None
) -> Tensor:
    """Softmax over each query's own past, head by head."""
    heads, dim = q.shape[1:]
    size, kv_heads = k_cache.shape[1:3]
    out = torch.zeros(q.shape, dtype=torch.float64)
    row = 0
    for start, count, table in work:
        for position in range(start, start + count):
            first = 0 if window is None else max(0, position - window + 1)
            past = [(table[p // size], p % size) for p in range(first, position + 1)]
            for head in range(heads):
                shared = head * kv_heads // heads
                keys = torch.stack([k_cache[b, o, shared] for b, o in past]).double()
                values = torch.stack([v_cache[b, o, shared] for b, o in past]).double()
                weights = (keys @ q[row, head].double() / dim**0.5).softmax(dim=0)
                out[row, head] = weights @ values
            row += 1
    return out.view(len(q), heads * dim)


def check(q: Tensor, k: Tensor, v: Tensor, work: Sequence[Work], window: int | None = None) -> None:
    got = attend(q, k, v, work, window)
    expected = naive(q, k, v, work, window)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("dim", [16, 20, 64])
def test_chunks_and_decode_mixed(heads: int, kv_heads: int, dim: int) -> None:
    """A first chunk, a later chunk, and decode rows of several lengths, blocks out of order."""
    k, v = pages(16, 4, kv_heads, dim)
    work: list[Work] = [
        (0, 7, [5, 2]),
        (9, 1, [3, 4, 6]),
        (3, 6, [9, 8, 1]),
        (0, 1, [15]),
        (15, 1, [10, 11, 12, 13]),
        (7, 1, [14, 0]),
    ]
    check(torch.randn(17, heads, dim), k, v, work)


@pytest.mark.parametrize("size", [1, 3, 32])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 65])
def test_decode_at_block_borders(size: int, length: int) -> None:
    blocks = -(-length // size)
    k, v = pages(blocks + 3, size, 3, 16)
    table = torch.randperm(blocks + 3)[:blocks].tolist()
    check(torch.randn(1, 9, 16), k, v, [(length - 1, 1, table)])


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_sliding_window(window: int) -> None:
    k, v = pages(8, 4, 2, 16)
    work: list[Work] = [(0, 6, [1, 0]), (9, 1, [5, 3, 2]), (5, 3, [6, 7])]
    check(torch.randn(10, 4, 16), k, v, work, window)


def test_many_decode_rows_of_unequal_length() -> None:
    k, v = pages(40, 4, 3, 16)
    free = iter(torch.randperm(40).tolist())
    lengths = [1, 3, 4, 5, 8, 11, 16, 17, 2, 6]
    work: list[Work] = [(n - 1, 1, [next(free) for _ in range(-(-n // 4))]) for n in lengths]
    check(torch.randn(len(lengths), 9, 16), k, v, work)


def test_shared_blocks_are_read_by_all_who_hold_them() -> None:
    """Two slots with one cached beginning."""
    k, v = pages(6, 4, 2, 16)
    check(torch.randn(2, 4, 16), k, v, [(5, 1, [2, 0]), (6, 1, [2, 4])])


def test_what_lies_behind_the_context_does_not_matter() -> None:
    """Pages hold the rubbish of earlier owners past the newest position."""
    k, v = pages(3, 4, 2, 16)
    q = torch.randn(3, 4, 16)
    work: list[Work] = [(0, 2, [1]), (4, 1, [0, 2])]
    before = attend(q, k, v, work)
    for cache in (k, v):
        cache[1, 2:] = torch.inf
        cache[2, 1:] = torch.nan
    assert attend(q, k, v, work).equal(before)


def test_half_precision() -> None:
    k, v = (cache.bfloat16() for cache in pages(4, 4, 3, 16))
    q = torch.randn(4, 9, 16).bfloat16()
    work: list[Work] = [(0, 3, [2]), (9, 1, [3, 0, 1])]
    got = attend(q, k, v, work)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), naive(q, k, v, work), rtol=2e-2, atol=2e-2)


def test_adjacent_blocks_become_one_span() -> None:
    assert contiguous_ranges([4, 5, 6], 8, 20) == ((32, 52),)
    assert contiguous_ranges([4, 6, 7], 8, 20) == ((32, 40), (48, 60))
    assert contiguous_ranges([2], 8, 8) == ((16, 24),)
