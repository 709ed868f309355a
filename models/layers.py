"""One decoder layer, for every family of the table in families.py."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from offramp.kernels.backend import uses_triton
from offramp.kernels.decoder import LayerSizes, LayerWeights
from offramp.kernels.kv_store import rope_and_store
from offramp.kernels.linear import Linear
from offramp.kernels.paged_attention import paged_attention
from offramp.kernels.prefill_attention import prefill_attention
from offramp.kernels.rms_norm import add_rms_norm, rms_norm
from offramp.kernels.rows import RowTable
from offramp.kernels.swiglu import swiglu
from offramp.models.config import ModelConfig
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import Forms


class DecoderLayer:
    """Attention and gated MLP with pre-norms, weights under the loader's canonical names.

    ``forms`` are the formats that matrices are kept in (None: exactly).
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: Mapping[str, Tensor],
        forms: Forms | None = None,
    ) -> None:
        self.config = config
        self.index = index
        prefix = f"layers.{index}."
        own = {k.removeprefix(prefix): weights[k] for k in weights if k.startswith(prefix)}

        def product(name: str) -> Linear:
            weight = own[name]
            return Linear(weight, own.get(f"{name}_bias"), forms)

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

    def __call__(self, hidden: Tensor, rows: RowTable, cache: KVCache) -> Tensor:
        """Advance ``hidden`` [T, d] by one layer, writing the rows' K,V into the cache."""
        eps = self.config.rms_norm_eps
        attended = self._attend(rms_norm(hidden, self.attn_norm, eps), rows, cache)
        normed, hidden = add_rms_norm(attended, hidden, self.mlp_norm, eps)
        return self.down(swiglu(self.gate_up(normed))).add_(hidden)

    def _attend(self, x: Tensor, rows: RowTable, cache: KVCache) -> Tensor:
        config = self.config
        k_cache, v_cache = cache.layers[self.index]
        q = rope_and_store(
            self.qkv(x),
            self.q_norm,
            self.k_norm,
            rows.cos,
            rows.sin,
            k_cache,
            v_cache,
            rows.places,
            config.rms_norm_eps,
            heads=config.num_heads,
        )
        window = config.sliding_window
        if uses_triton(x.device):
            return self.o(prefill_attention(q, k_cache, v_cache, rows, window).flatten(1))
        return self.o(paged_attention(q, k_cache, v_cache, rows, window))
