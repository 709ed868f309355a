"""Root-mean-square layer normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension of ``x`` and scale it by ``weight`` (None: no scale).

    The statistics are taken in fp32 whatever the dtype of ``x``.
    """
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
