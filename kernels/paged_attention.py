"""Causal attention of ragged query runs over paged K,V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class QueryRun:
    """Queries of one slot.

    They are rows ``first .. first + count`` of the batch, the last one at position ``context - 1``.
    ``spans`` are the half-open ranges of flat cache places (block * block_size +
    offset) that hold positions ``0 .. context``, adjacent blocks merged. ``mask`` [count * group,
    context] is True where a query may look, None for a single query.
    """

    first: int
    count: int
    context: int
    spans: tuple[tuple[int, int], ...]
    mask: Tensor | None


def spans_of(table: Sequence[int], block_size: int, context: int) -> tuple[tuple[int, int], ...]:
    """Flat ranges of the first ``context`` positions of a block table, adjacent blocks merged."""
    spans: list[tuple[int, int]] = []
    for index in range(-(-context // block_size)):
        begin = table[index] * block_size
        end = begin + min(block_size, context - index * block_size)
        if spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((begin, end))
    return tuple(spans)


def query_run(
    first: int,
    positions: Sequence[int],
    table: Sequence[int],
    *,
    block_size: int,
    group: int,
    window: int | None,
    device: torch.device | None = None,
) -> QueryRun:
    """Describe queries at ascending ``positions`` whose context lies in ``table``.

    ``group`` is query heads per K,V head; ``window`` the attention span in tokens (None: all);
    ``device`` is where the mask lies.
    """
    count, context = len(positions), positions[-1] + 1
    mask = None
    if count > 1 or (window is not None and context > window):
        keys = torch.arange(context, device=device)
        queries = torch.tensor(positions, device=device).unsqueeze(1)
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        mask = mask.repeat(group, 1)
    return QueryRun(first, count, context, spans_of(table, block_size, context), mask)


def _context(cache: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """K or V of one slot, [1, kv_heads, context, head_dim]; a view if its blocks are adjacent."""
    pieces = [cache[begin:end] for begin, end in spans]
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return rows.transpose(0, 1).unsqueeze(0)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, runs: Sequence[QueryRun]
) -> Tensor:
    """Attend ``q`` [T, heads, head_dim] over one layer's cache; returns [T, heads * head_dim].

    The caches are [blocks, block_size, kv_heads, head_dim] and already hold the queries' own K,V.
    Query heads that share a K,V head become rows of one product, so K,V are never repeated.
    """
    rows, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    flat_k, flat_v = k_cache.view(-1, kv_heads, dim), v_cache.view(-1, kv_heads, dim)
    answers = [_attend_run(q, flat_k, flat_v, run) for run in runs]
    return answers[0] if len(answers) == 1 else torch.cat(answers).view(rows, heads * dim)


def _attend_run(q: Tensor, flat_k: Tensor, flat_v: Tensor, run: QueryRun) -> Tensor:
    """Answers [count, heads * head_dim] of one run."""
    _, heads, dim = q.shape
    kv_heads = flat_k.shape[1]
    group = heads // kv_heads
    k, v = _context(flat_k, run.spans), _context(flat_v, run.spans)
    if run.count == 1:
        # A single query is laid out as its group already; regrouping would double the time.
        grouped = q[run.first].view(1, kv_heads, group, dim)
        answer = F.scaled_dot_product_attention(grouped, k, v, attn_mask=run.mask)
        return answer.reshape(1, heads * dim)
    queries = q[run.first : run.first + run.count].unflatten(1, (kv_heads, group))
    grouped = queries.permute(1, 2, 0, 3).reshape(1, kv_heads, group * run.count, dim)
    answer = F.scaled_dot_product_attention(grouped, k, v, attn_mask=run.mask)
    answer = answer.view(kv_heads, group, run.count, dim).permute(2, 0, 1, 3)
    return answer.reshape(run.count, heads * dim)
