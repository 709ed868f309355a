"""The whole stack as one differentiable function of padded batches, for training.

Serving runs ragged batches over paged K,V and cannot be differentiated; this is the same model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import RotaryTable, rotate
from offramp.models.config import ModelConfig

LowRank = Mapping[str, tuple[Tensor, Tensor]]
"""By the name of a weight [out, in]: factors [rank, in] and [out, rank] of what is added to it."""

_LINEARS = ("qkv", "o", "gate_up", "down")
_NORMS = ("attn_norm", "mlp_norm", "q_norm", "k_norm")


@dataclass(frozen=True, slots=True)
class Left:
    """Tokens of a batch [B, T] that left the stack early.

    ``rows`` [m] are their places in the flattened batch and ``mask`` [B, T, 1] marks them. ``kv``
    has, by layer, the [m, 2 * kv_size] that stand for their keys (before norm and rotation) and
    values there.
    """

    rows: Tensor
    mask: Tensor
    kv: Mapping[int, Tensor]

    def joined(self, other: Left) -> Left:
        """These and ``other``, which left later and need nothing in layers below."""
        kv = {layer: torch.cat((self.kv[layer], own)) for layer, own in other.kv.items()}
        return Left(torch.cat((self.rows, other.rows)), self.mask | other.mask, kv)


@dataclass(frozen=True, slots=True)
class DenseStates:
    """States [B, T, d] of a padded batch: ``at[layer]`` after that layer, ``last`` after all."""

    at: dict[int, Tensor]
    last: Tensor


class DenseModel:
    """The loader's canonical ``weights`` with ``deltas`` added, for up to ``max_positions``.

    A weight in ``rounded`` is used as it stands there, sum and rounding done; its delta only
    receives the gradient (straight-through estimator, arXiv 1308.3432).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        max_positions: int,
        deltas: LowRank | None = None,
        rounded: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.max_positions = max_positions
        self.deltas: LowRank = deltas or {}
        self.rounded = rounded or {}
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

        ``exit_layers`` are ascending.
        ``keep`` [layers, B] says which sequences a layer is applied to (None: all); the others
        pass it unchanged (layer dropout). Attention is causal, so padding reaches no real token.
        """
        at: dict[int, Tensor] = {}
        hidden, first = self.embedded(ids), 0
        for layer in exit_layers:
            at[layer] = hidden = self.run(hidden, first, layer, keep)
            first = layer
        return DenseStates(at, self.run(hidden, first, self.config.num_layers, keep))

    def embedded(self, ids: Tensor) -> Tensor:
        """Inputs [B, T, d] of the first layer; fp32 also where matrix products run in less."""
        return F.embedding(ids, self.embed).float()

    def run(
        self,
        hidden: Tensor,
        first: int,
        end: int,
        keep: Tensor | None = None,
        left: Left | None = None,
    ) -> Tensor:
        """States [B, T, d] after the layers ``first`` to ``end`` - 1, from those before them.

        States of tokens that ``left`` stay as they are. ``keep`` is as above.
        """
        length, device = hidden.shape[1], hidden.device
        angles = self._rotary.at(torch.arange(length, device=device))
        mask = self._mask(length)
        for index in range(first, end):
            filled = None if left is None else (left.rows, left.kv[index])
            stays = None if left is None else left.mask
            if keep is not None and not bool(keep[index].all()):
                dropped = ~keep[index].to(device).view(-1, 1, 1)
                stays = dropped if stays is None else stays | dropped
            out = decoder_layer(
                self.config, self._layer(index), hidden, angles, mask=mask, filled=filled
            )
            hidden = out if stays is None else torch.where(stays, hidden, out)
        return hidden

    def with_deltas(
        self, deltas: LowRank, rounded: Mapping[str, Tensor] | None = None
    ) -> DenseModel:
        """The same model with other deltas; weights are shared."""
        return DenseModel(self.config, self.weights, self.max_positions, deltas, rounded)

    def normed(self, hidden: Tensor) -> Tensor:
        """Final norm of full-depth states [..., d]."""
        return rms_norm(hidden, self.weights["final_norm"], self.config.rms_norm_eps)

    def _layer(self, index: int) -> Layer:
        prefix = f"layers.{index}."
        norms = {
            name: self.weights[prefix + name] for name in _NORMS if prefix + name in self.weights
        }
        return Layer(norms, {name: self._linear(prefix + name) for name in _LINEARS})

    def _linear(self, name: str) -> TrainedLinear:
        weight = self.rounded.get(name, self.weights[name])
        bias, low = self.weights.get(f"{name}_bias"), self.deltas.get(name)
        return TrainedLinear(weight, bias, low, name in self.rounded)

    def _mask(self, length: int) -> Tensor | None:
        """Who may see whom [T, T] under sliding-window attention; None for plain causal."""
        window = self.config.sliding_window
        if window is None or window >= length:
            return None
        at = torch.arange(length, device=self.embed.device)
        behind = at.unsqueeze(1) - at
        return (behind >= 0) & (behind < window)


@dataclass(frozen=True, slots=True)
class TrainedLinear:
    """A linear layer: ``weight`` [out, in], its bias, and the delta ``low`` if there is one.

    Of a ``rounded`` weight the delta is a part already; it is here for its gradient alone. Inputs
    become as precise as that weight.
    """

    weight: Tensor
    bias: Tensor | None
    low: tuple[Tensor, Tensor] | None
    rounded: bool

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        if self.low is None:
            return F.linear(x, self.weight, self.bias)
        if self.rounded:
            x = x.to(self.weight.dtype)
            out: Tensor = _StraightThrough.apply(x, self.weight, *self.low)  # type: ignore[no-untyped-call]
            return out if self.bias is None else out + self.bias
        down, up = self.low
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, down), up)


class _StraightThrough(torch.autograd.Function):
    """A product whose weight's gradient goes to the factors that the weight was rounded from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        inner = rows @ down.to(x.dtype).t()
        inner_grad = grads @ up.to(grad.dtype)
        of_down = (inner_grad.t() @ rows).to(down.dtype)
        of_up = (grads.t() @ inner).to(up.dtype)
        return grad @ weight, None, of_down, of_up


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer's weights of norms and linear layers, by name."""

    norms: Mapping[str, Tensor]
    linears: Mapping[str, TrainedLinear]


def decoder_layer(
    config: ModelConfig,
    layer: Layer,
    hidden: Tensor,
    angles: tuple[Tensor, Tensor],
    *,
    mask: Tensor | None,
    filled: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Output [B, T, d] of ``layer`` for its input ``hidden``.

    ``angles`` are the rotary ones of T positions, ``mask`` [T, T] says who sees whom (None:
    causal). ``filled`` are flat places [m] and the keys and values [m, 2 * kv_size] that stand
    there instead of the layer's own.
    """
    eps = config.rms_norm_eps
    x = _norm(hidden, layer.norms["attn_norm"], eps)
    hidden = hidden + _attend(config, layer, x, angles, mask, filled)
    x = _norm(hidden, layer.norms["mlp_norm"], eps)
    gate, up = layer.linears["gate_up"](x).chunk(2, dim=-1)
    return hidden + layer.linears["down"](F.silu(gate) * up)


def _attend(
    config: ModelConfig,
    layer: Layer,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    mask: Tensor | None,
    filled: tuple[Tensor, Tensor] | None,
) -> Tensor:
    batch, length, _ = x.shape
    heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
    qkv = layer.linears["qkv"](x)
    q, kv = qkv.split((config.query_size, 2 * kv_heads * config.head_dim), dim=-1)
    if filled is not None:
        kv = kv.flatten(0, 1).index_copy(0, filled[0], filled[1].to(kv.dtype)).view(kv.shape)
    q = q.reshape(batch, length, heads, config.head_dim)
    k, v = kv.reshape(batch, length, 2 * kv_heads, config.head_dim).chunk(2, dim=2)
    if config.qk_norm:
        q = _norm(q, layer.norms["q_norm"], eps)
        k = _norm(k, layer.norms["k_norm"], eps)
    q, k = rotate(q, *angles).to(v.dtype), rotate(k, *angles).to(v.dtype)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return layer.linears["o"](out.transpose(1, 2).reshape(batch, length, -1))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The library's, which has a fused backward."""
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps)
