"""Exits that are the model itself, cut short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.errors import UnsupportedModel
from offramp.models.exits.head import shared_heads
from offramp.models.exits.training.data import Answer, lay_out
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import load_weights
from offramp.models.transformer import Transformer

LAYERS = (1, 3)


@pytest.fixture(scope="module")
def config(tiny_dir: Path) -> ModelConfig:
    return config_from_hf(tiny_dir)


@pytest.fixture(scope="module")
def weights(tiny_dir: Path, config: ModelConfig) -> dict[str, Tensor]:
    return load_weights(tiny_dir, config, dtype=torch.float32)


@torch.inference_mode()
def states_after(weights: dict[str, Tensor], config: ModelConfig, layer: int) -> Tensor:
    """States of a model that ends at ``layer``."""
    model = Transformer(replace(config, num_layers=layer), weights, (), 64)
    layout = lay_out(model, [(0, Answer((5, 9, 40), (7, 100, 33, 250)))])
    hidden = layout.hidden
    for segment in model.segments:
        hidden = segment(hidden, layout.at, layout.cache)
    return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shared_head_gives_the_truncated_models_logits(
    weights: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype
) -> None:
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model = Transformer(config, cast, LAYERS, 64)
    for head in shared_heads(cast, config, LAYERS):
        hidden = states_after(weights, config, head.layer).to(dtype)
        own = head.normed(hidden, config.rms_norm_eps)
        assert own.dtype == dtype
        assert model.logits(own).equal(model.logits(model.normed(hidden)))


def test_the_gate_always_fires(weights: dict[str, Tensor], config: ModelConfig) -> None:
    for head in shared_heads(weights, config, LAYERS, threshold=0.7):
        hidden = torch.randn(50, config.hidden_size) * 100
        assert (head.score(hidden, config.rms_norm_eps) == 1).all()
        assert (head.floor, head.fuse, head.threshold) == (0.0, None, 0.7)


@pytest.mark.parametrize("layers", [(), (0,), (4,), (3, 1), (2, 2)])
def test_layers_outside_the_model_are_refused(
    layers: tuple[int, ...], weights: dict[str, Tensor], config: ModelConfig
) -> None:
    with pytest.raises(UnsupportedModel, match="ascending ones of 1 to 3"):
        shared_heads(weights, config, layers)
