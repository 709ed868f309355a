"""Causal attention of ragged query runs over paged K,V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class QueryRun:
    """Queries of one sequence.

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


Window = tuple[Tensor, Tensor]
"""K and V of one sequence in one layer, each [1, kv_heads, context, head_dim], without a copy."""


def windows_of(pages: Tensor, run: QueryRun) -> tuple[Window, ...] | None:
    """Every layer's window of a run in ``pages`` [layers, 2, places, kv_heads, head_dim].

    Made for all layers at once: taking slices layer by layer costs more than attending at one row.
    None if the run's blocks are not adjacent.
    """
    if len(run.spans) > 1:
        return None
    begin, end = run.spans[0]
    parts = pages.flatten(0, 1)[:, begin:end].transpose(1, 2).unsqueeze(1).unbind()
    return tuple(zip(parts[::2], parts[1::2], strict=True))


def _gathered(cache: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """K or V of one sequence, [1, kv_heads, context, head_dim]."""
    rows = torch.cat([cache[begin:end] for begin, end in spans])
    return rows.transpose(0, 1).unsqueeze(0)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    runs: Sequence[QueryRun],
    windows: Sequence[Window | None],
) -> Tensor:
    """Attend ``q`` [T, heads, head_dim] over one layer's cache; returns [T, heads * head_dim].

    The caches [places, kv_heads, head_dim] already hold the queries' own K,V; ``windows`` are those
    of the runs in them. Query heads that share a K,V head become rows of one product, so K,V are
    never repeated.
    """
    rows, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    # A single query is laid out as its group already; regrouping would double the time.
    singles = q.view(rows, 1, kv_heads, group, dim).unbind()
    answers = []
    for run, window in zip(runs, windows, strict=True):
        k, v = window or (_gathered(k_cache, run.spans), _gathered(v_cache, run.spans))
        if run.count == 1:
            queries = singles[run.first]
            answers.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=run.mask))
            continue
        queries = q[run.first : run.first + run.count].unflatten(1, (kv_heads, group))
        grouped = queries.permute(1, 2, 0, 3).reshape(1, kv_heads, group * run.count, dim)
        answer = F.scaled_dot_product_attention(grouped, k, v, attn_mask=run.mask)
        answers.append(answer.view(kv_heads, group, run.count, dim).permute(2, 0, 1, 3))
    return torch.cat(answers).view(rows, heads * dim)
