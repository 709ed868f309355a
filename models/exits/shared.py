"""Exit heads of models trained to share their last norm and LM head with every layer.

LayerSkip (arXiv 2404.16710) publishes such checkpoints: they need no exit file, since each exit is
the model itself, cut short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.errors import UnsupportedModel
from offramp.models.exits.head import ExitHead

# Far enough up the sigmoid that fp16, bf16 and fp32 all round it to 1.
_CERTAIN = 20.0


def shared_heads(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    layers: Sequence[int],
    *,
    threshold: float = 0.9,
) -> tuple[ExitHead, ...]:
    """Heads after ``layers`` (ascending) that are exactly the model's final norm.

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
