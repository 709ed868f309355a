"""Pay KV debt: K and V of skipped layers straight from the exit hidden state.

With the identity hidden-state map the input of every skipped layer is taken to be the exit state
(CALM's state propagation, arXiv 2207.07061; ADEPT's decoupled K,V, arXiv 2601.03700). RMSNorm's
scale folds into the projections, so all skipped layers share one normalised input and one GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.kernels.linear import Matrix, linear
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import rotate


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

    ``pages`` is [layers, 2, blocks, block_size, kv_heads, head_dim].
    ``weight`` [layers * 2 * kv_heads * head_dim, d]: per layer the K rows then the V rows, each
    column already scaled by that layer's norm weight. ``k_norm`` [layers, head_dim] is the models'
    per-head key norm, if any. ``places`` [n] as in `store_kv`; ``cos`` and ``sin`` at each row's
    own position.
    """
    layers, _, _, _, kv_heads, dim = pages.shape
    rows = hidden.shape[0]
    kv = linear(rms_norm(hidden, None, eps), weight, bias)
    kv = kv.view(rows, layers, 2, kv_heads, dim)
    k = kv[:, :, 0]
    if k_norm is not None:
        k = rms_norm(k, k_norm.unsqueeze(1), eps)
    k = rotate(k.reshape(rows, layers * kv_heads, dim), cos, sin).view(rows, layers, kv_heads, dim)
    _scatter(torch.stack((k, kv[:, :, 1]), dim=2), pages, places)


def copy_kv(source: Tensor, pages: Tensor, places: Tensor) -> None:
    """Repeat the last computed layer's K,V in every skipped layer (DREX, arXiv 2512.15705).

    ``source`` is one layer of pages, ``pages`` the skipped layers'; ``places`` as in `store_kv`.
    """
    kv = source.flatten(1, 2)[:, places].transpose(0, 1)
    _scatter(kv.unsqueeze(1).expand(-1, len(pages), -1, -1, -1), pages, places)


def clear_kv(pages: Tensor, places: Tensor) -> None:
    """Zeros for K and V at ``places`` of every layer of ``pages``: what fills are measured against.

    SpecEE's released code (arXiv 2504.08850) leaves the skipped layers' K,V absent.
    """
    layers, _, blocks, size, kv_heads, dim = pages.shape
    pages.view(layers, 2, blocks * size, kv_heads, dim).index_fill_(2, places, 0)


def _scatter(kv: Tensor, pages: Tensor, places: Tensor) -> None:
    """Write ``kv`` [n, layers, 2, kv_heads, head_dim] at ``places`` of every layer."""
    layers, _, blocks, size, kv_heads, dim = pages.shape
    flat = pages.view(layers, 2, blocks * size, kv_heads, dim)
    flat.index_copy_(2, places, kv.permute(1, 2, 0, 3, 4))
