"""Matrix products of as many rows as the device chose, fused with what surrounds them in a layer.

One launch is a whole product: rows are read through a list and written through one, with SwiGLU or
the residual sum behind, so a token's state never moves and a segment without active rows costs its
launches only. RMSNorm comes before, in a launch of its own (rms_norm.masked_rms_norm): inside the
product's loop it kept weights from being fetched ahead. Made for decoding, where a product takes
the time that reading its weight takes; many rows of a prompt are better off with the library's
products.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.backend import compute_type, jit, next_power_of_2, tl, triton, uses_triton

# Programs that keep a large GPU's memory busy: one or two for each of the H200's 132 processors.
# With more rows the inputs, which every program reads from the L2 cache, weigh as much as weights.
_PROCESSORS = 128
_LEAST_ROWS, _MOST_ROWS = 16, 64
_OUTS = (128, 64, 32, 16)


class Activation(IntEnum):
    """What happens to a product before it is written.

    SWIGLU takes the first half of the outputs for the gate of the second: silu(gate) * up.
    """

    NONE = 0
    SILU = 1
    SWIGLU = 2


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor [n, width] of which row i of a batch is row ``index[i]`` (int32; None: row i)."""

    data: Tensor
    index: Tensor | None = None

    def at(self, count: int) -> Tensor:
        """The rows' places in ``data`` [count]."""
        if self.index is None:
            return torch.arange(count, device=self.data.device)
        return self.index[:count].long()


@dataclass(frozen=True, slots=True)
class Residual:
    """What is added to a product: the ``rows`` times ``scale`` [out] (None: 1)."""

    rows: Rows
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut: rows, outputs and inputs of a program's step, its warps and stages."""

    rows: int
    outs: int
    ins: int
    warps: int
    stages: int


def masked_linear(
    x: Rows,
    weight: Tensor,
    out: Rows,
    count: Tensor,
    *,
    limit: int,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    residual: Residual | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Write act(x ``weight``^T + bias) + residual for the first ``count`` rows.

    ``weight`` [n, in], ``bias`` [n]; n is twice the width of ``out`` for SWIGLU. ``count`` int32
    [1] on the device, at most ``limit``; rows behind it are neither read nor written. ``out`` may
    be the residual, but not the input. Sums are fp32 whatever the dtype.
    """
    if not uses_triton(x.data.device):
        masked_linear_reference(
            x, weight, out, count, bias=bias, activation=activation, residual=residual
        )
        return
    width, ins = out.data.shape[1], weight.shape[1]
    tiles = tiles or tiles_for(limit, width, weight.dtype)
    base = residual.rows if residual else None
    _product[(triton.cdiv(width, tiles.outs), triton.cdiv(limit, tiles.rows))](
        x.data,
        weight,
        bias,
        base.data if base else None,
        residual.scale if residual else None,
        out.data,
        x.index,
        base.index if base else None,
        out.index,
        count,
        width,
        ins,
        x.data.stride(0),
        weight.stride(0),
        base.data.stride(0) if base else 0,
        out.data.stride(0),
        activation=int(activation),
        tile_rows=tiles.rows,
        tile_outs=tiles.outs,
        tile_ins=tiles.ins,
        whole=ins % tiles.ins == 0,
        compute=compute_type(weight.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def masked_linear_reference(
    x: Rows,
    weight: Tensor,
    out: Rows,
    count: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    residual: Residual | None = None,
) -> None:
    """See `masked_linear`."""
    rows = int(count)
    product = F.linear(x.data[x.at(rows)], weight, bias)
    if activation is Activation.SILU:
        product = F.silu(product)
    elif activation is Activation.SWIGLU:
        gate, up = product.chunk(2, dim=-1)
        product = F.silu(gate) * up
    if residual is not None:
        base = residual.rows.data[residual.rows.at(rows)]
        product = product + (base if residual.scale is None else base * residual.scale)
    out.data.index_copy_(0, out.at(rows), product.to(out.data.dtype))


def tiles_for(rows: int, outs: int, dtype: torch.dtype) -> Tiles:
    """A cut with programs enough for a large GPU and steps deep enough for its memory."""
    # fp32 has no tensor cores to keep its sums: larger tiles would not fit the registers.
    widest = 32 if dtype is torch.float32 else _OUTS[0]
    tile_rows = min(_MOST_ROWS, widest, max(_LEAST_ROWS, next_power_of_2(rows)))
    programs = _PROCESSORS if tile_rows > _LEAST_ROWS else 2 * _PROCESSORS
    tile_outs = next((tile for tile in _OUTS if outs // tile >= programs), _OUTS[-1])
    tile_outs = min(tile_outs, widest)
    # What a step holds in shared memory decides its depth; four steps are under way at a time.
    size = tile_rows + tile_outs
    depth = 256 if size <= 48 else 128 if size < 128 else 64
    warps = 8 if tile_rows * tile_outs >= 2048 else 4
    return Tiles(tile_rows, tile_outs, depth * 2 // dtype.itemsize, warps, 4)


@jit
def _product(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    base: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    x_index: tl.tensor,
    base_index: tl.tensor,
    out_index: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    ins: tl.tensor,
    x_row: tl.tensor,
    w_row: tl.tensor,
    base_row: tl.tensor,
    out_row: tl.tensor,
    activation: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outs: tl.constexpr,
    tile_ins: tl.constexpr,
    whole: tl.constexpr,
    compute: tl.constexpr,
) -> None:
    """One tile of rows and outputs over all inputs."""
    first = tl.program_id(1) * tile_rows
    rows = tl.load(count)
    if first >= rows:
        return
    row = first + tl.arange(0, tile_rows)
    real = row < rows
    column = tl.program_id(0) * tile_outs + tl.arange(0, tile_outs)
    inside = column < width
    x_at = x + _indexed(x_index, row, real)[:, None] * x_row
    w_at = weight + column.to(tl.int64)[:, None] * w_row
    # A width of 1 is a constant of Python's to the compiler.
    half = tl.cast(width, tl.int64) * w_row
    total = tl.zeros([tile_rows, tile_outs], tl.float32)
    other = tl.zeros([tile_rows, tile_outs], tl.float32)
    for start in range(0, ins, tile_ins):
        k = start + tl.arange(0, tile_ins)
        there = k < ins
        values = tl.load(x_at + k[None, :], mask=real[:, None] & there[None, :], other=0.0)
        values = values.to(compute)
        seen = inside[:, None] if whole else inside[:, None] & there[None, :]
        own = tl.load(w_at + k[None, :], mask=seen, other=0.0).to(compute)
        total = tl.dot(values, tl.trans(own), total, input_precision="ieee")
        if activation == 2:
            own = tl.load(w_at + half + k[None, :], mask=seen, other=0.0).to(compute)
            other = tl.dot(values, tl.trans(own), other, input_precision="ieee")
    total = _activated(total, other, bias, column, inside, width, activation)
    written = real[:, None] & inside[None, :]
    if base is not None:
        at = base + _indexed(base_index, row, real)[:, None] * base_row + column[None, :]
        total += _scaled(tl.load(at, mask=written, other=0.0), scale, column, inside)
    at = out + _indexed(out_index, row, real)[:, None] * out_row + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=written)


@jit
def _activated(
    total: tl.tensor,
    other: tl.tensor,
    bias: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    width: tl.tensor,
    activation: tl.constexpr,
) -> tl.tensor:
    """Sums with their bias and activation; ``other`` belongs to SWIGLU's second half."""
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if activation == 2:
            added = tl.load(bias + width + column, mask=inside, other=0.0)
            other += added.to(tl.float32)[None, :]
    if activation != 0:
        total *= tl.sigmoid(total)
    if activation == 2:
        total *= other
    return total


@jit
def _scaled(added: tl.tensor, scale: tl.tensor, column: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """The residual in fp32, times its scale."""
    wide = added.to(tl.float32)
    if scale is not None:
        wide *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return wide


@jit
def _indexed(index: tl.tensor, row: tl.tensor, real: tl.tensor) -> tl.tensor:
    """Where the rows of a batch lie in their tensor."""
    at = row.to(tl.int64)
    if index is not None:
        at = tl.load(index + row, mask=real, other=0).to(tl.int64)
    return at
