"""Write the embeddings of active sequences' tokens into their hidden states."""

from __future__ import annotations

from torch import Tensor

from offramp.kernels.active_rows import ActiveRows
from offramp.kernels.backend import jit, tl, triton, uses_triton

_TILE = 1024


def embed_rows(table: Tensor, tokens: Tensor, seqs: ActiveRows, hidden: Tensor) -> None:
    """Write ``table`` [vocab, d] at ``tokens`` [sequences] int64 into ``hidden`` [sequences, d]."""
    if not uses_triton(table.device):
        chosen = seqs.chosen
        hidden[chosen] = table[tokens[chosen]]
        return
    width = table.shape[1]
    _embed[(len(seqs.rows), triton.cdiv(width, _TILE))](
        table,
        tokens,
        seqs.rows,
        seqs.count,
        hidden,
        width,
        table.stride(0),
        hidden.stride(0),
        tile=_TILE,
    )


@jit
def _embed(
    table: tl.tensor,
    tokens: tl.tensor,
    seqs: tl.tensor,
    count: tl.tensor,
    hidden: tl.tensor,
    width: tl.tensor,
    table_row: tl.tensor,
    hidden_row: tl.tensor,
    tile: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    seq = tl.load(seqs + row).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    values = tl.load(table + tl.load(tokens + seq) * table_row + column, mask=inside, other=0.0)
    tl.store(hidden + seq * hidden_row + column, values, mask=inside)
