"""Shapes of models that are measured without their weights: a shape says how fast, not how well."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from offramp.models import tiny
from offramp.models.config import ModelConfig

LLAMA_3_THETA = 500000.0
SMOLLM2_THETA = 100000.0
TINY_THETA = 10000.0


def plain_inv_freq(theta: float, head_dim: int) -> tuple[float, ...]:
    """Rotary frequencies (head_dim // 2 values, radians per position) without any scaling.

    The operations are those of transformers' default, so the values are the same bit for bit.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return tuple((1.0 / theta**exponents).tolist())


def _llama(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inner: int,
    layers: int,
    vocab: int,
    *,
    theta: float,
    positions: int,
    tied: bool,
) -> ModelConfig:
    """A model of the Llama family without biases, in the order that model cards use."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        inv_freq=plain_inv_freq(theta, head_dim),
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
    )


# Llama 3.1 and later stretch their frequencies for long contexts; that changes no shape.
MODEL_SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3-8b": _llama(
            4096,
            32,
            8,
            128,
            14336,
            32,
            128256,
            theta=LLAMA_3_THETA,
            positions=8192,
            tied=False,
        ),
        "llama-3.2-1b": _llama(
            2048,
            32,
            8,
            64,
            8192,
            16,
            128256,
            theta=LLAMA_3_THETA,
            positions=131072,
            tied=True,
        ),
        "smollm2-135m": _llama(
            576,
            9,
            3,
            64,
            1536,
            30,
            49152,
            theta=SMOLLM2_THETA,
            positions=8192,
            tied=True,
        ),
        "tiny": _llama(
            tiny.HIDDEN,
            tiny.HEADS,
            tiny.KV_HEADS,
            tiny.HEAD_DIM,
            tiny.INNER,
            tiny.LAYERS,
            tiny.VOCAB,
            theta=TINY_THETA,
            positions=tiny.CONTEXT,
            tied=True,
        ),
    }
)
"""Shapes by name; ``tiny`` is that of the model in tiny.py, for rehearsals."""
