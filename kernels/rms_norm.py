"""Root-mean-square layer normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from offramp.kernels.backend import jit, next_power_of_2, tl, uses_triton

_WARP_COLUMNS = 256
"""Columns of a row for which a warp of its own pays."""
_MOST_WARPS = 8


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension of ``x`` and scale it by ``weight`` (None: no scale).

    The statistics are taken in fp32 whatever the dtype of ``x``.
    """
    if uses_triton(x.device) and _fits_kernel(x, weight):
        return _launch(x, None, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of ``x + residual``, and that sum, all of one shape; ``x`` becomes the sum."""
    if uses_triton(x.device) and _fits_kernel(x, weight) and residual.is_contiguous():
        return _launch(x, residual, weight, eps), x
    total = x.add_(residual)
    return rms_norm(total, weight, eps), total


def masked_rms_norm(
    x: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    out: Tensor,
    count: Tensor,
    eps: float,
    *,
    limit: int,
) -> None:
    """Write `rms_norm` of as many rows of ``x`` as the device chose to the first rows of ``out``.

    ``count`` int32 [1] on the device, at most ``limit``; the i-th of them is row ``index[i]``
    (int32; None: row i). ``x`` and ``out`` [n, width] are contiguous; nothing else of either is
    read or written.
    """
    if not uses_triton(x.device):
        rows = int(count)
        chosen = x[:rows] if index is None else x[index[:rows].long()]
        out[:rows] = rms_norm_reference(chosen, weight, eps)
        return
    width = x.shape[1]
    wide = next_power_of_2(width)
    _normalise[(limit,)](
        x,
        None,
        weight,
        out,
        index,
        count,
        eps,
        width=width,
        wide=wide,
        num_warps=_warps(wide),
    )


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `rms_norm`."""
    wide = x.float()
    # Few operations: on a CPU each costs more than its arithmetic at one row (torch's own rms_norm
    # is a chain of seven there).
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(_scalar(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    normed = (wide * scale).to(x.dtype)
    return normed if weight is None else normed * weight


@functools.cache
def _scalar(value: float, device: torch.device) -> Tensor:
    # Kept for training as well as for serving, so it must not belong to inference alone.
    with torch.inference_mode(mode=False):
        return torch.tensor(value, dtype=torch.float32, device=device)


def _fits_kernel(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernel, which has no gradients, computes what the reference would."""
    plain = weight is None or (weight.shape == x.shape[-1:] and weight.dtype is x.dtype)
    trained = torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    )
    return plain and x.is_contiguous() and not trained


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    out = torch.empty_like(x)
    if not x.numel():
        return out
    width = x.shape[-1]
    wide = next_power_of_2(width)
    _normalise[(x.numel() // width,)](
        x,
        residual,
        weight,
        out,
        None,
        None,
        eps,
        width=width,
        wide=wide,
        num_warps=_warps(wide),
    )
    return out


def _warps(wide: int) -> int:
    """Warps for a row of ``wide`` columns, a power of two."""
    return min(max(1, wide // _WARP_COLUMNS), _MOST_WARPS)


@jit
def _normalise(
    x: tl.tensor,
    residual: tl.tensor | None,
    weight: tl.tensor | None,
    out: tl.tensor,
    index: tl.tensor | None,
    count: tl.tensor | None,
    eps: tl.tensor,
    width: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """One row; its sum with ``residual`` takes the place of ``x``."""
    to = tl.program_id(0).to(tl.int64)
    row = to
    if count is not None:  # noqa: SIM102 (a constant of the compiler first)
        if to >= tl.load(count):
            return
    if index is not None:
        row = tl.load(index + to).to(tl.int64)
    row *= width
    to *= width
    columns = tl.arange(0, wide)
    inside = columns < width
    value = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        # What later layers add to is the rounded sum, so the norm is taken of that as well.
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    normed = (value * scale).to(out.dtype.element_ty)
    if weight is not None:
        factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        normed = (normed.to(tl.float32) * factor).to(out.dtype.element_ty)
    tl.store(out + to + columns, normed, mask=inside)
