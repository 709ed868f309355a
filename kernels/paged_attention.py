"""Causal attention of the rows of several sequences over paged K,V, in torch's operators.

For CPUs where the C kernels do not serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.rows import RowTable

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of places."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows ``first .. first + count`` of the batch, all of one sequence.

    ``ranges`` of places hold its positions up to the last row's. ``mask`` [count * group, context]
    is True where a query may look, None for a single query that sees all.
    """

    first: int
    count: int
    ranges: Ranges
    mask: Tensor | None


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: RowTable, window: int | None
) -> Tensor:
    """Attend ``q`` [T, heads, head_dim] over one layer's cache; returns [T, heads * head_dim].

    The caches [places, kv_heads, head_dim] hold the queries' own K,V already. A row sees positions
    up to its own, the last ``window`` of them (None: all). Query heads that share a K,V head become
    rows of one product, so K,V are never repeated.
    """
    count, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    if "runs" not in rows.memo:
        rows.memo["runs"] = _runs(rows, group, window)
    # A single query is laid out as its group already; regrouping would double the time.
    singles = q.view(count, 1, kv_heads, group, dim).unbind()
    answers = []
    for run in rows.memo["runs"]:
        k, v = _context(k_cache, run.ranges), _context(v_cache, run.ranges)
        if run.count == 1:
            queries = singles[run.first]
            answers.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=run.mask))
            continue
        queries = q[run.first : run.first + run.count].unflatten(1, (kv_heads, group))
        grouped = queries.permute(1, 2, 0, 3).reshape(1, kv_heads, group * run.count, dim)
        answer = F.scaled_dot_product_attention(grouped, k, v, attn_mask=run.mask)
        answers.append(answer.view(kv_heads, group, run.count, dim).permute(2, 0, 1, 3))
    return torch.cat(answers).view(count, heads * dim)


def contiguous_ranges(table: Sequence[int], block_size: int, context: int) -> Ranges:
    """Half-open ranges of places that hold the first ``context`` positions of a block table."""
    ranges: list[tuple[int, int]] = []
    for index in range(-(-context // block_size)):
        begin = table[index] * block_size
        end = begin + min(block_size, context - index * block_size)
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((begin, end))
    return tuple(ranges)


def _runs(rows: RowTable, group: int, window: int | None) -> list[_Run]:
    """The sequences' rows; ``group`` is query heads per K,V head."""
    runs: list[_Run] = []
    first = 0
    for span in rows.spans:
        count, context = len(span.positions), span.positions[-1] + 1
        mask = None
        if count > 1 or (window is not None and context > window):
            keys = torch.arange(context, device=rows.positions.device)
            queries = rows.positions[first : first + count].unsqueeze(1)
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            mask = mask.repeat(group, 1)
        ranges = contiguous_ranges(span.table, rows.block_size, context)
        runs.append(_Run(first, count, ranges, mask))
        first += count
    return runs


def _context(cache: Tensor, ranges: Ranges) -> Tensor:
    """K or V of one sequence, [1, kv_heads, context, head_dim]; a view of adjacent blocks."""
    parts = [cache[begin:end] for begin, end in ranges]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1).unsqueeze(0)
