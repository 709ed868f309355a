"""One decoder layer, for every family of the table in families.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.backend import uses_triton
from offramp.kernels.decoder import LayerSizes, LayerWeights
from offramp.kernels.kv_store import store_kv
from offramp.kernels.linear import Linear
from offramp.kernels.paged_attention import paged_attention
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import rotate
from offramp.kernels.row_attention import row_attention
from offramp.models.config import ModelConfig
from offramp.models.context import ForwardContext
from offramp.models.weight_forms import Forms


class DecoderLayer:
    """Attention and gated MLP with pre-norms, weights under the loader's canonical names.

    ``forms`` says in which form each matrix is kept (None: exactly).
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: dict[str, Tensor],
        forms: Forms | None = None,
    ) -> None:
        self.config = config
        self.index = index
        prefix = f"layers.{index}."
        own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}

        def product(name: str) -> Linear:
            weight = own[name]
            return Linear(weight, own.get(f"{name}_bias"), forms and forms(weight))

        self.attn_norm, self.mlp_norm = own["attn_norm"], own["mlp_norm"]
        self.qkv, self.o = product("qkv"), product("o")
        self.gate_up, self.down = product("gate_up"), product("down")
        self.q_norm, self.k_norm = own.get("q_norm"), own.get("k_norm")

    @property
    def weights(self) -> LayerWeights:
        """What a kernel for whole layers needs of this one."""
        return LayerWeights(
            self.index,
            self.attn_norm,
            self.mlp_norm,
            self.q_norm,
            self.k_norm,
            self.qkv,
            self.o,
            self.gate_up,
            self.down,
        )

    @property
    def sizes(self) -> LayerSizes:
        """Sizes of this and all other layers."""
        config = self.config
        return LayerSizes(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.rms_norm_eps,
            config.sliding_window,
        )

    def __call__(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """Advance ``hidden`` [T, d] by one layer, writing the rows' K,V into the cache."""
        eps = self.config.rms_norm_eps
        hidden = self._attend(rms_norm(hidden, self.attn_norm, eps), ctx).add_(hidden)
        return self._mlp(rms_norm(hidden, self.mlp_norm, eps)).add_(hidden)

    def _attend(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = self.qkv(x).view(x.shape[0], heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(qk[:, :heads], self.q_norm, config.rms_norm_eps)
            k = rms_norm(qk[:, heads:], self.k_norm, config.rms_norm_eps)
            qk = torch.cat((q, k), dim=1)
        qk = rotate(qk, ctx.cos, ctx.sin)
        k_cache, v_cache = ctx.cache.layers[self.index]
        store_kv(qk[:, heads:], v, k_cache, v_cache, ctx.places)
        if uses_triton(x.device):
            window = config.sliding_window
            attended = row_attention(qk[:, :heads], k_cache, v_cache, ctx.rows, window).flatten(1)
        else:
            windows = ctx.windows[self.index]
            attended = paged_attention(qk[:, :heads], k_cache, v_cache, ctx.runs, windows)
        return self.o(attended)

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))
