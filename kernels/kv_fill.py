"""Pay KV debt: K and V of skipped layers straight from the exit hidden state.

With the identity hidden-state map the input of every skipped layer is taken to be the exit state
(CALM's state propagation, arXiv 2207.07061; ADEPT's decoupled K,V, arXiv 2601.03700). RMSNorm's
scale folds into the projections, so all skipped layers share one normalised input and one GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.kernels.kv_store import store_kv
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import rotate


def project_kv(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k_norm: Tensor | None,
    caches: list[tuple[Tensor, Tensor]],
    places: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> None:
    """Fill ``len(caches)`` layers for ``hidden`` [n, d] and scatter into pages.

    ``weight`` [layers * 2 * kv_heads * head_dim, d]: per layer the K rows then the V rows, each
    column already scaled by that layer's norm weight. ``k_norm`` [layers, head_dim] is the models'
    per-head key norm, if any. ``places`` [n] as in `store_kv`; ``cos`` and ``sin`` at each row's
    own position.
    """
    kv_heads, dim = caches[0][0].shape[2:]
    kv = torch.nn.functional.linear(rms_norm(hidden, None, eps), weight, bias)
    kv = kv.view(hidden.shape[0], len(caches), 2, kv_heads, dim)
    for layer, (k_cache, v_cache) in enumerate(caches):
        k = kv[:, layer, 0]
        if k_norm is not None:
            k = rms_norm(k, k_norm[layer], eps)
        store_kv(rotate(k, cos, sin), kv[:, layer, 1], k_cache, v_cache, places)


def copy_kv(
    source: tuple[Tensor, Tensor], caches: list[tuple[Tensor, Tensor]], places: Tensor
) -> None:
    """Repeat the last computed layer's K,V in every skipped layer (DREX, arXiv 2512.15705)."""
    shape = source[0].shape[2:]
    k = source[0].view(-1, *shape)[places]
    v = source[1].view(-1, *shape)[places]
    for k_cache, v_cache in caches:
        store_kv(k, v, k_cache, v_cache, places)
