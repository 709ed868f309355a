"""Shapes that are measured without weights are those of the models they are named after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from offramp.models.families import config_from_hf
from offramp.models.rope import plain_inv_freq
from offramp.models.shapes import MODEL_SHAPES


def weights(name: str) -> int:
    """Weights of the model, counted one matrix and one norm at a time."""
    config = MODEL_SHAPES[name]
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = hidden * (2 * config.query_size + 2 * config.kv_size)
    layer = attention + 3 * hidden * inner + 2 * hidden
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return config.num_layers * layer + tables + hidden


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_a_shape_has_as_many_weights_as_its_model(name: str, expected: int) -> None:
    """The numbers that the model cards tell."""
    assert weights(name) == expected


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_a_shape_fits_together(name: str) -> None:
    config = MODEL_SHAPES[name]
    assert config.query_size == config.hidden_size
    assert config.num_heads % config.num_kv_heads == 0
    assert len(config.inv_freq) == config.head_dim // 2


def test_tiny_is_the_tiny_model(tiny_dir: Path) -> None:
    """All but where its texts end, which no shape knows."""
    assert replace(config_from_hf(tiny_dir), eos_token_ids=()) == MODEL_SHAPES["tiny"]


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0])
def test_frequencies_are_those_of_transformers(theta: float) -> None:
    hf = LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    expected, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
    assert scale == 1.0
    assert plain_inv_freq(theta, 64) == tuple(expected.tolist())
