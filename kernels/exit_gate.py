"""Score how safely a token may leave, from its hidden state alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.linear import Matrix, linear
from offramp.kernels.rms_norm import rms_norm


def exit_gate(
    hidden: Tensor, up: Matrix, up_bias: Tensor, down: Tensor, down_bias: Tensor, eps: float
) -> Tensor:
    """Gate scores [n] in 0..1 of ``hidden`` [n, d]: norm, one hidden layer, sigmoid.

    ``up`` [g, d], ``up_bias`` [g], ``down`` [1, g], ``down_bias`` [1].
    """
    inner = F.silu(linear(rms_norm(hidden, None, eps), up, up_bias))
    # One row of weights: a sum over its columns is cheaper than any matrix product.
    return torch.sigmoid((inner * down).sum(dim=-1) + down_bias)
