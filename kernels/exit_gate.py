"""Score how safely a token may leave: from its hidden state alone, then from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.linear import Matrix, linear
from offramp.kernels.rms_norm import rms_norm

EDGE = 1e-5
"""Probabilities closer to 0 or 1 say nothing more; their logits stay finite."""


def exit_gate(
    hidden: Tensor, up: Matrix, up_bias: Tensor, down: Tensor, down_bias: Tensor, eps: float
) -> Tensor:
    """Gate scores [n] in 0..1 of ``hidden`` [n, d]: norm, one hidden layer, sigmoid.

    ``up`` [g, d], ``up_bias`` [g], ``down`` [1, g], ``down_bias`` [1].
    """
    inner = F.silu(linear(rms_norm(hidden, None, eps), up, up_bias))
    # One row of weights: a sum over its columns is cheaper than any matrix product.
    return torch.sigmoid((inner * down).sum(dim=-1) + down_bias)


def fused_key(fuse: Tensor | None, gate: Tensor, top: Tensor, gap: Tensor) -> Tensor:
    """Estimate [n] of P(exit's token == full depth's), all of its keys [n].

    ``fuse`` [4] weighs the logits of ``gate``, top probability and top-2 gap, and a constant;
    without it the gap itself is the score.
    """
    if fuse is None:
        return gap
    keys = torch.stack((gate, top, gap), dim=1).clamp(EDGE, 1 - EDGE).logit()
    return torch.sigmoid(keys @ fuse[:3].to(keys.dtype) + fuse[3])


def fused_score(fuse: Sequence[float] | None, gate: float, top: float, gap: float) -> float:
    """`fused_key` of one row, in plain numbers."""
    if fuse is None:
        return gap
    keys = (min(max(key, EDGE), 1 - EDGE) for key in (gate, top, gap))
    weighed = zip(fuse[:3], keys, strict=True)
    total = fuse[3] + sum(weight * math.log(key / (1 - key)) for weight, key in weighed)
    return 1 / (1 + math.exp(-total))
