"""The whole stack as one differentiable function of padded batches, for training.

Serving runs ragged batches over paged K,V and cannot be differentiated; this is the same model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import RotaryTable, rotate
from offramp.models.config import ModelConfig

LowRank = Mapping[str, tuple[Tensor, Tensor]]
"""By the name of a weight [out, in]: factors [rank, in] and [out, rank] of what is added to it."""


@dataclass(frozen=True, slots=True)
class DenseStates:
    """States [B, T, d] of a padded batch: ``at[layer]`` after that layer, ``last`` after all."""

    at: dict[int, Tensor]
    last: Tensor


class DenseModel:
    """The loader's canonical ``weights`` with ``deltas`` added, for up to ``max_positions``."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        max_positions: int,
        deltas: LowRank | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.max_positions = max_positions
        self.deltas: LowRank = deltas or {}
        self.embed = weights["embed"]
        self.lm_head = weights.get("lm_head", self.embed)
        self._rotary = RotaryTable(
            torch.tensor(config.inv_freq),
            max_positions,
            config.rope_scale,
            torch.float32,
            self.embed.device,
        )

    def __call__(
        self, ids: Tensor, exit_layers: Sequence[int] = (), keep: Tensor | None = None
    ) -> DenseStates:
        """States of token ids [B, T], padded on the right with any token.

        ``keep`` [layers, B] says which sequences a layer is applied to (None: all); the others
        pass it unchanged (layer dropout). Attention is causal, so padding reaches no real token.
        """
        # Residuals in fp32 also where matrix products run in less.
        hidden = F.embedding(ids, self.embed).float()
        mask = self._mask(ids.shape[1])
        at: dict[int, Tensor] = {}
        for index in range(self.config.num_layers):
            hidden = self._layer(index, hidden, mask, None if keep is None else keep[index])
            if index + 1 in exit_layers:
                at[index + 1] = hidden
        return DenseStates(at, hidden)

    def with_deltas(self, deltas: LowRank) -> DenseModel:
        """The same model with other deltas; weights are shared."""
        return DenseModel(self.config, self.weights, self.max_positions, deltas)

    def normed(self, hidden: Tensor) -> Tensor:
        """Final norm of full-depth states [..., d]."""
        return rms_norm(hidden, self.weights["final_norm"], self.config.rms_norm_eps)

    def _layer(
        self, index: int, hidden: Tensor, mask: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        if keep is None or bool(keep.all()):
            return self._decoder_layer(index, hidden, mask)
        rows = keep.nonzero().squeeze(-1).to(hidden.device)
        if not len(rows):
            return hidden
        return hidden.index_copy(0, rows, self._decoder_layer(index, hidden[rows], mask))

    def _decoder_layer(self, index: int, hidden: Tensor, mask: Tensor | None) -> Tensor:
        eps, prefix = self.config.rms_norm_eps, f"layers.{index}."
        x = rms_norm(hidden, self.weights[f"{prefix}attn_norm"], eps)
        hidden = hidden + self._attend(prefix, x, mask)
        x = rms_norm(hidden, self.weights[f"{prefix}mlp_norm"], eps)
        gate, up = self._linear(f"{prefix}gate_up", x).chunk(2, dim=-1)
        return hidden + self._linear(f"{prefix}down", F.silu(gate) * up)

    def _attend(self, prefix: str, x: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        batch, length, _ = x.shape
        heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        qkv = self._linear(f"{prefix}qkv", x)
        qkv = qkv.view(batch, length, heads + 2 * kv_heads, config.head_dim)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
        if config.qk_norm:
            q = rms_norm(q, self.weights[f"{prefix}q_norm"], eps)
            k = rms_norm(k, self.weights[f"{prefix}k_norm"], eps)
        cos, sin = self._rotary.at(torch.arange(length, device=x.device))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self._linear(f"{prefix}o", out.transpose(1, 2).reshape(batch, length, -1))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        out = F.linear(x, self.weights[name], self.weights.get(f"{name}_bias"))
        delta = self.deltas.get(name)
        return out if delta is None else out + F.linear(F.linear(x, delta[0]), delta[1])

    def _mask(self, length: int) -> Tensor | None:
        """Who may see whom [T, T] under sliding-window attention; None for plain causal."""
        window = self.config.sliding_window
        if window is None or window >= length:
            return None
        at = torch.arange(length, device=self.embed.device)
        behind = at.unsqueeze(1) - at
        return (behind >= 0) & (behind < window)
