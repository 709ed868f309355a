"""A model of a given shape with random weights, made where it runs: speed does not read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.transformer import Transformer

# Gate scores then spread over 0 to 1 instead of lying around a half.
_GATE_SPREAD = 4.0


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """The loader's canonical tensors of a model without biases and head norms.

    Products keep the size of what they are given (std 1 / sqrt(in)) and norms are ones, so a state
    grows with the root of the layers and stays finite in fp16 too.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float | None = None) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        return made.normal_(0.0, std or shape[-1] ** -0.5, generator=generator)

    d, inner = config.hidden_size, config.intermediate_size
    ones = torch.ones(d, dtype=dtype, device=device)
    weights = {"embed": normal(config.vocab_size, d, std=1.0), "final_norm": ones}
    if not config.tie_word_embeddings:
        weights["lm_head"] = normal(config.vocab_size, d)
    for layer in range(config.num_layers):
        made = {
            "attn_norm": ones.clone(),
            "mlp_norm": ones.clone(),
            "qkv": normal(config.query_size + 2 * config.kv_size, d),
            "o": normal(d, config.query_size),
            "gate_up": normal(2 * inner, d),
            "down": normal(d, inner),
        }
        weights |= {f"layers.{layer}.{name}": tensor for name, tensor in made.items()}
    return weights


def random_heads(model: Transformer, width: int, gate: int, seed: int) -> list[ExitHead]:
    """An exit head for each exit layer of ``model``, in its dtype, with nothing left at zero."""
    options = TrainOptions(width=width, router=gate, seed=seed)
    generator = torch.Generator(model.device).manual_seed(seed)

    def placed(head: ExitHead) -> ExitHead:
        head.down.normal_(0.0, width**-0.5, generator=generator)
        head.router_down.normal_(0.0, _GATE_SPREAD / math.sqrt(gate), generator=generator)
        head.router_down_bias.normal_(generator=generator)
        tensors: dict[str, Any] = {
            field.name: value.to(model.dtype)
            for field in fields(head)
            if isinstance(value := getattr(head, field.name), Tensor)
        }
        return replace(head, **tensors)

    return [placed(new_head(layer, model, options)) for layer in model.exit_layers]


def exit_vocab(size: int | None, device: torch.device) -> Tensor | None:
    """The first ``size`` token ids, None for all; which ones does not matter to speed."""
    return None if size is None else torch.arange(size, device=device)


def random_tokens(config: ModelConfig, count: int, seed: int) -> Sequence[int]:
    """Token ids without meaning."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(config.vocab_size, (count,), generator=generator).tolist()
    return tokens
