"""The gated unit of the models' MLPs (SwiGLU; Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.backend import jit, tl, uses_triton

_COLUMNS = 1024
"""Columns of a row that a program computes."""


def swiglu(gate_up: Tensor) -> Tensor:
    """``gate_up`` [n, 2w], the gates before the values they scale, to silu(gate) * up [n, w]."""
    if not uses_triton(gate_up.device):
        return swiglu_reference(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (rows, -(-width // _COLUMNS))
        _swiglu[grid](gate_up.contiguous(), out, width, tile=_COLUMNS)
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """See `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@jit
def _swiglu(gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, tile: tl.constexpr) -> None:
    """One row's columns of one tile."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = columns < width
    begin = gate_up + row * 2 * width + columns
    gate = tl.load(begin, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(begin + width, mask=inside, other=0.0).to(tl.float32)
    value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + row * width + columns, value, mask=inside)
