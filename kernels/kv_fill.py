"""Pay KV debt: K and V of skipped layers straight from the exit hidden state.

With the identity hidden-state map the input of every skipped layer is taken to be the exit state
(CALM's state propagation, arXiv 2207.07061; ADEPT's decoupled K,V, arXiv 2601.03700). RMSNorm's
scale folds into the projections, so all skipped layers share one normalised input and one GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.active_rows import SegmentBatch
from offramp.kernels.backend import compute_type, jit, next_power_of_2, tl, triton, uses_triton
from offramp.kernels.kv_formats import page_parts, write_kv
from offramp.kernels.linear import Matrix, linear
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import rotate

# Tiles of 64 rows gave wrong numbers on an H100 with triton 3.6.
_LEAST_ROWS, _MOST_ROWS, _INS, _STAGES = 16, 32, 128, 3


@dataclass(frozen=True, slots=True)
class Projection:
    """Makes K,V of the ``layers`` above an exit, as `project_kv` takes it.

    ``weight`` [layers * 2 * kv_heads * head_dim, d], ``bias`` of as many or None, ``k_norm``
    [layers, head_dim] or None.
    """

    weight: Tensor
    bias: Tensor | None
    k_norm: Tensor | None


def project_kv(
    hidden: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    k_norm: Tensor | None,
    pages: Tensor,
    places: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> None:
    """Fill every layer of ``pages`` for ``hidden`` [n, d], in as few operations as one layer takes.

    ``pages`` is [layers, 2, blocks, block_size, kv_heads, head_dim], or as kv_formats has it.
    ``weight`` [layers * 2 * kv_heads * head_dim, d]: per layer the K rows then the V rows, each
    column already scaled by that layer's norm weight. ``k_norm`` [layers, head_dim] is the models'
    per-head key norm, if any. ``places`` [n] as in `store_kv`; ``cos`` and ``sin`` at each row's
    own position.
    """
    layers, _, _, _, kv_heads, _ = pages.shape
    rows = hidden.shape[0]
    kv = linear(rms_norm(hidden, None, eps), weight, bias)
    dim = kv.shape[1] // (layers * 2 * kv_heads)
    kv = kv.view(rows, layers, 2, kv_heads, dim)
    k = kv[:, :, 0]
    if k_norm is not None:
        k = rms_norm(k, k_norm.unsqueeze(1), eps)
    k = rotate(k.reshape(rows, layers * kv_heads, dim), cos, sin).view(rows, layers, kv_heads, dim)
    write_kv(torch.stack((k, kv[:, :, 1]), dim=2), pages, places)


def fill_kv(
    hidden: Tensor,
    exited: SegmentBatch,
    projection: Projection,
    pages: Tensor,
    angles: tuple[Tensor, Tensor],
    eps: float,
) -> None:
    """The same for sequences that left on the device, all layers in one launch.

    ``hidden`` [sequences, d]; ``angles`` cos and sin of all positions, [length, 1, head_dim] each.
    One program makes one head of K or V: its product, norm, rotation and scatter.
    """
    cos, sin = angles
    if not uses_triton(hidden.device):
        seqs = exited.list.chosen
        places, positions = exited.places[: len(seqs)], exited.positions[: len(seqs)]
        weight, bias, k_norm = projection.weight, projection.bias, projection.k_norm
        at = cos[positions], sin[positions]
        project_kv(hidden[seqs], weight, bias, k_norm, pages, places, *at, eps)
        return
    layers, _, _, _, kv_heads, dim = pages.shape
    ins = hidden.shape[1]
    tile_rows = min(_MOST_ROWS, max(_LEAST_ROWS, next_power_of_2(exited.limit)))
    # Each tile of rows reads the weight anew; with many of them a step holds fewer inputs.
    tile_ins = (_INS if tile_rows == _LEAST_ROWS else _INS // 2) * 2 // projection.weight.itemsize
    _fill[(layers * 2 * kv_heads, triton.cdiv(exited.limit, tile_rows))](
        hidden,
        projection.weight,
        projection.bias,
        projection.k_norm,
        cos,
        sin,
        pages,
        exited.seqs,
        exited.positions,
        exited.places,
        exited.count,
        eps,
        ins,
        hidden.stride(0),
        projection.weight.stride(0),
        pages.stride(0),
        pages.stride(1),
        pages.stride(3),
        kv_heads=kv_heads,
        dim=dim,
        wide=next_power_of_2(dim // 2),
        tile_rows=tile_rows,
        tile_ins=tile_ins,
        whole=ins % tile_ins == 0,
        compute=compute_type(projection.weight.dtype),
        num_stages=_STAGES,
    )


def copy_kv(source: Tensor, pages: Tensor, places: Tensor) -> None:
    """Repeat the last computed layer's K,V in every skipped layer (DREX, arXiv 2512.15705).

    ``source`` is one layer of pages, ``pages`` the skipped layers'; ``places`` as in `store_kv`.
    """
    size = pages.shape[3]
    blocks, offsets = places // size, places % size
    for part, own in zip(page_parts(pages), page_parts(source), strict=True):
        part[:, :, blocks, offsets] = own[:, blocks, offsets]


def clear_kv(pages: Tensor, places: Tensor) -> None:
    """Zeros for K and V at ``places`` of every layer of ``pages``: what fills are measured against.

    SpecEE's released code (arXiv 2504.08850) leaves the skipped layers' K,V absent.
    """
    size = pages.shape[3]
    for part in page_parts(pages):
        part[:, :, places // size, places % size] = 0


@jit
def _fill(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    k_norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    pages: tl.tensor,
    seqs: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    ins: tl.tensor,
    hidden_row: tl.tensor,
    w_row: tl.tensor,
    layer_step: tl.tensor,
    kind_step: tl.tensor,
    place_step: tl.tensor,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    wide: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_ins: tl.constexpr,
    whole: tl.constexpr,
    compute: tl.constexpr,
) -> None:
    """One head of K or V for one tile of rows; its two halves apart, as rotation pairs them."""
    first = tl.program_id(1) * tile_rows
    rows = tl.load(count)
    if first >= rows:
        return
    row = first + tl.arange(0, tile_rows)
    real = row < rows
    head = tl.program_id(0)
    half: tl.constexpr = dim // 2
    column = tl.arange(0, wide)
    inside = column < half
    start_row = (head * dim + column).to(tl.int64)
    low, high, squares = _halves(
        hidden + tl.load(seqs + row, mask=real, other=0).to(tl.int64)[:, None] * hidden_row,
        weight + start_row[:, None] * w_row,
        half * w_row,
        ins,
        real,
        inside,
        tile_rows,
        wide,
        tile_ins,
        whole,
        compute,
    )
    factor = tl.rsqrt(squares / ins + eps)[:, None]
    low, high = low * factor, high * factor
    if bias is not None:
        low += tl.load(bias + start_row, mask=inside, other=0.0).to(tl.float32)[None, :]
        high += tl.load(bias + start_row + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    layer = head // (2 * kv_heads)
    kind = head // kv_heads % 2
    if kind == 0:
        if k_norm is not None:
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / dim + eps)[:, None]
            at = k_norm + layer * dim + column
            low *= scale * tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
            high *= scale * tl.load(at + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        position = tl.load(positions + row, mask=real, other=0)
        low, high = _rotated(low, high, cos, sin, position, column, inside, dim)
    place = tl.load(places + row, mask=real, other=0)
    to = pages + layer.to(tl.int64) * layer_step + kind.to(tl.int64) * kind_step
    to += place[:, None] * place_step + head % kv_heads * dim + column[None, :]
    written = real[:, None] & inside[None, :]
    tl.store(to, low.to(pages.dtype.element_ty), mask=written)
    tl.store(to + half, high.to(pages.dtype.element_ty), mask=written)


@jit
def _halves(
    x_at: tl.tensor,
    w_at: tl.tensor,
    half: tl.tensor,
    ins: tl.tensor,
    real: tl.tensor,
    inside: tl.tensor,
    tile_rows: tl.constexpr,
    wide: tl.constexpr,
    tile_ins: tl.constexpr,
    whole: tl.constexpr,
    compute: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Products with the two halves of a head's weight, and the inputs' sums of squares."""
    squares = tl.zeros([tile_rows], tl.float32)
    low = tl.zeros([tile_rows, wide], tl.float32)
    high = tl.zeros([tile_rows, wide], tl.float32)
    for start in range(0, ins, tile_ins):
        k = start + tl.arange(0, tile_ins)
        there = k < ins
        values = tl.load(x_at + k[None, :], mask=real[:, None] & there[None, :], other=0.0)
        squares += tl.sum(values.to(tl.float32) * values.to(tl.float32), axis=1)
        values = values.to(compute)
        seen = inside[:, None] if whole else inside[:, None] & there[None, :]
        own = tl.load(w_at + k[None, :], mask=seen, other=0.0).to(compute)
        low = tl.dot(values, tl.trans(own), low, input_precision="ieee")
        own = tl.load(w_at + half + k[None, :], mask=seen, other=0.0).to(compute)
        high = tl.dot(values, tl.trans(own), high, input_precision="ieee")
    return low, high, squares


@jit
def _rotated(
    low: tl.tensor,
    high: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    position: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Halves of heads turned by the angles of their positions; the first half's sine is signed."""
    at = position[:, None] * dim + column[None, :]
    seen = inside[None, :]
    half: tl.constexpr = dim // 2
    turned = low * tl.load(cos + at, mask=seen, other=0.0).to(tl.float32)
    turned += high * tl.load(sin + at, mask=seen, other=0.0).to(tl.float32)
    other = high * tl.load(cos + at + half, mask=seen, other=0.0).to(tl.float32)
    other += low * tl.load(sin + at + half, mask=seen, other=0.0).to(tl.float32)
    return turned, other
