"""Put embeddings of the riders' tokens where their hidden states live."""

from __future__ import annotations

from torch import Tensor

from offramp.kernels.active_rows import ActiveRows
from offramp.kernels.backend import jit, tl, triton, uses_triton

_TILE = 1024


def embed_rows(table: Tensor, tokens: Tensor, slots: ActiveRows, hidden: Tensor) -> None:
    """Write ``table`` [vocab, d] at ``tokens`` [slots] int64 into ``hidden`` [slots, d]."""
    if not uses_triton(table.device):
        chosen = slots.chosen
        hidden[chosen] = table[tokens[chosen]]
        return
    width = table.shape[1]
    _embed[(len(slots.rows), triton.cdiv(width, _TILE))](
        table,
        tokens,
        slots.rows,
        slots.count,
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
    slots: tl.tensor,
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
    slot = tl.load(slots + row).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    values = tl.load(table + tl.load(tokens + slot) * table_row + column, mask=inside, other=0.0)
    tl.store(hidden + slot * hidden_row + column, values, mask=inside)
