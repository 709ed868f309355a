"""An exit point's own weights: the gate that decides and the adapter that predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.exit_gate import exit_gate
from offramp.kernels.linear import Linear, Matrix, linear
from offramp.kernels.rms_norm import rms_norm
from offramp.models.config import ModelConfig
from offramp.models.errors import UnsupportedModel
from offramp.models.loading.formats import Forms

ADAPTER = ("scale", "gate_up", "down", "norm")
GATE = ("router_up", "router_up_bias", "router_down", "router_down_bias")
PREDICTOR = ("predictor_up", "predictor_up_bias", "predictor_down", "predictor_down_bias")
"""Fields of ExitHead that are trained together."""
# Far enough up the sigmoid that fp16, bf16 and fp32 all round it to 1.
_CERTAIN = 20.0


@dataclass(frozen=True, slots=True)
class ExitHead:
    """Exit point after layer ``layer``.

    The adapter maps the exit state [d] to what the final norm would have given: scaled state plus
    a SwiGLU branch, then a norm of its own; the model's LM head follows. The gate is a network of
    one hidden layer on the same state; its score estimates P(exit's token == full depth's token).
    Only where it reaches ``floor`` are adapter and LM head run at all; a token leaves where the
    score of its criterion reaches ``threshold``.

    Shapes: ``scale`` and ``norm`` [d], ``gate_up`` [2 * width, d], ``down`` [d, width],
    ``router_up`` [g, d], ``router_up_bias`` [g], ``router_down`` [1, g], ``router_down_bias`` [1].

    ``fuse`` [4] weighs the logits of gate, top probability and top-2 gap, and a constant, into the
    second key's estimate of the same probability; without it that key is the gap. ``predictor_*``
    is SpecEE's predictor, [p, 12], [p], [1, p], [1] (see criteria.Predictor).

    ``kv_map`` [skipped layers * 2 * kv_size, d] and ``kv_bias`` make K and V of the layers above
    from the normalised exit state (see training/train.py:fit_kv_maps); without them `project` takes
    the exit state as the input of every skipped layer.
    """

    layer: int
    threshold: float
    scale: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor
    router_up: Tensor
    router_up_bias: Tensor
    router_down: Tensor
    router_down_bias: Tensor
    floor: float = 0.0
    fuse: Tensor | None = None
    predictor_up: Tensor | None = None
    predictor_up_bias: Tensor | None = None
    predictor_down: Tensor | None = None
    predictor_down_bias: Tensor | None = None
    kv_map: Tensor | None = None
    kv_bias: Tensor | None = None

    def score(self, hidden: Tensor, eps: float) -> Tensor:
        """Gate scores [n] of exit states [n, d]."""
        return self._gate(hidden, self.router_up, eps)

    def normed(self, hidden: Tensor, eps: float) -> Tensor:
        """LM-head input [n, d] for exit states [n, d]."""
        return self._adapted(hidden, self.gate_up, self.down, eps)

    def _gate(self, hidden: Tensor, up: Matrix, eps: float) -> Tensor:
        down, down_bias = self.router_down, self.router_down_bias
        return exit_gate(hidden, up, self.router_up_bias, down, down_bias, eps)

    def _adapted(self, hidden: Tensor, gate_up: Matrix, down: Matrix, eps: float) -> Tensor:
        gate, up = linear(rms_norm(hidden, None, eps), gate_up).chunk(2, dim=-1)
        state = hidden * self.scale + linear(F.silu(gate) * up, down)
        return rms_norm(state, self.norm, eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedHead(ExitHead):
    """An exit head for serving: its matrices are ``products``, by name, and only those."""

    products: Mapping[str, Linear]

    @classmethod
    def of(cls, head: ExitHead, forms: Forms | None) -> PackedHead:
        """``head`` with its matrices in the first of ``forms`` that holds each (None: exactly)."""
        own = {field.name: getattr(head, field.name) for field in fields(head)}
        names = ("gate_up", "down", "router_up")
        products = {name: Linear(own[name], None, forms) for name in names}
        spare = dict.fromkeys(names, head.scale.new_empty(0))
        return cls(**{**own, **spare, "kv_map": None}, products=products)

    def score(self, hidden: Tensor, eps: float) -> Tensor:
        """See ExitHead."""
        return self._gate(hidden, self.products["router_up"], eps)

    def normed(self, hidden: Tensor, eps: float) -> Tensor:
        """See ExitHead."""
        return self._adapted(hidden, self.products["gate_up"], self.products["down"], eps)


def shared_heads(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    layers: Sequence[int],
    *,
    threshold: float = 0.9,
) -> tuple[ExitHead, ...]:
    """Heads after ``layers`` (ascending) that are exactly the model's final norm.

    LayerSkip (arXiv 2404.16710) publishes models trained to share their last norm and LM head with
    every layer; they need no exit file, since each exit is the model itself, cut short.
    ``weights`` are the loader's; the heads take their dtype and device. The gate always fires, so
    criteria on the logits decide; there is no second key. ``threshold`` is the score to leave at.
    Raises UnsupportedModel for layers that are not ascending or not inside the stack.
    """
    last = config.num_layers - 1
    inside = all(0 < layer <= last for layer in layers)
    if not layers or not inside or list(layers) != sorted(set(layers)):
        raise UnsupportedModel("exit layers", list(layers), f"ascending ones of 1 to {last}")
    return tuple(_head(layer, weights["final_norm"], threshold) for layer in layers)


def _head(layer: int, norm: Tensor, threshold: float) -> ExitHead:
    d = len(norm)

    def zeros(*shape: int) -> Tensor:
        return norm.new_zeros(shape)

    return ExitHead(
        layer=layer,
        threshold=threshold,
        scale=torch.ones_like(norm),
        # A branch of width one that adds nothing is the narrowest adapter there is.
        gate_up=zeros(2, d),
        down=zeros(d, 1),
        norm=norm,
        router_up=zeros(1, d),
        router_up_bias=zeros(1),
        router_down=zeros(1, 1),
        router_down_bias=zeros(1) + _CERTAIN,
    )
